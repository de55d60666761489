"""What quantisation costs each part of a model, measured; and how to store each part within a size or a KL budget.

One group of matrices at a time is rounded as the ONNX graphs hold it, inputs included, and the model reads real text.
KL is that of its predictions from the float32 model's. Weight errors do not tell this: they are the same everywhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import nn

from rwkv_lab.arguments import checked
from rwkv_lab.errors import ParameterError
from rwkv_lab.export.onnx_folder import Weights
from rwkv_lab.export.scanned_model import ScannedModel, kind_of, layer_of, rounded_weights, scanned, swapped
from rwkv_lab.export.validation_tester import GATES
from rwkv_lab.export.weight_storage import bytes_of, fault_of
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
    model: nn.Module, texts: Sequence[Sequence[int]], level: ScanLevel = "int4", by: GroupBy = "part"
) -> Sensitivity:
    """Quantise one group at a time and measure what the model's predictions lose.

    Args:
        model: an `RWKV_Dual` or a causal language model of transformers, float32, on the CPU.
        texts: as tokens, each read from a fresh state.
        level: the fewest bits that a group may have; "int4" tries int8, too.
        by: a group is time mix or channel mix of a layer ("part"), or one kind of matrix in all layers ("matrix"); the
            head is one by itself.

    Raises:
        ParameterError: no text, or no matrix to quantise.
    """
    reader = _Reader(model, texts)
    found = reader.scanned
    groups = _groups(found, by)
    damages: list[GroupDamage] = []
    ways: dict[str, list[Weights]] = {
        name: [w for w in _ways(found, names, level) if w != "fp16"] for name, names in groups.items()
    }
    with Progress("measuring what quantisation costs", sum(map(len, ways.values()))) as progress:
        for group, names in groups.items():
            for stored in ways[group]:
                one: dict[str, Weights] = dict.fromkeys(names, stored)
                kl, error, _ = reader.measure(one)
                size = _bytes(found, one)
                saved = _bytes(found, dict.fromkeys(names, "fp32")) - size
                damages.append(GroupDamage(group, stored, tuple(names), kl, error, size, saved))
                progress.advance(1)
    return Sensitivity(level, reader.tokens, damages, _frontier(found, groups, damages, level))


@checked
def propose(
    model: nn.Module,
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
            return _measured(reader, found, points[-1])
        kl_budget = GATES[found.level].kl
    best: Proposal | None = None
    for point in points:
        if point is not points[-1] and point.predicted_kl > 4 * kl_budget:
            continue  # far off; measuring it would only take time
        proposal = _measured(reader, found, point)
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
    """Reads texts with some matrices quantised, and compares with what the model itself predicts."""

    def __init__(self, model: nn.Module, texts: Sequence[Sequence[int]]):
        self.scanned = scanned(model)
        vocab = self.scanned.vocab_size
        for ids in texts:
            if not ids or not all(0 <= token < vocab for token in ids):
                raise ParameterError(f"texts hold an empty one, or a token that is none of the model's {vocab}.")
        if not texts:
            raise ParameterError("texts is empty: give some to measure on.")
        self.tokens = sum(map(len, texts))
        with torch.inference_mode():
            self.kept = [self.scanned.read(torch.tensor([list(ids)])) for ids in texts]

    @torch.inference_mode()
    def measure(self, stored: Mapping[str, Weights]) -> tuple[float, float, float]:
        """Mean KL, its standard error, and the share of likeliest tokens that stay, with matrices stored so."""
        found, model = self.scanned, self.scanned.model
        layers = [found.layers if (at := layer_of(name)) is None else at for name in stored]
        first, weights = min(layers, default=found.layers), rounded_weights(model, stored)
        kl, same = [], []
        for kept in self.kept:
            # Expected logits are computed each time: those of a large vocabulary would fill the memory.
            expected = found.logits(kept, found.layers)
            with swapped(model, stored, weights):
                logits = found.logits(kept, first)
            for p, q in zip(expected.split(_ROWS), logits.split(_ROWS), strict=True):
                log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
                kl.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0))
                same.append(p.argmax(-1) == q.argmax(-1))
        every = torch.cat(kl)
        return (
            float(every.mean()),
            float(every.std(correction=0)) / len(every) ** 0.5,
            float(torch.cat(same).double().mean()),
        )


# ------------------------------------------------------------------ groups and choices


def _groups(model: ScannedModel, by: GroupBy) -> dict[str, list[str]]:
    """Names of matrices by group, in the model's order."""
    found: dict[str, list[str]] = {}
    for name in model.matrices:
        short = name.removesuffix(".weight")
        part = short.rpartition(".")[0] if by == "part" else kind_of(short)
        found.setdefault("head" if name in model.heads else part, []).append(name)
    return found


def _ways(model: ScannedModel, names: Sequence[str], level: ScanLevel) -> list[Weights]:
    """How a group can be stored, from the fewest bits on; as the level says, the head has 8 at least."""
    fewest = "int8" if names[0] in model.heads else level
    large = any(float(model.matrices[name].detach().abs().max()) > _HALF_MAX for name in names)
    found: list[Weights] = []
    for way in _STEPS[level][_STEPS[level].index(fewest) :]:
        if not any(fault_of(name, tuple(model.matrices[name].shape), way) for name in names):
            found.append("fp32" if way == "fp16" and large else way)
    return found


def _bytes(model: ScannedModel, stored: Mapping[str, Weights]) -> int:
    return sum(bytes_of(tuple(model.matrices[name].shape), way) for name, way in stored.items())


def _frontier(
    model: ScannedModel, groups: Mapping[str, Sequence[str]], damages: Sequence[GroupDamage], level: ScanLevel
) -> list[FrontierPoint]:
    """From the fewest bits for every group to the most, one group at a time, by KL per byte."""
    kl = {(d.group, d.stored): d.kl for d in damages}  # 16 bits and more cost next to nothing
    ways = {group: _ways(model, names, level) for group, names in groups.items()}
    stored: dict[str, Weights] = {group: found[0] for group, found in ways.items()}
    # Of a head that is tied to the embedding, graphs with quantised weights have both.
    kept = sum(4 * p.numel() for name, p in model.model.named_parameters() if name not in model.matrices)
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


def _measured(reader: _Reader, found: Sensitivity, point: FrontierPoint) -> Proposal:
    names = {damage.group: damage.names for damage in found.damages}
    choice: dict[str, Weights] = {name: way for group, way in point.stored.items() for name in names[group]}
    kl, error, top1 = reader.measure(choice)
    return Proposal(choice, point.stored, point.bytes, point.predicted_kl, kl, error, top1)
