"""Says which file something was made from, without reading the whole of it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from rwkv_lab.arguments import checked
from rwkv_lab.checkpoint.open import Checkpoint, open_checkpoint
from rwkv_lab.errors import ParameterError

SAMPLE = 4096  # bytes read of each tensor that carries no checksum


@dataclass(frozen=True)
class FileFacts:
    path: Path
    bytes: int
    fingerprint: str  # "records:…", or "sha256:…" of all bytes


@checked
def file_facts(source: str | Path | Checkpoint, hash: str = "records") -> FileFacts:
    """Size and fingerprint of a checkpoint.

    Args:
        source: path of a checkpoint, or one that is open.
        hash: "records" costs a few milliseconds: SHA-256 over names, shapes, dtypes, sizes and the CRC-32 that a .pth
            carries for each record; where a tensor has no checksum, its first 4 KiB stand in. It tells files apart; it
            does not detect tampering. "sha256" reads every byte of every file, at 1 to 2 GB/s.
    Raises:
        ParameterError: another `hash`.
    """
    if hash not in ("records", "sha256"):
        raise ParameterError(f"hash={hash!r}: it must be 'records' or 'sha256'")
    if not isinstance(source, Checkpoint):
        with open_checkpoint(source) as ck:
            return file_facts(ck, hash)
    digest = hashlib.sha256()
    if hash == "sha256":
        for file in source.files:
            for offset in range(0, file.size, 1 << 20):
                digest.update(file.read(offset, min(1 << 20, file.size - offset)))
    else:
        for t in source.stored.values():
            digest.update(f"{t.name}\0{t.shape}\0torch.{t.dtype_name}\0{t.file.size}\0{t.crc32}\n".encode())
            if t.crc32 is None:
                digest.update(t.file.read(t.offset, min(SAMPLE, t.span)))
    return FileFacts(source.path, source.bytes, f"{hash}:{digest.hexdigest()}")
