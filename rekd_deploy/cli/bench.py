"""rekd-bench: is it fast, is it right, is the rationale the reason?"""

from __future__ import annotations

from rekd_deploy.cli import (
    bench_accuracy,
    bench_compare,
    bench_faithfulness,
    bench_latency,
    bench_report,
    bench_serving,
)
from rekd_train.cli.command import application, examples, run

SUBCOMMANDS = (bench_latency, bench_serving, bench_accuracy, bench_faithfulness, bench_report, bench_compare)
"""Modules with ``NAME``, ``EXAMPLES`` (lines for --help) and ``command`` (a typer callback), in the order of --help."""

app = application(
    help="Measure a served model: what an answer costs, how good it is, whether the rationale is the reason.\n\n"
    "A table for people, a last line of JSON for machines, and a result file with the hardware and versions. Exit "
    "code 1 if a check fails.",
    epilog=examples(*(module.EXAMPLES[0] for module in SUBCOMMANDS), "rekd-bench COMMAND --help"),
    no_args_is_help=True,
)

for _module in SUBCOMMANDS:
    app.command(_module.NAME, epilog=examples(*_module.EXAMPLES))(_module.command)


def main() -> None:
    """Entry point."""
    run(app)


if __name__ == "__main__":
    main()
