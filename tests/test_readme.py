"""docs/architecture.md lists every file, and commands in the docs have the options they use."""

import re
import runpy
import sys
from importlib import import_module
from pathlib import Path

import pytest

from latentdiff.__main__ import COMMANDS
from latentdiff.cli.edit import TASKS

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("latentdiff", "training", "inference", "benchmarks", "examples", "recipes")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FILES = sorted(p for name in ("training", "inference") for p in (ROOT / name).glob("*.py"))
#: As the docs write them, without the `python` before a file.
PROGRAMS = [f"{p.parent.name}/{p.name}" for p in FILES] + [f"latentdiff {w}" for w in COMMANDS]
ROW = re.compile(r"( *)([\w./-]+(?:, [\w./-]+)*)(?: +(\S.*))?$")


def tree() -> dict[str, str]:
    """Path → its phrase, from the tree of docs/architecture.md (two spaces to a level)."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = page.split("## Files\n\n```\n")[1]
    found, folders = dict[str, str](), list[str]()
    for line in block.split("```")[0].splitlines():
        row = ROW.match(line)
        assert row is not None, f"not a row of the tree: {line!r}"
        level, names = len(row[1]) // 2, row[2].split(", ")
        for name in names:
            found["".join(folders[:level]) + name] = row[3] or ""
        folders[level:] = [names[0]]
    return found


def test_the_tree_names_every_file_once_with_a_phrase_and_no_other() -> None:
    files = {
        str(path.relative_to(ROOT).as_posix())
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "__init__.py"
    }
    named = {path: phrase for path, phrase in tree().items() if path.endswith(".py")}
    assert sorted(files - named.keys()) == []
    assert sorted(named.keys() - files) == []
    assert [path for path, phrase in named.items() if not phrase] == []


def test_the_tree_is_read_by_level() -> None:
    found = tree()
    assert "latentdiff/diffusion/samplers/step.py" in found
    assert "latentdiff/train/likelihood.py" not in found
    assert "latentdiff/evaluation/likelihood.py" in found


def commands(program: str) -> list[tuple[str, str]]:
    """(page, command) for every mention of a program in a command of the docs, joined lines too."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in text.splitlines():
            for part in re.split(r"`|&&|\|", line):
                if re.match(rf"(.*(python|launch).* )?{program} ", part.strip().removeprefix("$ ")):
                    found.append((page.name, part.split(program, 1)[1]))
    return found


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_is_there_and_has_the_options_that_the_docs_use(
    program: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = set[str]()
    for task in [[], *([name] for name in TASKS if program.endswith(("edit", "edit.py")))]:
        monkeypatch.setattr(sys, "argv", [program, *task, "--help"])
        with pytest.raises(SystemExit) as end:
            if program.endswith(".py"):
                runpy.run_path(str(ROOT / program), run_name="__main__")
            import_module(COMMANDS[program.split()[1]][0]).main([*task, "--help"])
        assert end.value.code in (0, None)
        help_text = capsys.readouterr().out
        known |= set(re.findall(r"--[a-z][a-z0-9-]*", help_text.split("usage", 1)[1]))
    for page, command in commands(program):
        used = set(re.findall(r"(?<=\s)--[a-z][a-z0-9-]*", command))
        assert used <= known, f"{page}: {command!r}"
