"""Importing the package costs nothing; its names load when they are used."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "diffusers", "datasets", "accelerate", "numpy", "PIL", "pydantic")


def run(code: str, **extra: str) -> str:
    own = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {k: v for k, v in os.environ.items() if k not in own} | extra
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_waiting_threads_spin_a_little_unless_told_otherwise(
    given: dict[str, str], spins: str
) -> None:
    code = "import os, latentdiff; print(os.environ.get('GOMP_SPINCOUNT'))"
    assert run(code, **given) == spins


def test_import_is_light_and_quick() -> None:
    found = run(
        "import sys, time; before = set(sys.modules); start = time.process_time()\n"
        "import latentdiff\n"
        "from latentdiff import pipeline\n"
        "print(time.process_time() - start, *set(sys.modules) - before)"
    ).split()
    assert float(found[0]) < 0.4
    assert not {name.partition(".")[0] for name in found[1:]} & set(HEAVY)


def test_script_help_is_light() -> None:
    found = run(
        "import sys; sys.argv = ['generate.py', '--help']\n"
        "import runpy\n"
        "try: runpy.run_path('inference/generate.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(*sys.modules)"
    )
    assert "torch" not in found.splitlines()[-1].split()


def test_public_names() -> None:
    import latentdiff

    for name in latentdiff.__all__:
        assert getattr(latentdiff, name) is not None
        assert name in dir(latentdiff)
    fresh = type(latentdiff.pipeline)()
    assert repr(fresh) == "<latentdiff's embedded pipeline, not loaded yet>"
    try:
        latentdiff.nothing  # noqa: B018
    except AttributeError as error:
        assert "nothing" in str(error)
    else:
        raise AssertionError("an unknown name must raise AttributeError")


def test_using_models_imports_no_pipeline_of_diffusers() -> None:
    found = run(
        "import sys\n"
        "from latentdiff import LatentDiffusionPipeline, UNet\n"
        "print(*(name for name in sys.modules if name.split('.')[0] in "
        "('diffusers', 'transformers', 'datasets', 'accelerate')))"
    )
    assert found == ""


@pytest.mark.parametrize("folder", ["latentdiff", "training", "inference", "benchmarks"])
def test_no_file_warns_when_it_is_compiled(folder: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as an escape sequence that Python will refuse
        for file in (ROOT / folder).rglob("*.py"):
            compile(file.read_text(encoding="utf-8"), str(file), "exec")
