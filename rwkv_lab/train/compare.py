"""Adapters and tuned states side by side: the same base, text and steps, and as nearly as can be as many parameters."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rwkv_lab.checkpoint import Layout, expected_tensors, open_checkpoint
from rwkv_lab.errors import LayoutError, ParameterError
from rwkv_lab.train.recipe import ADAPTER_KINDS
from rwkv_lab.train.trainer import train

METHODS = ("lora", "pissa", "miss", "state")
_ATTENTION = ("receptance", "key", "value", "output")
# Of four or five per method, on the demo model and its Python code, the one that reached fewest bits in 100 steps.
_LRS = {"lora": 2e-2, "pissa": 2e-2, "miss": 1e-2, "state": 2.0}


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


def compare_methods(
    base: str | Path,
    data: str = "python",
    methods: Sequence[str] = METHODS,
    steps: int = 100,
    batch_size: int = 8,
    ctx_len: int = 128,
    seed: int = 0,
    budget: int | None = None,
) -> list[Compared]:
    """Tune a model by each method and measure it on held-out text; nothing is kept.

    Adapters go into the four matrices of every time mix, at the rank that comes nearest to `budget`. Each method has
    the learning rate that suits it on the demo model.

    Args:
        budget: parameters to train; None for as many as the model's states have.

    Raises:
        ParameterError: no such method, or a budget below 1.
        LayoutError: no model with states to tune.
        RwkvLabError: of the base, the text and the training; see `train`.
    """
    unknown = next((m for m in methods if m not in METHODS), None)
    if unknown is not None:
        raise ParameterError(f"There is no method {unknown!r} to compare; there are: {', '.join(METHODS)}.")
    with open_checkpoint(base) as ck:
        layout = ck.layout
    if layout is None or layout.version == "4.0":
        raise LayoutError(f"{base} is no model with states to tune: {layout or 'no whole model'}.")
    if budget is None:
        budget = layout.n_layer * layout.n_head * layout.head_size**2
    if budget < 1:
        raise ParameterError(f"budget={budget}: at least one parameter is to be trained.")
    found = []
    with tempfile.TemporaryDirectory(prefix="rwkv_lab-") as folder:
        for method in methods:
            rank = rank_for(method, layout, budget) if method in ADAPTER_KINDS else None
            result = train(
                method,
                Path(folder) / f"{method}.safetensors",
                data,
                base,
                steps,
                batch_size,
                ctx_len,
                lr=_LRS[method],
                rank=rank,
                targets=[f"att.{name}" for name in _ATTENTION] if rank else None,
                seed=seed,
                samples=False,
            )
            found.append(
                Compared(
                    method,
                    result.trained,
                    rank,
                    _LRS[method],
                    result.bits_before,
                    result.bits_after,
                    result.losses,
                    result.seconds["training"],
                )
            )
    return found


def rank_for(method: str, layout: Layout, budget: int) -> int:
    """The rank at which an adapter in the four matrices of every time mix comes nearest to `budget` parameters."""
    shapes = expected_tensors(layout)[0]
    sizes = [shapes[f"blocks.{i}.att.{name}.weight"] for i in range(layout.n_layer) for name in _ATTENTION]
    each = sum(out if method == "miss" else out + into for out, into in sizes)  # parameters per rank
    return min(max(1, round(budget / each)), min(min(size) for size in sizes))
