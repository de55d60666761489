from pathlib import Path

import pytest
from tiny_training import tiny_base, tiny_text


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    return tiny_text(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def small(tmp_path_factory, texts) -> Path:
    """The path of a tiny model, trained on `texts`."""
    return tiny_base(tmp_path_factory.mktemp("small"), texts)
