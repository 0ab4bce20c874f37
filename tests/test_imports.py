"""Imports point downwards only, so that each part can be read and used without those above it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "latentdiff"
#: Lower may not import higher, and parts of the same level do not know each other.
LEVEL = {
    "errors": 0, "colour": 0, "sniff": 0, "embedded": 0, "precision": 0, "files": 1,
    "html_report": 2, "images": 2, "plain_yaml": 2, "tensor_file": 2, "weights": 3, "config": 3,
    "diffusion": 4, "models": 4, "data": 4,
    "formats": 5, "sampling": 5, "finetune": 6, "pipelines": 7, "train": 7, "doctor": 7,
    "evaluation": 8, "serve": 8, "cli": 9, "__init__": 10, "__main__": 10,
}  # fmt: skip


def imported(file: Path) -> set[str]:
    """Parts of the package that a file imports anywhere, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
        found |= {n.split(".")[1] for n in names if n.startswith("latentdiff.")}
    return found


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: f.stem)
def test_imports_point_downwards(file: Path) -> None:
    part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for other in imported(file) - {part}:
        assert LEVEL[other] < LEVEL[part], f"{file.relative_to(PACKAGE)} imports {other}"
