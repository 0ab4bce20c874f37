"""The command line that all training scripts share: a file, overrides, `--resume`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from latentdiff.config import describe, load_config

T = TypeVar("T")


def command_line(
    cls: type[T],
    default: Path,
    description: str | None,
    arguments: Sequence[str] | None = None,
) -> tuple[T, bool]:
    """Parse `[--config FILE] [--resume] [a.b=value …]`.

    Args:
        cls: the configuration's dataclass.
        default: the file used when none is given.
        description: the script's docstring, shown by --help above the list of all keys.
        arguments: the words; None takes those of the process.
    Returns: (configuration, whether to resume).
    Raises: UserError: listing everything that is wrong with the configuration.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog="configuration keys (given as key=value):\n\n" + describe(cls),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", type=Path, default=default, help="YAML file; default: %(default)s"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="override one key")
    options = parser.parse_intermixed_args(arguments)
    return load_config(cls, options.config, options.overrides), options.resume
