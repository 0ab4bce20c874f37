"""The command `latentdiff`; each word after it is a module with a main()."""

from __future__ import annotations

import sys
from importlib import import_module

from latentdiff.errors import command

#: word → (module, what it is for).
COMMANDS = {
    "generate": ("latentdiff.cli.generate", "generate images from prompts"),
    "edit": ("latentdiff.cli.edit", "paint into images, beyond them, between them"),
    "serve": ("latentdiff.cli.serve", "show a web page, and answer A1111's and OpenAI's clients"),
    "train": ("latentdiff.train.__main__", "train a U-Net, or fine-tune a model"),
    "evaluate": ("latentdiff.cli.evaluate", "measure a model beside captioned images"),
    "inspect": ("latentdiff.cli.inspect", "say what a model's file or an image holds"),
    "convert": ("latentdiff.cli.convert", "turn a model into a folder or a single file"),
    "doctor": ("latentdiff.cli.doctor", "look a data set over before training on it"),
}


@command
def main() -> int:
    """Run the command that the first argument names; see `errors.command` for exit codes."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word in COMMANDS:
        code = import_module(COMMANDS[word][0]).main(sys.argv[2:])
        return int(code)
    asked = word in ("-h", "--help")
    lines = ["usage: latentdiff COMMAND …   (latentdiff COMMAND --help)", ""]
    lines += [f"  {name:10} {about}" for name, (_, about) in COMMANDS.items()]
    if not asked:
        given = f"; got {word!r}" if word else ""
        lines.insert(0, f"error: COMMAND must be one of {', '.join(COMMANDS)}{given}.")
    print("\n".join(lines), file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(main())
