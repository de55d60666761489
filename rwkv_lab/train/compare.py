"""Adapters and tuned states side by side: the same base, text and steps, and as nearly as can be as many parameters."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rwkv_lab.arguments import checked
from rwkv_lab.checkpoint import Layout, expected_tensors, open_checkpoint
from rwkv_lab.errors import LayoutError, ParameterError
from rwkv_lab.peft import LoraConfig, planned_parameters
from rwkv_lab.suggestions import did_you_mean
from rwkv_lab.train.planning import make_plan
from rwkv_lab.train.spec import KINDS, TrainOptions, TrainSpec
from rwkv_lab.train.trainer import run_training

_ATTENTION = ("receptance", "key", "value", "output")


@dataclass(frozen=True)
class Compared:
    """What one method reached."""

    method: str
    trained: int  # parameters
    rank: int | None  # None for states, which have none
    lr: float
    bits_before: float  # per byte of held-out text
    bits_after: float
    losses: list[float]  # bits per token of each step's batch
    seconds: float  # of the steps


def compared_kinds() -> tuple[str, ...]:
    """The kinds of training that `compare_methods` knows: adapters, then states."""
    kinds = [kind for kind in KINDS.values() if kind.compared_lr is not None]
    return tuple(kind.name for kind in sorted(kinds, key=lambda kind: "rank" not in kind.takes))


@checked
def compare_methods(
    base: str | Path,
    data: str = "python",
    *,
    methods: Sequence[str] | None = None,
    steps: int = 100,
    batch_size: int = 8,
    ctx_len: int = 128,
    seed: int = 0,
    budget: int | None = None,
    tokenizer: str | Path | None = None,
    template: str | Path = "world",
    ignore: Sequence[str] = (),
    long: str | None = None,
) -> list[Compared]:
    """Tune a model by each method and measure it on held-out text; nothing is kept.

    Adapters go into the four matrices of every time mix, at the rank that comes nearest to `budget`. Each method has
    the learning rate that suits it on the demo model.

    Args:
        methods: of `compared_kinds()`; None for all.
        budget: parameters to train; None for as many as the model's states have.
        tokenizer, template, ignore, long: of the data, as `train` takes them.

    Raises:
        ParameterError: no such method, or a budget below 1.
        LayoutError: no model with states to tune.
        RwkvLabError: of the base, the text and the training; see `train`.
    """
    known = compared_kinds()
    methods = known if methods is None else methods
    unknown = next((m for m in methods if m not in known), None)
    if unknown is not None:
        hint = did_you_mean(unknown, known)
        raise ParameterError(f"There is no method {unknown!r} to compare; there are: {', '.join(known)}{hint}.")
    with open_checkpoint(base) as ck:
        layout = ck.layout
    if layout is None or layout.version == "4.0":
        raise LayoutError(f"{base} is no model with states to tune: {layout or 'no whole model'}.")
    if budget is None:
        budget = layout.n_layer * layout.n_head * layout.head_size**2
    if budget < 1:
        raise ParameterError(f"budget={budget}: at least one parameter is to be trained.")
    common = dict(base=base, data=data, steps=steps, batch_size=batch_size, ctx_len=ctx_len, seed=seed)
    common |= dict(tokenizer=tokenizer, template=template, ignore=ignore, long=long)
    with tempfile.TemporaryDirectory(prefix="rwkv_lab-") as folder:
        return [_tuned_by(method, layout, budget, common, Path(folder)) for method in methods]


def _tuned_by(method: str, layout: Layout, budget: int, common: Mapping[str, object], folder: Path) -> Compared:
    kind, own = KINDS[method], {}
    if "rank" in kind.takes:
        own = {"rank": rank_for(method, layout, budget), "targets": [f"att.{name}" for name in _ATTENTION]}
    spec = TrainSpec.read({"kind": method, "lr": kind.compared_lr, **common, **own})
    plan = make_plan(spec)
    result = run_training(plan, folder / f"{method}.safetensors", TrainOptions.read({"samples": False}))
    return Compared(
        method=method,
        trained=result.trained,
        rank=spec.rank,
        lr=plan.spec.lr,
        bits_before=result.bits_before,
        bits_after=result.bits_after,
        losses=result.losses,
        seconds=result.seconds["training"],
    )


def rank_for(method: str, layout: Layout, budget: int) -> int:
    """The rank at which an adapter in the four matrices of every time mix comes nearest to `budget` parameters."""
    shapes = expected_tensors(layout)[0]
    names = [f"blocks.{i}.att.{name}" for i in range(layout.n_layer) for name in _ATTENTION]
    sizes = [shapes[f"{name}.weight"] for name in names]
    config = LoraConfig(method=method, lora_r=1)
    each = sum(planned_parameters(name, *size, config) for name, size in zip(names, sizes, strict=True))  # per rank
    return min(max(1, round(budget / each)), min(min(size) for size in sizes))
