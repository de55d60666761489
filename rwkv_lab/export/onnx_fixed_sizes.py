"""Graphs of a causal language model that take one batch, one length and one number of tokens in the cache alone: what
is read is padded to these sizes, and taken apart again.

Padding stands in front of tokens and of the cache, with 0 in the mask, so that no token sees it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

Arrays = dict[str, np.ndarray]
# int64 `[batch,length]` tokens, their mask with that of the past `[batch,past+length]`, keys and values
# `[batch,H,past,D]` by name -> logits `[batch,length,V]`, and keys and values `[batch,H,past+length,D]`
Call = Callable[[np.ndarray, np.ndarray, Arrays], tuple[np.ndarray, Arrays]]


@dataclass(frozen=True)
class FixedSizes:
    """What a graph takes: rows, tokens of a call, and tokens that were read before, padding included."""

    batch: int
    length: int
    past: int

    @property
    def context(self) -> int:
        """Tokens that a text may have: the last one is read with all others before it."""
        return self.past + 1

    def run(self, call: Call, ids: np.ndarray, mask: np.ndarray, past: Mapping[str, np.ndarray]) -> tuple:
        """Run any batch and length, in groups of rows and pieces of tokens.

        Args:
            ids: int64 `[B,T]`.
            mask: of the past and of these, int64 `[B,P+T]`.
            past: keys and values `[B,H,P,D]` by name; P + T is at most `context`.

        Returns:
            logits `[B,T,V]`, and keys and values `[B,H,P+T,D]` by name.
        """
        found = []
        for row in range(0, len(ids), self.batch):
            rows = slice(row, row + self.batch)
            found.append(self._rows(call, ids[rows], mask[rows], {name: part[rows] for name, part in past.items()}))
        logits = np.concatenate([one for one, _ in found])
        return logits, {name: np.concatenate([parts[name] for _, parts in found]) for name in past}

    def _rows(self, call: Call, ids: np.ndarray, mask: np.ndarray, past: Arrays) -> tuple[np.ndarray, Arrays]:
        logits, before = [], mask.shape[1] - ids.shape[1]
        for at in range(0, ids.shape[1], self.length):
            piece = ids[:, at : at + self.length]
            read, end = before + at, before + at + piece.shape[1]
            new, past = self._piece(call, piece, mask[:, :read], mask[:, read:end], past)
            logits.append(new)
        return np.concatenate(logits, axis=1), past

    def _piece(
        self, call: Call, ids: np.ndarray, before: np.ndarray, mask: np.ndarray, past: Arrays
    ) -> tuple[np.ndarray, Arrays]:
        rows, T = ids.shape
        more, padding = self.batch - rows, self.length - T
        whole = np.concatenate([_in_front(before, self.past), _in_front(mask, self.length)], axis=1)
        given = {name: _to_batch(_in_front(part, self.past, axis=2), more) for name, part in past.items()}
        logits, found = call(_to_batch(_in_front(ids, self.length), more), _to_batch(whole, more), given)
        new = {name: found[name][:rows, :, self.past + padding :] for name in past}
        return logits[:rows, padding:], {name: np.concatenate([past[name], new[name]], axis=2) for name in past}


def _in_front(array: np.ndarray, size: int, axis: int = 1) -> np.ndarray:
    """With zeros in front, up to a size of an axis."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (size - array.shape[axis], 0)
    return np.pad(array, widths)


def _to_batch(array: np.ndarray, more: int) -> np.ndarray:
    """With so many rows of zeros behind."""
    return np.pad(array, [(0, more), *[(0, 0)] * (array.ndim - 1)])
