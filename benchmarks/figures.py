"""Write every figure in README and docs from the committed results, so that no number is typed by hand.

    python benchmarks/figures.py                       # all pages
    python benchmarks/figures.py --take runs/demo      # first keep a demo run's report as demo.json
    python benchmarks/figures.py --take runs/demo-images

A page holds a block between two marks; its text is made by the function of that name in ``_backbone_blocks.py``,
``_demo_blocks.py``, ``_latency_blocks.py`` or ``_training_blocks.py``.
``tests/test_docs.py`` fails when a page and the results differ, or when a figure stands outside of a block.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, Path(__file__).resolve().parent):
    sys.path.insert(0, str(folder))

from _blocks import BLOCKS, RESULTS, sources_of

for module in ("_backbone_blocks", "_demo_blocks", "_latency_blocks", "_training_blocks"):
    importlib.import_module(module)  # each registers its blocks

PAGES = ("README.md", "benchmarks/README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
MARK = re.compile(r"<!-- figures: begin (\w+)[^>]*-->\n.*?<!-- figures: end -->", re.DOTALL)


def take(run: Path) -> Path:
    """Keep a demo run's report, with the machine it was measured on and the command; where it lies now."""
    from rekd_deploy.bench.results import hardware, versions

    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    images = "images" in run.name
    result = {"command": "make demo-images" if images else "make demo", "hardware": hardware(), "versions": versions(),
              "report": report}  # fmt: skip
    path = RESULTS / ("demo_images.json" if images else "demo.json")
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return path


def with_figures(page: str) -> str:
    """A page's text with every block replaced.

    Raises:
        KeyError: a block that no function makes.
    """
    return MARK.sub(lambda found: _block(found.group(1)), page)


def without_blocks(page: str) -> str:
    """A page's text without its blocks."""
    return MARK.sub("", page)


def _block(name: str) -> str:
    head = f"<!-- figures: begin {name} (from {', '.join(sources_of(name))}) -->"
    return "\n".join([head, *BLOCKS[name](), "<!-- figures: end -->"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--take", type=Path, metavar="RUN", help="a demo run's folder whose report is kept")
    arguments = parser.parse_args()
    if arguments.take:
        take(arguments.take.resolve())
    for name in PAGES:
        page = ROOT / name
        old = page.read_text(encoding="utf-8")
        if (new := with_figures(old)) != old:
            page.write_text(new, encoding="utf-8")
            print(f"{name}: figures written")


if __name__ == "__main__":
    main()
