"""What the tests of measurements share."""

from pathlib import Path

import pytest


@pytest.fixture
def base(demo_folder) -> Path:
    """A tiny model whose tokens are bytes."""
    return demo_folder / "demo-base.pth"
