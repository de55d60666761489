"""An RWKV in float32 of which one layer is in memory at a time: each is read from the file when it is computed."""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from rwkv_lab.checkpoint import Layout, TensorInfo
from rwkv_lab.export.family import Text
from rwkv_lab.machine import give_memory_back
from rwkv_lab.model import RWKVState
from rwkv_lab.model.dual import outline
from rwkv_lab.model.loading import check_tensors, fill, open_model
from rwkv_lab.model.registry import generation_of

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # wkv, att_shift and ffn_shift of one layer, `[B,…]`


class LayerByLayer:
    """Runs a checkpoint as `RWKV_Dual` does, in the memory of a layer; every call reads the whole file.

    Args:
        path: of a whole model; any format and dtype.

    Raises:
        LayoutError: not a whole model, or tensors that do not fit.
    """

    def __init__(self, path: Path):
        self.path = path
        with open_model(path) as (ck, layout):
            self.model: Any = outline(ck, layout)  # modules without values
            check_tensors(self.model, ck.info, path)
        self.model.eval().requires_grad_(False)
        self.layout: Layout = layout
        self._memory: dict[tuple[str, torch.Size], torch.Tensor] = {}  # that layers take turns in

    @torch.inference_mode()
    def read(self, texts: Sequence[Text]) -> Iterator[Iterator[tuple[torch.Tensor, RWKVState | None]]]:
        """Logits float32 `[B,T,V]` of each piece of each text, and the state after it where the text wants it. The
        layers are read once for all of them; the head once for each piece, since logits are large."""
        readings = [_Reading(text) for text in texts]
        self._run(readings)
        while readings:  # what was read is given back
            yield self._found(readings.pop(0))

    @torch.inference_mode()
    def run(self, tokens: np.ndarray, state: RWKVState | None = None) -> tuple[torch.Tensor, RWKVState]:
        """int64 `[B,T]` -> logits float32 `[B,T,V]`, and the state after the last token."""
        reading = _Reading(Text([tokens], True), state)
        self._run([reading])
        logits, after = next(self._found(reading))
        assert after is not None
        return logits, after

    @torch.inference_mode()
    def seconds(self, pieces: Sequence[np.ndarray]) -> list[float]:
        """What each piece takes to compute, without what reading the file takes. A piece follows the one before."""
        reading = _Reading(Text(pieces, False))
        self._run([reading])
        with open_model(self.path) as (ck, _):
            _logits(ck.info["head.weight"], reading.xs, reading.seconds)
        return reading.seconds

    def _run(self, readings: Sequence["_Reading"]) -> None:
        """All that is in front of the head."""
        model = self.model
        with open_model(self.path) as (ck, _):
            _embed(ck.info["emb.weight"], readings)
            for layer, block in enumerate(model.blocks):
                self._load(block, ck.info, f"blocks.{layer}.")
                for reading in readings:
                    if layer == 0:
                        reading.xs = [block.ln0(x) for x in reading.xs]
                    reading.run(block, self._first(block, layer, reading))
            self._load(model.ln_out, ck.info, "ln_out.")
            for reading in readings:
                reading.xs = [model.ln_out(x) for x in reading.xs]
        model.to("meta")
        self._memory.clear()
        give_memory_back()

    @torch.inference_mode()
    def _found(self, reading: "_Reading") -> Iterator[tuple[torch.Tensor, RWKVState | None]]:
        for x, layers in zip(reading.xs, reading.states, strict=True):
            logits = torch.empty(0)
            if reading.text.logits:
                with open_model(self.path) as (ck, _):
                    logits = _logits(ck.info["head.weight"], [x], [0.0])[0]
            state = None
            if layers:
                wkv, att, ffn = (torch.stack(one, 1) for one in zip(*layers, strict=True))
                state = RWKVState(wkv, att, ffn, self.layout.version, self.layout.vocab_size)
            yield logits, state

    def _load(self, module: nn.Module, tensors: Mapping[str, TensorInfo], prefix: str) -> None:
        """Read a module's values. Modules that are alike have them in the same memory, which is not freed in between:
        freed and allocated anew for each layer it falls into pieces, and grows."""
        own = [(name, parameter.shape) for name, parameter in module.named_parameters()]
        self._memory |= {key: torch.empty(key[1]) for key in own if key not in self._memory}
        places = {key[0]: self._memory[key] for key in own}
        module.load_state_dict(places, assign=True)
        fill(module, {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}, self.path)

    def _first(self, block: Any, layer: int, reading: "_Reading") -> Parts:
        """The state of a layer that a text begins with: what is given, else the model's own, tuned or not."""
        if (given := reading.given) is not None:
            return given.wkv[:, layer], given.att_shift[:, layer], given.ffn_shift[:, layer]
        tuned = getattr(block.att, "time_state", None)
        first = generation_of(self.layout).first_wkv
        wkv = first(self.layout, torch.device("cpu"))[layer] if tuned is None else tuned.clone()
        batch = len(reading.text.pieces[0])
        shift = torch.zeros(batch, self.layout.n_embd)
        return wkv.float().expand(batch, *wkv.shape), shift, shift


class _Reading:
    """A text on its way through the layers.

    xs: of each piece, what goes into the next layer, `[B,T,C]`.
    states: of each piece, the state of each layer after it; empty where they are not wanted.
    seconds: that each piece has taken.
    """

    def __init__(self, text: Text, given: RWKVState | None = None):
        self.text, self.given, count = text, given, len(text.pieces)
        self.xs: list[torch.Tensor] = []
        self.v_first: list[torch.Tensor | None] = [None] * count
        self.states: list[list[Parts]] = [[] for _ in range(count)]
        self.seconds = [0.0] * count

    def run(self, block: Any, state: Parts) -> None:
        """Compute one layer."""
        for i, x in enumerate(self.xs):
            start = time.perf_counter()
            wkv, att, ffn = state
            self.xs[i], att, ffn, wkv, self.v_first[i] = block(x, att, ffn, wkv, self.v_first[i])
            state = wkv, att, ffn
            self.seconds[i] += time.perf_counter() - start
            if self.text.states:  # shifts are views of all tokens, which would stay in memory
                self.states[i].append((state[0].clone(), state[1].clone(), state[2].clone()))


def _embed(embedding: TensorInfo, readings: Sequence[_Reading]) -> None:
    """Give texts the rows of their tokens, float32, picked as the file is read."""
    width, every = embedding.shape[-1], [torch.from_numpy(ids) for reading in readings for ids in reading.text.pieces]
    wanted, places = torch.cat([ids.flatten() for ids in every]).unique(return_inverse=True)
    rows, at = torch.empty(len(wanted), width), 0
    for block in embedding.blocks(width):
        block = block.view(-1, width)
        here = (wanted >= at) & (wanted < at + len(block))
        rows[here] = block[wanted[here] - at].float()
        at += len(block)
    found = iter(places.split([ids.numel() for ids in every]))
    for reading in readings:
        reading.xs = [rows[next(found)].view(*ids.shape, width) for ids in reading.text.pieces]


def _logits(head: TensorInfo, xs: Sequence[torch.Tensor], seconds: list[float]) -> list[torch.Tensor]:
    """x `[B,T,C]` -> logits `[B,T,V]` of each piece; what that takes is added to `seconds`."""
    vocab, width = head.shape
    logits = [torch.empty(*x.shape[:-1], vocab) for x in xs]
    at = 0
    for block in head.blocks(width):
        rows = block.view(-1, width).float()
        for i, x in enumerate(xs):
            start = time.perf_counter()
            logits[i][..., at : at + len(rows)] = F.linear(x, rows)
            seconds[i] += time.perf_counter() - start
        at += len(rows)
    return logits
