"""Activations of a running model: r, w, k, v, a, g, states and more, per layer and token, named as in the formulas."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rwkv_lab.arguments import checked, whole_numbers
from rwkv_lab.errors import ParameterError
from rwkv_lab.patterns import matches, matches_any


class Capturable(nn.Module):
    """A module whose `forward` lets tensors be captured, at no cost while they are not. It does so by

        if self.receivers:
            self.show(r=r, w=log_decay.view(heads), state=wkv_state[:, None])

    with tensors `[B,T,...]` in the order in which they are computed; a state, which is there once per call, is
    `[B,1,...]`.
    """

    receivers: tuple[Callable[[dict[str, torch.Tensor]], None], ...] = ()

    def show(self, **tensors: torch.Tensor) -> None:
        """Give these tensors to all that capture."""
        for receive in self.receivers:
            receive(tensors)


class Captured(Mapping):
    """What was captured: `captured["blocks.0.att.w"]`, in the order of computation; calls follow each other along T."""

    def __init__(self):
        self._pieces: dict[str, list[torch.Tensor]] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._pieces:
            raise ParameterError(f"{name} was not captured; there are: {', '.join(list(self._pieces)[:12]) or 'none'}.")
        return torch.cat(self._pieces[name], dim=1)

    def __contains__(self, name: object) -> bool:
        return name in self._pieces

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def _add(self, name: str, tensor: torch.Tensor) -> None:
        self._pieces.setdefault(name, []).append(tensor.detach())


@checked
@contextmanager
def capture(
    model: nn.Module, names: Collection[str] | None = None, layers: Collection[int] | None = None
) -> Iterator[Captured]:
    """Collect tensors from inside a model while the block runs; they are detached and stay on their device.

        with capture(model, names=["w", "state"], layers=[0, 3]) as captured:
            model(tokens)
        captured["blocks.3.att.w"]                                      # [B,T,H,N]

    Args:
        names: which ones, as patterns (see `rwkv_lab.patterns`): `w`, `ffn.k`, `blocks.0`. None for all but `state`,
            which is large. They are, where a generation has them:

            - `blocks.i.x`: what comes into the block `[B,T,C]`
            - `blocks.i.att.x`, `.att.out`: into the time mix (after ln1) and out of it `[B,T,C]`
            - `blocks.i.att.r`, `.w`, `.k`, `.v`, `.a`, `.kk`, `.g`, `.y`: what goes into the WKV operator, and its
              output y, `[B,T,H,N]` (RWKV-4: `[B,T,A]`). w is the log-decay, <= 0; g is the gate as it multiplies;
              RWKV-7's operator gets -kk and kk·a
            - `blocks.i.att.state`: the state at the end of every call of the layer, `[B,n,H,V,K]` (RWKV-4:
              `[B,n,3,A]`). In RNN mode that is after every token; in TRANSFORMER mode once per call of the model: to
              see states along a text there, give it in pieces
            - `blocks.i.ffn.x`, `.ffn.k`, `.ffn.out`: into the channel mix, behind its activation `[B,T,F]`, out of it
        layers: which ones; None for all.

    Gradient checkpointing runs layers again in the backward pass: keep that outside.

    Raises:
        ParameterError: a layer that the model does not have; after the block, a pattern that matched nothing.
    """
    blocks: Any = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.ModuleList):
        raise ParameterError(f"capture needs an RWKV_Dual; a {type(model).__name__} has no blocks.")
    n_layer = len(blocks)
    layers = None if layers is None else whole_numbers(layers, "layers")
    wrong = next((i for i in layers or () if not 0 <= i < n_layer), None)
    if wrong is not None:
        raise ParameterError(f"There is no layer {wrong}: the model has layers 0 to {n_layer - 1}.")
    captured, there = Captured(), set()
    wanted = [
        (prefix, module)
        for layer in (range(n_layer) if layers is None else sorted(set(layers)))
        for prefix, module in blocks[layer].named_modules(prefix=f"blocks.{layer}")
        if isinstance(module, Capturable)
    ]

    def receive(prefix: str, tensors: dict[str, torch.Tensor]) -> None:
        there.update(tensors)
        for name, tensor in tensors.items():
            if _fits(f"{prefix}.{name}", names):
                captured._add(f"{prefix}.{name}", tensor)

    receivers = [(module, lambda tensors, prefix=prefix: receive(prefix, tensors)) for prefix, module in wanted]
    for module, receiver in receivers:
        module.receivers = (*module.receivers, receiver)
    try:
        yield captured
    finally:
        for module, receiver in receivers:
            module.receivers = tuple(r for r in module.receivers if r is not receiver)
    lost = next((n for n in names or () if there and not any(matches(full, n) for full in captured)), None)
    if lost is not None:
        raise ParameterError(f"Nothing in these layers is called {lost!r}; there are: {', '.join(sorted(there))}.")


def _fits(full: str, names: Collection[str] | None) -> bool:
    if names is None:
        return not full.endswith(".state")
    return matches_any(full, names)
