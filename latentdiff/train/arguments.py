"""The command line that the training scripts share: a file, overrides, `--resume`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from latentdiff.config import describe, load_config

T = TypeVar("T")


def config_parser(
    cls: type,
    description: str | None,
    default: Path | None = None,
    program: str | None = None,
) -> argparse.ArgumentParser:
    """A parser of `[--config FILE] [section.key=value …]`; for `parse_intermixed_args`.

    Args:
        cls: the configuration's dataclass.
        description: the script's docstring, shown by --help above the list of all keys.
        default: the file used when none is given; None: the defaults of the dataclass.
        program: its name in the help; None: the script's.
    """
    parser = argparse.ArgumentParser(
        program,
        description=description,
        epilog="configuration keys (given as key=value):\n\n" + describe(cls),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    words = "YAML file over the defaults listed below" + "; default: %(default)s" * bool(default)
    parser.add_argument("--config", type=Path, default=default, help=words)
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="override one key"
    )
    return parser


def add_resume(parser: argparse.ArgumentParser) -> None:
    """Add `--resume`."""
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")


def command_line(
    cls: type[T],
    default: Path,
    description: str | None,
    arguments: Sequence[str] | None = None,
) -> tuple[T, bool]:
    """Parse `[--config FILE] [--resume] [section.key=value …]`.

    Args:    arguments: the words; None takes those of the process.  Others: see `config_parser`.
    Returns: (configuration, whether to resume).
    Raises:  UserError: listing everything that is wrong with the configuration.
    """
    parser = config_parser(cls, description, default)
    add_resume(parser)
    options = parser.parse_intermixed_args(arguments)
    return load_config(cls, options.config, options.overrides), options.resume
