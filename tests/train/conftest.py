import sys
from pathlib import Path

for folder in (Path(__file__).parents[1], Path(__file__).parents[2] / "training"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import pytest  # noqa: E402
from tiny_training import make_images  # noqa: E402


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight captioned images of coloured squares."""
    return make_images(tmp_path_factory.mktemp("images") / "squares")
