"""What a model remembers between two calls."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RWKVState:
    """State of a batch of sequences after some token. A call of the model returns a new one and leaves the old alone.

    wkv: `[B,L,H,V,K]`, float32 (float64 in a float64 model); row = value index, column = key index.
        RWKV-4 has no matrices: `[B,L,3,A]` = (a, b, p), where a e^p and b e^p are the sums of e^key v and of e^key.
    att_shift, ffn_shift: the last token's input of each layer's time mix and channel mix, after its LayerNorm,
        `[B,L,C]` in the model's dtype.
    version: generation of the model that made it, such as "6.0"; "" where that is not known. Shapes do not tell.
    """

    wkv: torch.Tensor
    att_shift: torch.Tensor
    ffn_shift: torch.Tensor
    version: str = ""

    def _map(self, change) -> "RWKVState":
        return RWKVState(change(self.wkv), change(self.att_shift), change(self.ffn_shift), self.version)

    def clone(self) -> "RWKVState":
        """A copy that shares no memory with this one."""
        return self._map(torch.Tensor.clone)

    def detach(self) -> "RWKVState":
        """The same numbers, cut off from the graph that computed them."""
        return self._map(torch.Tensor.detach)

    def to(self, device) -> "RWKVState":
        """The same state on another device."""
        return self._map(lambda x: x.to(device))

    def expand(self, batch_size: int) -> "RWKVState":
        """The state of one sequence (B = 1) for `batch_size` sequences, without copying it."""
        return self._map(lambda x: x.expand(batch_size, *x.shape[1:]))

    def rows(self, which: list[int]) -> "RWKVState":
        """The states of some of the sequences, in that order."""
        return self._map(lambda x: x[which])

    @staticmethod
    def concat(states: list["RWKVState"]) -> "RWKVState":
        """States of the same model as one batch."""
        parts = zip(*((s.wkv, s.att_shift, s.ffn_shift) for s in states), strict=True)
        return RWKVState(*(torch.cat(part) for part in parts), states[0].version)
