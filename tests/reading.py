"""Counts what is read of checkpoints."""

from rwkv_lab.checkpoint.source import SourceFile


def record_reads(monkeypatch) -> list[tuple[str, int, int]]:
    """From now on, every read that goes through a SourceFile: (name of the file, first byte, end)."""
    made: list[tuple[str, int, int]] = []
    read, read_into = SourceFile.read, SourceFile.read_into

    def counting_read(self, offset, nbytes):
        made.append((self.path.name, offset, offset + nbytes))
        return read(self, offset, nbytes)

    def counting_read_into(self, buffer, offset):
        made.append((self.path.name, offset, offset + len(buffer)))
        return read_into(self, buffer, offset)

    monkeypatch.setattr(SourceFile, "read", counting_read)
    monkeypatch.setattr(SourceFile, "read_into", counting_read_into)
    return made
