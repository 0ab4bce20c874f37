"""The small model of the server's tests, made once for all of them."""

from __future__ import annotations

import pytest

from tests.serve.serving import small_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_model(tmp_path_factory.mktemp("the folder") / "small")
