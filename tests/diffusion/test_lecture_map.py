"""docs/lecture.md and docs/diffusion.md name things that exist, and their example runs."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ["lecture.md", "diffusion.md", "likelihood.md"]


def words(page: str, pattern: str) -> list[str]:
    found = re.findall(pattern, (ROOT / "docs" / page).read_text(encoding="utf-8"))
    return sorted(set(found))


def resolve(name: str) -> object:
    """Import the longest module prefix of a dotted name and follow the rest as attributes."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError as error:
            if not name.startswith(error.name or ""):
                raise  # a missing dependency, not a shorter module name
            continue
        for attribute in parts[length:]:
            found = getattr(found, attribute)
        return found
    raise AttributeError(name)


@pytest.mark.parametrize("name", words("lecture.md", r"`(latentdiff(?:\.\w+)+)`"))
def test_every_function_named_exists(name: str) -> None:
    assert callable(resolve(name))


def test_the_page_names_what_the_lecture_teaches() -> None:
    assert len(words("lecture.md", r"`(latentdiff(?:\.\w+)+)`")) > 30


@pytest.mark.parametrize("page", PAGES)
def test_every_test_named_exists(page: str) -> None:
    for file, name in words(page, r"`(tests/[\w/]+\.py)(?:::(\w+))?`"):
        source = (ROOT / file).read_text(encoding="utf-8")
        assert not name or f"def {name}(" in source, f"{file}::{name}"


def test_the_sampling_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "diffusion.md").read_text(encoding="utf-8")
    example = re.findall(r"```python\n(import torch.*?)```", text, flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(example[0], names)
    assert len(capsys.readouterr().out.splitlines()) == 30
    assert names["latents"].shape == (2, 4, 16, 16)  # type: ignore[attr-defined]
