"""What quantisation costs each part of a model, measured; and how to store each part within a size or a KL budget.

One group of matrices at a time is rounded as the ONNX graphs hold it, inputs included, and the model reads real text.
KL is that of its predictions from the float32 model's. Weight errors do not tell this: they are the same everywhere.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

import torch
from annotated_types import Ge, Gt
from torch import nn
from torch.nn import functional as F

from rwkv_lab.arguments import checked
from rwkv_lab.checkpoint.rounding import BLOCK
from rwkv_lab.errors import ParameterError
from rwkv_lab.export.onnx_folder import Weights
from rwkv_lab.export.optimization_processor import restored
from rwkv_lab.export.validation_tester import GATES
from rwkv_lab.export.weight_storage import bytes_of, fault_of, is_head, is_matrix, stored_as
from rwkv_lab.model import RWKV_Dual
from rwkv_lab.progress import Progress

GroupBy = Literal["part", "matrix"]
ScanLevel = Literal["int8", "int4"]
Budget = Annotated[float, Gt(0)]

# From few bits to many: the order in which a group is given more of them.
_STEPS: dict[str, tuple[Weights, ...]] = {"int4": ("int4", "int8", "fp16"), "int8": ("int8", "fp16")}
_HALF_MAX = 65504.0
_ROWS = 64  # positions whose predictions are compared at a time: in float64 they take memory


@dataclass(frozen=True)
class GroupDamage:
    """What it costs to store one group of matrices in few bits, and all else in float32.

    kl: mean, in nats per token.
    saved_bytes: against float32.
    """

    group: str
    stored: Weights
    names: tuple[str, ...]
    kl: float
    kl_standard_error: float
    bytes: int
    saved_bytes: int


@dataclass(frozen=True)
class FrontierPoint:
    """A mixed choice on the way from the fewest bits to the most.

    bytes: of all weights in an ONNX graph.
    predicted_kl: the sum of what its groups cost one by one.
    """

    bytes: int
    predicted_kl: float
    raised: str  # the group that has more bits than in the point before; "" of the first
    stored: dict[str, Weights]  # by group


@dataclass(frozen=True)
class Proposal:
    """How each matrix should be stored.

    choice: by name of the matrix, as `export_onnx` takes it.
    kl: measured with all of it at once, in nats per token.
    top1: share of positions whose likeliest token stays.
    """

    choice: dict[str, Weights]
    stored: dict[str, Weights]  # by group
    bytes: int
    predicted_kl: float
    kl: float
    kl_standard_error: float
    top1: float


@dataclass(frozen=True)
class Sensitivity:
    """What a scan found.

    tokens: that were read.
    damages: of every group and way of storing, in the model's order.
    frontier: mixed choices, from the smallest to the largest; each is the one before with more bits for the group
        that lowers KL most per byte.
    """

    level: ScanLevel
    tokens: int
    damages: list[GroupDamage]
    frontier: list[FrontierPoint]
    proposal: Proposal | None = None


@checked
def scan_sensitivity(
    model: RWKV_Dual, texts: Sequence[Sequence[int]], level: ScanLevel = "int4", by: GroupBy = "part"
) -> Sensitivity:
    """Quantise one group at a time and measure what the model's predictions lose.

    Args:
        model: float32, on the CPU.
        texts: as tokens, each read from a fresh state.
        level: the fewest bits that a group may have; "int4" tries int8, too.
        by: a group is time mix or channel mix of a layer ("part"), or one kind of matrix in all layers ("matrix"); the
            head is one by itself.

    Raises:
        ParameterError: no text, or no matrix to quantise.
    """
    reader = _Reader(model, texts)
    groups = _groups(model, by)
    damages: list[GroupDamage] = []
    ways: dict[str, list[Weights]] = {
        name: [w for w in _ways(model, name, names, level) if w != "fp16"] for name, names in groups.items()
    }
    with Progress("measuring what quantisation costs", sum(map(len, ways.values()))) as progress:
        for group, names in groups.items():
            for stored in ways[group]:
                one: dict[str, Weights] = dict.fromkeys(names, stored)
                kl, error, _ = reader.measure(one)
                size = _bytes(model, one)
                saved = _bytes(model, dict.fromkeys(names, "fp32")) - size
                damages.append(GroupDamage(group, stored, tuple(names), kl, error, size, saved))
                progress.advance(1)
    return Sensitivity(level, reader.tokens, damages, _frontier(model, groups, damages, level))


@checked
def propose(
    model: RWKV_Dual,
    texts: Sequence[Sequence[int]],
    found: Sensitivity,
    size_budget: Annotated[int, Ge(1)] | None = None,
    kl_budget: Budget | None = None,
) -> Proposal:
    """How to store each matrix: with a size budget, what costs least KL within it; with a KL budget, what is smallest
    within it, as measured with everything quantised at once. With both, the KL budget must be met within the size; with
    neither, the KL budget is what validation allows the level.

    Args:
        texts: those of the scan.
        size_budget: bytes of all weights in an ONNX graph.
        kl_budget: nats per token.

    Raises:
        ParameterError: no choice is within the budget; says what the smallest one is.
    """
    reader, points = _Reader(model, texts), found.frontier
    if size_budget is not None:
        points = [p for p in points if p.bytes <= size_budget]
        if not points:
            raise ParameterError(
                f"size_budget={size_budget:,} bytes: the smallest choice of level {found.level} has "
                f"{found.frontier[0].bytes:,}.\nAllow that, or take a level with fewer bits."
            )
    if kl_budget is None:
        if size_budget is not None:
            return _measured(model, reader, found, points[-1])
        kl_budget = GATES[found.level].kl
    best: Proposal | None = None
    for point in points:
        if point is not points[-1] and point.predicted_kl > 4 * kl_budget:
            continue  # far off; measuring it would only take time
        proposal = _measured(model, reader, found, point)
        if proposal.kl <= kl_budget:
            return proposal
        best = proposal if best is None or proposal.kl < best.kl else best
    assert best is not None
    raise ParameterError(
        f"kl_budget={kl_budget:g}: the least KL of the choices{' within size_budget' if size_budget else ''} is "
        f"{best.kl:.3g}, with {best.bytes:,} bytes.\nAllow more."
    )


# ------------------------------------------------------------------ measuring


class _Reader:
    """Reads texts with some matrices quantised, and compares with what the model itself predicts.

    What enters each layer is kept: of a group in layer 5, layers 0 to 4 need not be run again.
    """

    model: Any

    def __init__(self, model: RWKV_Dual, texts: Sequence[Sequence[int]]):
        vocab = model.layout.vocab_size
        for ids in texts:
            if not ids or not all(0 <= token < vocab for token in ids):
                raise ParameterError(f"texts hold an empty one, or a token that is none of the model's {vocab}.")
        if not texts:
            raise ParameterError("texts is empty: give some to measure on.")
        self.model, self.head = model, model.head.weight.detach()
        self.ids = [torch.tensor([list(ids)]) for ids in texts]
        self.tokens = sum(ids.shape[1] for ids in self.ids)
        with torch.inference_mode():
            self.kept = [self._layers(ids) for ids in self.ids]

    def _layers(self, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """(x, v_first) in front of every layer, and behind the last one."""
        model = self.model
        return list(self._run(0, (model.blocks[0].ln0(model.emb(ids)), None)))

    def _run(self, first: int, entered) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        x, v_first = entered
        state = self.model.create_state(1)
        yield x, v_first
        for layer in range(first, len(self.model.blocks)):
            parts = state.att_shift[:, layer], state.ffn_shift[:, layer], state.wkv[:, layer]
            x, _, _, _, v_first = self.model.blocks[layer](x, *parts, v_first)
            yield x, v_first

    @torch.inference_mode()
    def measure(self, stored: Mapping[str, Weights]) -> tuple[float, float, float]:
        """Mean KL, its standard error, and the share of likeliest tokens that stay, with matrices stored so."""
        layers = [int(name.split(".")[1]) for name in stored if name.startswith("blocks.")]
        first = min(layers, default=len(self.model.blocks))
        kl, same = [], []
        with as_exported(self.model, stored):
            for entered in self.kept:
                *_, (x, _) = self._run(first, entered[first])
                found = self.model.head(self.model.ln_out(x))[0]
                # Expected logits are computed each time: those of a large vocabulary would fill the memory.
                expected = F.linear(self.model.ln_out(entered[-1][0]), self.head)[0]
                for p, q in zip(expected.split(_ROWS), found.split(_ROWS), strict=True):
                    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
                    kl.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0))
                    same.append(p.argmax(-1) == q.argmax(-1))
        every = torch.cat(kl)
        return (
            float(every.mean()),
            float(every.std(correction=0)) / len(every) ** 0.5,
            float(torch.cat(same).double().mean()),
        )


@contextmanager
def as_exported(model: RWKV_Dual, stored: Mapping[str, Weights]) -> Iterator[None]:
    """Within it the model has some matrices as the ONNX graphs hold them, and rounds what they multiply as the graphs
    do."""
    linears: dict[str, Any] = {name: model.get_submodule(name.removesuffix(".weight")) for name in stored}
    before = {name: linear.weight for name, linear in linears.items()}
    hooks = []
    try:
        for name, linear in linears.items():
            weight = restored(name, before[name].detach(), stored[name])
            linear.weight = nn.Parameter(weight, requires_grad=False)
            if rounding := _INPUTS.get(stored[name]):
                hooks.append(linear.register_forward_pre_hook(lambda _, given, r=rounding: (r(given[0]),)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, linear in linears.items():
            linear.weight = before[name]


def round_inputs_int8(x: torch.Tensor) -> torch.Tensor:
    """As DynamicQuantizeLinear rounds what MatMulInteger multiplies: 256 levels for all of `x` together."""
    low, high = x.min().clamp_max(0), x.max().clamp_min(0)
    scale = (high - low) / 255
    if not scale:
        return x
    zero = (-low / scale).round().clamp(0, 255)
    return ((x / scale).round() + zero).clamp(0, 255).sub(zero) * scale


def round_inputs_int4(x: torch.Tensor) -> torch.Tensor:
    """As MatMulNBits at accuracy level 4 rounds what it multiplies: to int8 with a scale per 32 values."""
    blocks = x.unflatten(-1, (-1, BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    return ((blocks / torch.where(scale == 0, 1, scale)).round() * scale).flatten(-2)


_INPUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"int8": round_inputs_int8, "int4": round_inputs_int4}


# ------------------------------------------------------------------ groups and choices


def _groups(model: RWKV_Dual, by: GroupBy) -> dict[str, list[str]]:
    """Names of matrices by group, in the model's order."""
    found: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and (is_matrix(name) or is_head(name)):
            short = name.removesuffix(".weight")
            part = short.rpartition(".")[0] if by == "part" else re.sub(r"^blocks\.\d+\.", "", short)
            found.setdefault("head" if is_head(name) else part, []).append(name)
    if not found:
        raise ParameterError("The model has no matrix that is quantised.")
    return found


def _ways(model: RWKV_Dual, group: str, names: Sequence[str], level: ScanLevel) -> list[Weights]:
    """How a group can be stored, from the fewest bits on; as the level says, the head has 8 at least."""
    shapes = [(name, tuple(model.get_parameter(name).shape)) for name in names]
    fewest = cast(Weights, stored_as(*shapes[0], level))  # nf4 is of files alone
    large = any(float(model.get_parameter(name).detach().abs().max()) > _HALF_MAX for name in names)
    found: list[Weights] = []
    for way in _STEPS[level][_STEPS[level].index(fewest) :]:
        if not any(fault_of(name, shape, way) for name, shape in shapes):
            found.append("fp32" if way == "fp16" and large else way)
    return found


def _bytes(model: RWKV_Dual, stored: Mapping[str, Weights]) -> int:
    return sum(bytes_of(tuple(model.get_parameter(name).shape), way) for name, way in stored.items())


def _frontier(
    model: RWKV_Dual, groups: Mapping[str, Sequence[str]], damages: Sequence[GroupDamage], level: ScanLevel
) -> list[FrontierPoint]:
    """From the fewest bits for every group to the most, one group at a time, by KL per byte."""
    kl = {(d.group, d.stored): d.kl for d in damages}  # 16 bits and more cost next to nothing
    ways = {group: _ways(model, group, names, level) for group, names in groups.items()}
    stored: dict[str, Weights] = {group: found[0] for group, found in ways.items()}
    matrices = {name for names in groups.values() for name in names}
    kept = sum(4 * p.numel() for name, p in model.named_parameters() if name not in matrices)
    size: dict[tuple[str, Weights], int] = {
        (g, way): _bytes(model, dict.fromkeys(groups[g], way)) for g in groups for way in ways[g]
    }

    def point(raised: str) -> FrontierPoint:
        total = kept + sum(size[g, way] for g, way in stored.items())
        return FrontierPoint(total, sum(kl.get((g, way), 0.0) for g, way in stored.items()), raised, dict(stored))

    points = [point("")]
    while True:
        raises: list[tuple[float, str, Weights]] = [
            ((kl.get((g, now), 0.0) - kl.get((g, way), 0.0)) / (size[g, way] - size[g, now]), g, way)
            for g, now in stored.items()
            for way in ways[g][ways[g].index(now) + 1 :]
            if kl.get((g, way), 0.0) < kl.get((g, now), 0.0)  # int8 also rounds inputs, and may cost more than int4
        ]
        if not raises:
            return points
        _, group, way = max(raises, key=lambda one: one[0])
        stored[group] = way
        points.append(point(group))


def _measured(model: RWKV_Dual, reader: _Reader, found: Sensitivity, point: FrontierPoint) -> Proposal:
    names = {damage.group: damage.names for damage in found.damages}
    choice: dict[str, Weights] = {name: way for group, way in point.stored.items() for name in names[group]}
    kl, error, top1 = reader.measure(choice)
    return Proposal(choice, point.stored, point.bytes, point.predicted_kl, kl, error, top1)
