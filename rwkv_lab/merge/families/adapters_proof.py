"""Proof of merged adapters: whole matrices in float64, each value with a bound of its error.

Nothing of `rwkv_lab.peft` or the merging of adapters is used: names, settings and formulas are understood again here.
The bounds are what the stated precision may add; where it decides which level a quantised value falls on, the bound is
that level.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from rwkv_lab.lazy_numpy import np
from rwkv_lab.lazy_torch import torch
from rwkv_lab.merge.families.mixing_proof import setting_at
from rwkv_lab.merge.proof import Exact, Proof, ProofInputs, Source

PROVED = ("lora", "pissa", "miss")  # kinds of adapters that are understood here
_PARTS = "init_lora_[AB]|lora_(?:[AB]|down|up|magnitude_vector)|disha|bone_block|bone|miss_block|alpha"
_PART = re.compile(rf"^(.+?)\.({_PARTS})(?:\.(?!weight$)[^.]+)?(?:\.weight)?$")
_FLAT = re.compile(r"^(?:lora|lycoris)_(?:[a-z0-9]+_)??(blocks)_(\d+)_(att|ffn)_(\w+)$")
_SINGLE = 2.0**-23  # the distance of float32 numbers at 1
# The published levels of NF4.
_LEVELS = (
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334]
    + [-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
    + [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)

_FP4 = [0.0, 1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1.0]
# Per power of ten 1, 2, 4, … 64 even steps from a tenth to the whole of it, by their middles.
_DYNAMIC = [(0.1 + 0.9 * (k + 0.5) / 2**i) * 10 ** (i - 6) for i in range(7) for k in range(2**i)]
_TABLES = {
    "nf4": _LEVELS,
    "fp4": sorted({s * level for s in (-1, 1) for level in _FP4}),
    "bnb-int8": sorted([0.0, 1.0, *_DYNAMIC, *(-v for v in _DYNAMIC)]),
}

Parts = dict[str, "torch.Tensor"]  # of one matrix: "A", "B", "A0", "B0", "alpha" or "block"
Bounded = tuple["torch.Tensor", "torch.Tensor"]  # values and the most that each may be off, float64 [out, in]


@dataclass(frozen=True)
class Understood:
    """One adapter."""

    layers: dict[str, dict[str, torch.Tensor]]  # by the base's name of the matrix: "A", "B", "A0", "B0" or "block"
    scale: dict[str, float]  # of LoRA and PiSSA
    variant: str  # of MiSS
    whole: dict[str, torch.Tensor]
    weight: Any  # a number, or one that differs by tensor
    n_layer: int

    def at(self, name: str) -> float:
        """The weight for one tensor."""
        return setting_at(self.weight, name, self.n_layer)


class AdaptersProof(Proof):
    def __init__(self, inputs: ProofInputs):
        super().__init__(inputs)
        self.adapters = [_understood(i, inputs) for i in range(len(inputs.tuned))]
        self.quant = inputs.recipe["parameters"].get("quant", "none")
        self.unmerge = inputs.recipe["parameters"].get("unmerge", False)

    def sources(self) -> dict[str, Source | None]:
        base = self.inputs.base
        out: dict[str, Source | None] = {name: (base, name) for name in base}
        if self.inputs.recipe["alpha"] == 0:
            return out
        names = [n for a in self.adapters for n in (*a.layers, *a.whole) if a.at(n)]
        if names and self.quant != "none" and not self.unmerge:
            names += [n for n in base if n.startswith("blocks.") and n.endswith(".weight") and base[n].ndim == 2]
        copied: dict[str, Source] = {n: (a.whole, n) for a in self.adapters for n in a.whole if a.at(n) == 1}
        return out | {n: copied.get(n) for n in dict.fromkeys(names) if self.inputs.may_change(n)}

    def like(self, name: str) -> torch.Tensor:
        files = (self.inputs.base, *(a.whole for a in self.adapters))
        return next(tensors[name] for tensors in files if name in tensors)

    def exact(self, name: str) -> Exact:
        base, precision = self.inputs.base, self.inputs.precision
        whole = next((a for a in self.adapters if name in a.whole and a.at(name)), None)
        if whole is not None:
            to = whole.whole[name].double()
            start = base[name].double().reshape(to.shape) if name in base else torch.zeros_like(to)
            weight = whole.at(name)
            values = start + weight * (to - start)
            size = start.abs() + to.abs() + precision.smallest_normal
            off = 4 * precision.eps * (1 + abs(weight)) * size
        else:
            values, off = self._matrix(base[name], name, precision)
        values, off = values.reshape(-1), off.reshape(-1)
        return lambda part: ([values[part]], off[part])

    def _matrix(self, weight: torch.Tensor, name: str, precision: torch.finfo) -> Bounded:
        now = weight.double(), torch.zeros(weight.shape, dtype=torch.float64, device="cpu")
        steps = [a for a in self.adapters if name in a.layers and a.at(name)]
        if self.unmerge:
            for a in reversed(steps):
                now = _without(now, a, a.layers[name], a.scale.get(name, 0.0), a.at(name), precision)
            return now
        for i, a in enumerate(steps):
            parts, s = a.layers[name], a.scale.get(name, 0.0) * a.at(name)
            if "A0" in parts:
                now = _plus_product(now, parts["A0"], parts["B0"], -s, precision)
            now = _quantised(now, self.quant) if i == 0 else now
            if "m" in parts:
                changed = _plus_product(now, parts["A"], parts["B"], a.scale.get(name, 0.0), precision)
                now = _with_lengths(now, changed, parts["m"], a.at(name), precision)
                continue
            now = (
                _with_block(now, a, parts, a.at(name), precision)
                if "block" in parts
                else _plus_product(now, parts["A"], parts["B"], s, precision)
            )
        return now if steps else _quantised(now, self.quant)


def _understood(i: int, inputs: ProofInputs) -> Understood:
    """The i-th adapter of the merge."""
    path, init, recipe = inputs.paths[i], inputs.init[i], inputs.recipe
    given = {k: v[i] if isinstance(v, list) else v for k, v in recipe["parameters"].items()}
    alpha = recipe["alpha"][i] if isinstance(recipe["alpha"], list) else recipe["alpha"]
    config = json.loads((path / "adapter_config.json").read_bytes()) if path.is_dir() else None
    note = {} if path.is_dir() else _note(path)
    layers, whole = _sorted(inputs.tuned[i])
    if init is not None:
        for x, parts in _sorted(init)[0].items():
            layers[x] |= {f"{half}0": parts[f"{half}0" if f"{half}0" in parts else half] for half in "AB"}
    if _computed(recipe, i):
        for x, parts in layers.items():
            parts |= _principal(
                inputs.base[x], len(parts["A"]), _scale(x, parts | {"A0": parts["A"]}, alpha, given, note, config)
            )
    scale = {x: _scale(x, parts, alpha, given, note, config) for x, parts in layers.items() if "block" not in parts}
    weight = 1.0 if recipe["weights"] is None else recipe["weights"][i]
    n_layer = 1 + max(int(n.split(".")[1]) for n in inputs.base if n.startswith("blocks."))
    return Understood(layers, scale, _variant(note, config, given, layers), whole, weight, n_layer)


def _computed(recipe: Mapping, i: int) -> bool:
    """Whether the start of the i-th adapter is the base's own principal part."""
    starts = recipe.get("pissa_init")
    return (starts[i] if isinstance(starts, list) else starts) == "svd"


def _principal(weight: torch.Tensor, rank: int, scale: float) -> Parts:
    U, S, V = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    return {"A0": torch.from_numpy(V[:rank]), "B0": torch.from_numpy(U[:, :rank] * S[:rank] / scale)}


def _scale(x: str, parts: Parts, alpha: float | None, given: Mapping, note: Mapping, config: Mapping | None) -> float:
    """What B A is multiplied with."""
    rank, rs = len(parts["A"]), bool(given.get("use_rslora"))
    a: Any = alpha
    if "alpha" in parts:
        a = float(parts["alpha"])
    elif note:
        rs, a = note["use_rslora"], note["alpha"]
    elif config:
        table = config.get("alpha_pattern") or {}
        stem = x.removesuffix(".weight")
        fitting = [v for p, v in table.items() if re.fullmatch(rf"(.*\.)?({p})", stem)]
        rs, a = bool(config.get("use_rslora")), [*fitting, config["lora_alpha"]][0]
    elif "A0" in parts or given.get("residual_base"):
        rs, a = False, rank
    return a / (math.sqrt(rank) if rs else rank)


def _note(path: Path) -> dict:
    """What rwkv_lab wrote beside the tensors when it saved the adapter."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            found = [n for n in archive.namelist() if n.split("/")[-1] == "rwkv_lab.adapter"]
            return json.loads(archive.read(found[0])) if found else {}
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get("rwkv_lab.adapter", "{}"))


def _sorted(tensors: Mapping) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    called = {"lora_A": "A", "lora_B": "B", "init_lora_A": "A0", "init_lora_B": "B0", "alpha": "alpha"}
    called |= {"lora_magnitude_vector": "m"}
    called |= {"lora_down": "A", "lora_up": "B"}
    layers, whole = {}, {}
    for name in tensors:
        part = _PART.match(name)
        if part:
            flat = _FLAT.match(part[1])
            layer = ".".join(flat.groups()) if flat else part[1]
            layers.setdefault(f"{layer}.weight", {})[called.get(part[2], "block")] = tensors[name]
        else:
            whole[name] = tensors[name]
    return layers, whole


def _variant(note: dict, config: dict | None, given: dict, layers: dict) -> str:
    if not any("block" in parts for parts in layers.values()):
        return ""
    if note.get("variant"):
        return note["variant"]
    if config and config.get("init_weights") == "bat" and config["peft_type"] == "MISS":
        return "bat-hf"
    three = next(parts["block"] for parts in layers.values()).ndim == 3
    return f"bat-{given['bat']}" if three else "plain"


def _with_lengths(before: Bounded, changed: Bounded, m: torch.Tensor, weight: float, precision: torch.finfo) -> Bounded:
    """DoRA: the rows of `changed` brought to the lengths m; with a weight, so much of the way there."""
    (start, loose), (values, off), m = before, changed, m.double().reshape(-1, 1)
    norm = values.square().sum(1, keepdim=True).sqrt()
    wrong = off.square().sum(1, keepdim=True).sqrt() + (values.shape[1] + 4) * precision.eps * norm
    found = values * (m / norm)
    bound = (m / norm).abs() * off + found.abs() * (wrong / norm + 8 * precision.eps)
    out = start + weight * (found - start)
    bound = (
        abs(weight) * bound + abs(1 - weight) * loose + 4 * precision.eps * (start.abs() + found.abs()) * (weight != 1)
    )
    return out, bound


def _plus_product(now: Bounded, A: torch.Tensor, B: torch.Tensor, s: float, precision: torch.finfo) -> Bounded:
    (values, off), A, B = now, A.double(), B.double()
    tiny = precision.smallest_normal * max(abs(s), 1.0)
    size = values.abs() + (abs(s) * B.abs() + tiny) @ (A.abs() + tiny) + tiny
    return values + s * (B @ A), off + (len(A) + 4) * precision.eps * size


def _with_block(now: Bounded, a: Understood, parts: dict, weight: float, precision: torch.finfo) -> Bounded:
    (values, off), D = now, parts["block"].double() * weight
    if not a.variant.startswith("bat"):
        added = _spread(D, values.shape)
        return values + added, off + 4 * precision.eps * (values.abs() + added.abs() + precision.smallest_normal)
    r = D.shape[-1]
    times, D_at = _tiles(a.variant, D)
    W, e = (_cut(t, r) for t in (values, off))
    size = W.abs() + times(W.abs(), D.abs()) + D_at.abs() + precision.smallest_normal
    e = e + times(e, D.abs()) + (r + 4) * precision.eps * size
    return _joined(W + times(W, D) + D_at), _joined(e)


def _without(now: Bounded, a: Understood, parts: dict, scale: float, weight: float, precision: torch.finfo) -> Bounded:
    if "block" not in parts:
        s = scale * weight
        now = _plus_product(now, parts["A"], parts["B"], -s, precision)
        return _plus_product(now, parts["A0"], parts["B0"], s, precision) if "A0" in parts else now
    (values, off), D = now, parts["block"].double() * weight
    if not a.variant.startswith("bat"):
        added = _spread(D, values.shape)
        return values - added, off + 4 * precision.eps * (values.abs() + added.abs() + precision.smallest_normal)
    r = D.shape[-1]
    both = torch.eye(r, dtype=D.dtype, device="cpu") + D
    inverse = torch.linalg.inv(both)
    condition = float((torch.linalg.matrix_norm(both) * torch.linalg.matrix_norm(inverse)).max())
    times, D_at = _tiles(a.variant, D)
    T, e = (_cut(t, r) for t in (values, off))
    size = T.abs() + D_at.abs() + precision.smallest_normal
    e = times(e + 4 * precision.eps * size, inverse.abs())
    e = e + 8 * r * precision.eps * condition * times(size, inverse.abs())
    return _joined(times(T - D_at, inverse)), _joined(e)


def _spread(D: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """What MiSS adds: D[j mod r, i mod columns] at row i, column j."""
    rows, columns = torch.arange(shape[0], device="cpu") % D.shape[1], torch.arange(shape[1], device="cpu") % D.shape[0]
    return D.T[rows][:, columns]


def _cut(matrix: torch.Tensor, r: int) -> torch.Tensor:
    return matrix.reshape(matrix.shape[0] // r, r, matrix.shape[1] // r, r)  # tile, row in it, tile, column in it


def _joined(tiles: torch.Tensor) -> torch.Tensor:
    a, i, b, k = tiles.shape
    return tiles.reshape(a * i, b * k)


def _tiles(variant: str, D: torch.Tensor):
    """(product of every tile with its own block, the blocks where they are added)."""
    if variant == "bat-hf":  # one block for all tiles of the same rows
        return lambda W, M: torch.einsum("aibk,akl->aibl", W, M), D[:, :, None, :]
    return lambda W, M: torch.einsum("aibk,bkl->aibl", W, M), D.transpose(0, 1)[None]


def _quantised(now: Bounded, quant: str) -> Bounded:
    values, off = now
    if quant == "none":
        return now
    off = off + _SINGLE * values.abs()  # quantisers compute in float32
    if quant == "int8":
        top, place = values.abs().amax(1, keepdim=True), values.abs().argmax(1, keepdim=True)
        step = (top / 127).clamp_min(1e-300)
        share = values / step
        unsure = (off + values.abs() * off.gather(1, place) / top.clamp_min(1e-300)) / step + 127 * 8 * _SINGLE
        near = ((share - share.floor()) - 0.5).abs() <= unsure
        found = share.round() * step
        return found, found.abs() * (off.amax(1, keepdim=True) / top.clamp_min(1e-300) + 4 * _SINGLE) + near * step
    levels = torch.tensor(_TABLES[quant], dtype=torch.float64, device="cpu")
    flat, wrong = values.reshape(-1), off.reshape(-1)
    block = len(flat) if quant == "bnb-int8" else 64  # values that share a scale
    x, e = (torch.nn.functional.pad(t, (0, -len(flat) % block)).view(-1, block) for t in (flat, wrong))
    top, loose = x.abs().amax(1, keepdim=True).clamp_min(1e-300), e.amax(1, keepdim=True)
    share, unsure = x / top, (e + loose) / top + 8 * _SINGLE
    middles = (levels[1:] + levels[:-1]) / 2
    code = torch.searchsorted(middles, share)
    edges = torch.nn.functional.pad(middles, (1, 1), value=math.inf)
    near = torch.minimum((share - edges[code]).abs(), (share - edges[code + 1]).abs()) <= unsure
    widest = float((levels[1:] - levels[:-1]).max())
    found = levels[code] * top
    bound = levels[code].abs() * loose + 4 * _SINGLE * found.abs() + near * widest * top
    return found.reshape(-1)[: len(flat)].view_as(values), bound.reshape(-1)[: len(flat)].view_as(values)
