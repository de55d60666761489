import pytest
from reading import record_reads


@pytest.fixture
def reads(monkeypatch) -> list[tuple[str, int, int]]:
    """Every read of a checkpoint: (name of the file, first byte, end)."""
    return record_reads(monkeypatch)
