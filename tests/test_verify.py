"""`make verify` measures what it says, and one failure does not cost the other figures."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import verify  # noqa: E402


def test_every_group_names_a_page_that_is_there() -> None:
    for measure in verify.MEASURES.values():
        assert (ROOT / "docs" / measure.page).is_file()


def test_the_cheap_groups_are_measured_and_a_failing_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> dict[str, float]:
        raise RuntimeError("no disk")

    monkeypatch.setitem(verify.MEASURES, "loader", verify.Measure("data-at-scale.md", fail))
    file = tmp_path / "runs" / "verify.json"
    assert verify.verify(["posterior", "loader", "averages"], file) == ["loader"]
    found = json.loads(file.read_text())
    assert found["posterior"]["figures"]["largest difference"] < 1e-9
    assert found["loader"]["figures"] == {"failed": "RuntimeError: no disk"}
    misfits = found["averages"]["figures"]
    assert misfits["40 files, sigma_rel 0.1: misfit, %"] == pytest.approx(0, abs=1e-3)
    assert misfits["40 files, sigma_rel 0.03: misfit, %"] < 1


def test_a_scripts_own_figures_are_read_and_its_failure_is_not_hidden(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import json, pathlib, sys\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--output') + 1])\n"
        "(out / 'a.json' if out.is_dir() else out).write_text(json.dumps(sys.argv[1:-2]))\n"
        "sys.exit('--fail' in sys.argv)\n"
    )
    assert verify.of_script(str(script), "--x")() == ["--x"]
    assert verify.of_script(str(script), "--y", file="a.json")() == ["--y"]
    with pytest.raises(Exception, match="exit status 1"):
        verify.of_script(str(script), "--fail")()


def test_infinities_are_written_as_words() -> None:
    assert verify.plain({"a": {"b": float("inf")}, "c": 1.0}) == {"a": {"b": "inf"}, "c": 1.0}
