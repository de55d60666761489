import pytest
from hypothesis import settings
from reading import record_reads

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")


@pytest.fixture
def reads(monkeypatch) -> list[tuple[str, int, int]]:
    """Every read of a checkpoint: (name of the file, first byte, end)."""
    return record_reads(monkeypatch)
