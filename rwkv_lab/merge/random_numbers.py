"""Random numbers that belong to an element of a tensor, whatever block, thread or order it is computed in.

Number i for model m is the i-th 32-bit word of a Philox4x64 stream, over 2^32; the key of the stream is the first 16
bytes of the SHA-256 of "seed/m/name", m counted from 0.
"""

from __future__ import annotations

from hashlib import sha256

from rwkv_lab.lazy_numpy import np
from rwkv_lab.lazy_torch import torch

_WORDS = 8  # of 32 bits that one step of the counter gives


def draws(seed: int, model: int, name: str, start: int, count: int) -> torch.Tensor:
    """Numbers start … start + count - 1: float64 `[count]`, uniform in [0, 1)."""
    key = int.from_bytes(sha256(f"{seed}/{model}/{name}".encode()).digest()[:16], "little")
    skipped, inside = divmod(start, _WORDS)
    stream = np.random.Philox(key=key, counter=skipped)
    words = stream.random_raw((inside + count + 1) // 2).astype("<u8", copy=False).view("<u4")
    return torch.from_numpy(words[inside : inside + count] / 2.0**32)
