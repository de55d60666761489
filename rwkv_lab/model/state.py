"""What a model remembers between two calls."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RWKVState:
    """State of a batch of sequences after some token. A call of the model returns a new one and leaves the old alone.

    wkv: `[B,L,H,V,K]`, float32 (float64 in a float64 model); row = value index, column = key index.
    att_shift, ffn_shift: the last token's input of each layer's time mix and channel mix, after its LayerNorm,
        `[B,L,C]` in the model's dtype.
    """

    wkv: torch.Tensor
    att_shift: torch.Tensor
    ffn_shift: torch.Tensor

    def _map(self, change) -> "RWKVState":
        return RWKVState(change(self.wkv), change(self.att_shift), change(self.ffn_shift))

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
