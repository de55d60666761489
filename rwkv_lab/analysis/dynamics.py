"""What a model's state does along a text: how fast it decays, how large it gets, and what is in it at the end."""

from dataclasses import dataclass

import numpy as np
import torch

from rwkv_lab.arguments import checked
from rwkv_lab.model.capture import capture
from rwkv_lab.model.dual import RWKV_Dual

_PIECES = 64  # points along the text at which states are measured


@dataclass(frozen=True)
class Dynamics:
    """The state of one text, layer by layer. RWKV-4 has no matrices: its state is measured as a/b, the mean of the
    values that it stands for, per channel.
    """

    log_decays: list[np.ndarray]  # per layer w <= 0 of all channels and tokens: a state is multiplied by e^w per token
    positions: list[int]  # tokens read, P of them
    sizes: np.ndarray  # [P,L] RMS of the state's entries
    images: np.ndarray  # [H,V,K], every head of `layer` after the last token; of RWKV-4 [1,L,A], the means
    layer: int | None  # None where `images` shows all layers


@checked
@torch.no_grad()
def measure_dynamics(model: RWKV_Dual, tokens: torch.Tensor) -> Dynamics:
    """Read one text, tokens `[1,T]`, and look at the state on the way; the middle layer's at the end."""
    with capture(model, names=["w"]) as captured:
        _, final = model.parallel(tokens)
    log_decays = [w.cpu().numpy() for w in captured.values()]
    positions, sizes = _along(model, tokens)
    if model.layout.version == "4.0":
        return Dynamics(log_decays, positions, sizes, _means(final.wkv)[:1].numpy(), None)
    middle = model.layout.n_layer // 2
    return Dynamics(log_decays, positions, sizes, final.wkv[0, middle].numpy(), middle)


def _along(model: RWKV_Dual, text: torch.Tensor) -> tuple[list[int], np.ndarray]:
    """Tokens read so far, and the RMS of each layer's state there, `[P,L]`."""
    state, read, positions, sizes = None, 0, [], []
    for piece in text.split(max(text.shape[1] // _PIECES, 1), dim=1):
        _, state = model.parallel(piece, state)
        read += piece.shape[1]
        held = _means(state.wkv) if model.layout.version == "4.0" else state.wkv
        positions.append(read)
        sizes.append(held[0].flatten(1).square().mean(1).sqrt().numpy())
    return positions, np.stack(sizes)


def _means(wkv: torch.Tensor) -> torch.Tensor:
    """RWKV-4's state `[B,L,3,A]` -> a/b `[B,L,A]`."""
    return wkv[:, :, 0] / wkv[:, :, 1]
