"""Generation and dimensions of a model, and how shapes compare.

Shapes are compared without their dimensions of size 1: files of third parties hold `[C]` where BlinkDL's hold `[1, 1,
C]`, and one-head models come with their head dimension squeezed away.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from rwkv_lab.text import counted

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Generation and dimensions of an RWKV model."""

    version: str  # "4.0", "5.0", "5.1", "5.2", "6.0" or "7.0"
    n_layer: int
    n_embd: int  # C
    dim_att: int  # A; equal to C in every released model
    dim_ffn: int  # F
    vocab_size: int  # V
    n_head: int  # H; 0 for v4, which has no heads
    head_size: int  # N; 0 for v4
    ranks: Mapping[str, int] = field(default_factory=dict)  # v6: "maa", "decay"; v7: "w", "a", "v", "g"
    evidence: tuple[str, ...] = ()  # the names and shapes that decided

    def __str__(self) -> str:
        heads = f", {counted(self.n_head, 'head')} of {self.head_size}" if self.n_head else ""
        ranks = ", ranks " + " ".join(f"{k} {v}" for k, v in self.ranks.items()) if self.ranks else ""
        if not self.vocab_size:  # of states alone, which show no more
            return f"states of RWKV-{self.version}: {counted(self.n_layer, 'layer')}{heads}"
        return (
            f"RWKV-{self.version}: {self.n_layer} layers, n_embd {self.n_embd}{heads}, "
            f"dim_ffn {self.dim_ffn}, vocabulary {self.vocab_size}{ranks}"
        )


def without_ones(shape: Shape) -> Shape:
    """The shape without its dimensions of size 1."""
    return tuple(d for d in shape if d != 1)


def same_shape(found: Shape, expected: Shape) -> bool:
    """Equal up to dimensions of size 1."""
    return found == expected or without_ones(found) == without_ones(expected)
