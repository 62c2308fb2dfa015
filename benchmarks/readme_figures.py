"""Write the README's figures from the committed results, so that no number is typed by hand.

    python benchmarks/readme_figures.py                        # README.md from benchmarks/results/demo.json
    python benchmarks/readme_figures.py --take runs/demo       # first keep a demo run's report as demo.json

``tests/test_docs.py`` fails when README.md and the results differ.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "demo.json"
BEGIN, END = "<!-- figures: begin (from benchmarks/results/demo.json) -->", "<!-- figures: end -->"
_MODELS = {
    "classifier": "plain classifier of the student's size, reads everything",
    "teacher": "teacher pair",
    "student_without_teacher": "student pair, without a teacher",
    "student": "student pair, distilled",
}


def take(run: Path) -> None:
    """Keep a demo run's report, with the machine it was measured on and the command."""
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    result = {"command": "make demo", "hardware": hardware(), "report": report}
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def hardware() -> dict[str, str | int]:
    """The processor, its usable cores and the versions that decide speed."""
    import onnxruntime
    import torch

    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return {
        "processor": cpu.group(1) if cpu else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def figures(result: dict) -> str:
    """The README's section, between its two marks."""
    report, hardware = result["report"], result["hardware"]
    query = report["query"]
    minutes = sum(report["seconds"].values()) / 60
    lines = [
        f"From `{result['command']}` on {hardware['cores']} cores ({hardware['processor']}),",
        "on 2,490 held-out IMDB reviews, rationales noise-free, the pairs compacted:",
        "",
        "| model | accuracy | words kept |",
        "|---|---|---|",
        *(
            f"| {what} | {report[name]['accuracy']:.3f} | {report[name]['rate']:.1%} |"
            for name, what in _MODELS.items()
        ),
        "",
        f"{query['n']} reviews through Triton, one at a time: {query['p50_ms']:.1f} ms a query (median, tokenising",
        f"included); {query['agree_pipeline']} answers equal to the pipeline's in process, {query['agree_torch']} to",
        "PyTorch's (label, words, probabilities within 1e-4). The whole chain took",
        f"{minutes:.1f} minutes.",
    ]
    return "\n".join([BEGIN, *lines, END])


def with_figures(readme: str, result: dict) -> str:
    """README text with the section replaced."""
    pattern = re.compile(r"<!-- figures: begin.*?-->.*?" + re.escape(END), re.DOTALL)
    if not pattern.search(readme):
        raise ValueError("README.md has no marks for the figures")
    return pattern.sub(lambda _: figures(result), readme)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--take", type=Path, metavar="RUN", help="a demo run's folder whose report is kept")
    arguments = parser.parse_args()
    if arguments.take:
        take(arguments.take)
    readme = ROOT / "README.md"
    text = with_figures(readme.read_text(encoding="utf-8"), json.loads(RESULT.read_text(encoding="utf-8")))
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
