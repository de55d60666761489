"""What a training would do, from the headers of the base alone: what is trained, and about how much memory it takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from rwkv_lab.checkpoint import Layout, open_checkpoint
from rwkv_lab.errors import LayoutError
from rwkv_lab.model import RWKV_Dual
from rwkv_lab.peft.config import target_modules, trained_parts
from rwkv_lab.peft.inject import check_fit
from rwkv_lab.train.given import check_types
from rwkv_lab.train.recipe import ADAPTER_KINDS, DTYPES, Recipe, Tuning, choose_recipe
from rwkv_lab.train.tuned import adapter_settings, is_unused

# Numbers kept for the backward pass, per token and channel of one layer: counted in RWKV-7 with the chunked operator.
_KEPT_PER_CHANNEL = 66
_BITS = {"nf4": 4 + 32 / 64, "int8": 8}  # per value; NF4 with a float32 scale per 64


@dataclass(frozen=True)
class TrainPlan:
    """What would be trained, in numbers of values and of bytes."""

    layout: Layout
    trained: Sequence[tuple[str, tuple[int, ...], int]]  # (tensor, shape, values that are trained of or for it)
    frozen: int
    weights_bytes: int  # of the model and its adapters in memory
    gradients_bytes: int
    optimiser_bytes: int
    activations_bytes: int  # about; of one batch

    @property
    def count(self) -> int:
        return sum(values for _, _, values in self.trained)

    @property
    def memory_bytes(self) -> int:
        """About; in all."""
        return self.weights_bytes + self.gradients_bytes + self.optimiser_bytes + self.activations_bytes


def plan_training(
    kind: str,
    base: str | Path | None = None,
    batch_size: int | None = None,
    ctx_len: int | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
    train_parts: Sequence[str] = (),
    quant: str = "none",
    dtype: str = "float32",
    autocast: str = "",
    device: str = "cpu",
    gradient_checkpointing: bool = False,
) -> TrainPlan:
    """The plan of `train` with these arguments; only headers are read.

    Raises:
        ParameterError: as `train`.
        LayoutError: a base that is no whole model.
    """
    check_types(plan_training, locals())
    recipe = choose_recipe(kind, batch_size=batch_size, ctx_len=ctx_len, rank=rank)
    tuning = Tuning(kind, dtype, autocast, device, quant, recipe.rank, alpha, targets, tuple(train_parts))
    tuning.check(base)
    layout, shapes = _described(base)
    trained = _trained(tuning, layout, shapes)
    size = DTYPES[dtype].itemsize
    whole = {name for name, shape, values in trained if name in shapes and torch.Size(shape).numel() == values}
    frozen = {name: torch.Size(shape).numel() for name, shape in shapes.items() if name not in whole}
    packed = sum(n for name, n in frozen.items() if _is_matrix(name, shapes)) if quant != "none" else 0
    new = sum(values for name, _, values in trained if name not in whole)
    kept = sum(torch.Size(shapes[name]).numel() for name in whole)
    weights = (sum(frozen.values()) - packed + kept) * size + packed * _BITS.get(quant, 0) / 8
    wide = 4 if kind in (*ADAPTER_KINDS, "state") and size < 4 else size  # of what is added to the model
    gradients = kept * size + new * wide
    return TrainPlan(
        layout=layout,
        trained=trained,
        frozen=sum(frozen.values()),
        weights_bytes=round(weights + new * wide),
        gradients_bytes=gradients,
        optimiser_bytes=2 * gradients,
        activations_bytes=_activations(recipe, layout, gradient_checkpointing) * (2 if size == 2 or autocast else size),
    )


def _activations(recipe: Recipe, layout: Layout, checkpointing: bool) -> int:
    """Numbers kept for the backward pass."""
    layers = layout.n_layer * 2 + _KEPT_PER_CHANNEL if checkpointing else layout.n_layer * _KEPT_PER_CHANNEL
    return recipe.batch_size * recipe.ctx_len * (layers * layout.n_embd + 3 * layout.vocab_size)


def _described(base) -> tuple[Layout, Mapping[str, tuple[int, ...]]]:
    if not base:
        sizes = dict(n_embd=128, n_layer=3, head_size=32)
        with torch.random.fork_rng(devices=[]):
            model = RWKV_Dual(**sizes, vocab_size=257)
        return model.layout, {name: tuple(p.shape) for name, p in model.named_parameters()}
    with open_checkpoint(base) as ck:
        if ck.kind != "model" or ck.layout is None:
            raise LayoutError(f"{ck.path} is {ck.kind}, no whole model to start from: {ck.reason}")
        prefix = ck.identity.prefix
        return ck.layout, {name.removeprefix(prefix): tuple(t.shape) for name, t in ck.info.items()}


def _trained(tuning: Tuning, layout: Layout, shapes) -> list[tuple[str, tuple[int, ...], int]]:
    if tuning.kind in ("pretrain", "full"):
        return [(n, s, torch.Size(s).numel()) for n, s in shapes.items() if not is_unused(n)]
    state = (layout.n_head, layout.head_size, layout.head_size)
    states = [(f"blocks.{i}.att.time_state", state, torch.Size(state).numel()) for i in range(layout.n_layer)]
    if tuning.kind == "state":
        return states
    settings = adapter_settings(tuning)
    tree = _tree(dict(shapes) | ({n: s for n, s, _ in states} if "time_state" in tuning.train_parts else {}))
    rows = []
    for name in target_modules(tree, settings.lora_target_modules):
        out, into = shapes[f"{name}.weight"]
        check_fit(name, out, into, settings)
        rows.append((f"{name}.weight", (out, into), tuning.rank * (out if tuning.kind == "miss" else out + into)))
    besides = dict(tree.named_parameters())
    for name in trained_parts(tree, settings.train_parts):
        shape = tuple(besides[name].shape)
        rows.append((name, shape, torch.Size(shape).numel()))
    return rows


def _tree(shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """Modules with these parameters and no memory behind them, in which layers are found by name."""
    root = nn.Module()
    for name, shape in shapes.items():
        *parents, last = name.split(".")
        if _is_matrix(name, shapes):
            *parents, last = parents
        module = root
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, nn.Module())
            module = module._modules[parent]
        if _is_matrix(name, shapes):
            module.add_module(last, nn.Linear(shape[1], shape[0], bias=False, device="meta"))
        else:
            module.register_parameter(last, nn.Parameter(torch.empty(shape, device="meta")))
    return root


def _is_matrix(name: str, shapes) -> bool:
    """Whether it is the weight of a Linear layer in a block."""
    return name.startswith("blocks.") and name.endswith(".weight") and len(shapes[name]) == 2
