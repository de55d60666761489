import pytest

from rwkv_lab import plotting


@pytest.fixture
def unpainted(monkeypatch) -> None:
    """Figures are made but not painted, which takes longest: tests of figures, and notebooks in batch, paint them."""
    for name in ("png", "dark_png"):
        monkeypatch.setattr(plotting, name, lambda figure: b"\x89PNG")
