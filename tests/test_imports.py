"""Imports point downwards only, so that each part can be read and used without those above it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "latentdiff"
#: Lower may not import higher, and parts of the same level do not know each other.
LEVEL = {
    "errors": 0, "embedded": 0, "precision": 0, "atomic": 1,
    "tensor_file": 1, "weight_files": 2, "config_types": 1, "config_yaml": 1, "config": 2,
    "diffusion": 3, "models": 3, "data": 3, "formats": 4, "finetune": 5,
    "pipelines": 6, "trainer": 6, "doctor": 6,
    "command_line": 7, "commands": 7, "evaluation": 7, "__init__": 8, "__main__": 8,
}  # fmt: skip
CONFIG = {"config", "config_types", "config_yaml", "errors"}


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
        allowed = LEVEL[other] < LEVEL[part] or {part, other} <= CONFIG
        assert allowed, f"{file.relative_to(PACKAGE)} imports {other}"
