"""Write a run's report: python training/report_run.py RUN

RUN/report.html shows the curves, picture grids, configuration and environment of a train_latent.py
run, finished or not, and needs no other file. Every run writes it at its end by itself.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

if importlib.util.find_spec("latentdiff") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from latentdiff.errors import command
from latentdiff.trainer.report import write_report


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; see `errors.command` for exit codes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN")
    print(f"report: {write_report(parser.parse_args(arguments).run)}")


if __name__ == "__main__":
    sys.exit(main())
