"""A tuned file beside its base: what it is, which tensors of the model it changes, and from what to what."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rwkv_lab import peft
from rwkv_lab.analysis.spectra import delta
from rwkv_lab.arguments import checked
from rwkv_lab.checkpoint import Checkpoint, Layout, open_checkpoint
from rwkv_lab.checkpoint.origin import origin_of, same_weights, weights_of
from rwkv_lab.checkpoint.packed import refuse_packed
from rwkv_lab.errors import NumericsError, ParameterError
from rwkv_lab.lazy_torch import torch
from rwkv_lab.merge.adapter_set import ANY, read_adapters
from rwkv_lab.merge.families import family_of, method_of
from rwkv_lab.merge.families.into_base import check_fine_tune, check_states
from rwkv_lab.merge.input_checks import check_base, check_dtypes, refuse_same_file
from rwkv_lab.merge.inputs import open_tuned
from rwkv_lab.merge.origins import bases_of
from rwkv_lab.merge.spec import MergeSpec
from rwkv_lab.names import is_block_matrix, split_block
from rwkv_lab.patterns import is_selected, refuse_unmatched
from rwkv_lab.peft import ADAPTER_KINDS, Adapter
from rwkv_lab.peft.adapter import Target, Values
from rwkv_lab.peft.rwkv_peft_layout import NOTE
from rwkv_lab.text import counted


@dataclass(frozen=True)
class Tuning:
    """An adapter, a tuned state or a fine-tune beside its base, both open. Values are read when they are needed."""

    base: Checkpoint
    tuned: Checkpoint
    layout: Layout  # of the base
    method: str  # "state", "overlay" (a full or partial fine-tune), "lora", "pissa" or "miss"
    adapter: Adapter | None  # of the last three
    quant: str  # how the base was stored in training: "none", or another of `peft.settings.QUANTS`

    @property
    def replacements(self) -> Mapping[str, Values]:
        """Tensors that take the place of the base's, by name."""
        return self.adapter.full if self.adapter else self.tuned.info

    def names(self) -> list[str]:
        """Tensors of the model that it may change: the base's in their order, then those that the base lacks."""
        adapted = {f"{layer}.weight" for layer in self.adapter.targets} if self.adapter else set()
        return [n for n in self.base.info if n in adapted or n in self.replacements] + [
            n for n in self.replacements if n not in self.base.info
        ]

    def changed_names(self) -> list[str]:
        """Those of `names` whose values differ from the base's.

        Raises:
            ParameterError: none of them.
            NumericsError: NaN or Inf in the tuned file or in what it changes of the base.
        """
        found = [name for name in self.names() if self._is_changed(name)]
        if not found:
            raise ParameterError(
                f"{self.tuned.path} changes nothing: with it every value is what it is in the base.\n"
                "Train it first, or name another file."
            )
        return found

    def _is_changed(self, name: str) -> bool:
        before, after = self.before(name), self.after(name)
        # A PiSSA that was not trained takes away what it adds, up to float64's rounding.
        return float((after - before).abs().max()) > 1e-13 * float(before.abs().max())

    def delta(self, name: str) -> torch.Tensor:
        """What is added to a tensor of the base, float64, in the tensor's shape."""
        if self.adapter and self._target(name) is not None:
            return delta(self.base, self.adapter, name.removesuffix(".weight"))
        return self.after(name) - self.before(name)

    @property
    def state_names(self) -> list[str]:
        """The tuned initial states, one per layer; empty where the tuning has not all of them."""
        names = [f"blocks.{layer}.att.time_state" for layer in range(self.layout.n_layer)]
        return names if all(name in self.replacements for name in names) else []

    def state(self, values: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """The initial states of all layers, `[L,H,V,K]` float64.

        Args:
            values: `before` or `after`.
        """
        N = self.layout.head_size
        return torch.stack([values(name).reshape(-1, N, N) for name in self.state_names])

    def __str__(self) -> str:
        """What it is in words: "a LoRA of rank 8 on 12 matrices"."""
        if self.method == "state":
            return "a tuned state"
        if self.method == "overlay" or self.adapter is None:
            return f"a fine-tune of {'the whole' if self.tuned.kind == 'model' else 'a part of the'} model"
        ranks = sorted({target.rank for target in self.adapter.targets.values()})
        called = ADAPTER_KINDS[self.method].described
        span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        return f"{called} of rank {span} on {counted(len(self.adapter.targets), 'matrix', 'matrices')}"

    def before(self, name: str) -> torch.Tensor:
        """A tensor of the base as training had it, float64; zeros for one that the base lacks, such as time_state."""
        if name not in self.base.info:
            return torch.zeros(self.replacements[name].shape, dtype=torch.float64, device="cpu")
        weight, target = self._read(self.base.info[name]), self._target(name)
        if target is None or self.quant == "none":
            return self._stored(weight) if self.is_quantised(name) else weight
        residual = self._stored(target.residual_rows(weight))
        return target.restored_rows(target.adapted_rows(residual)) if target.has_start else residual

    def after(self, name: str) -> torch.Tensor:
        """The same tensor with the tuning, float64, shaped as the base's."""
        target = self._target(name)
        if target is None:
            tuned = self._read(self.replacements[name])
            return tuned.reshape(self.base.info[name].shape) if name in self.base.info else tuned
        for part in target.tensors.values():
            self._read(part)
        return target.adapted_rows(self._stored(target.residual_rows(self._read(self.base.info[name]))))

    def is_quantised(self, name: str) -> bool:
        """Whether training kept this tensor of the base in fewer bits."""
        packed = self.quant != "none" and name not in self.replacements
        return packed and is_block_matrix(name, self.base.info[name].shape)

    def trained_values(self, name: str) -> int:
        """How many values were trained to change this tensor."""
        target = self._target(name)
        if target is None:
            return math.prod(self.replacements[name].shape)
        return sum(math.prod(values.shape) for part, values in target.tensors.items() if "init" not in part)

    def _target(self, name: str) -> Target | None:
        return self.adapter.targets.get(name.removesuffix(".weight")) if self.adapter else None

    def _stored(self, weight: torch.Tensor) -> torch.Tensor:
        # Rounded in float32, as the layers that were trained round it.
        return weight if self.quant == "none" else peft.quantised_and_back(weight.float(), self.quant).double()

    def _read(self, values: Values) -> torch.Tensor:
        read = values.read().double()
        if not read.isfinite().all():
            name, file = getattr(values, "name", "a tensor"), self.tuned.path.name
            raise NumericsError(f"{name} holds NaN or Inf, in {file} or its base: it cannot be measured.")
        return read


@dataclass(frozen=True)
class TuningOptions:
    """What an adapter's file may not state, as `merge` takes it; nothing is needed for other tuned files."""

    alpha: float | None = None
    pissa_init: str | Path | None = None
    parameters: Mapping[str, object] = field(default_factory=dict)  # use_rslora, bat, residual_base, quant

    def __bool__(self) -> bool:
        return self.alpha is not None or self.pissa_init is not None or bool(self.parameters)


@checked
@contextmanager
def open_tuning(
    base: str | Path, tuned: str | Path, options: TuningOptions = TuningOptions(), direction_only: bool = False
) -> Iterator[Tuning]:
    """Open a base and what was tuned on it; only headers are read.

    Args:
        direction_only: the size of a LoRA's change does not matter, so that its alpha need not be known.

    Raises:
        LayoutError: no whole model, no tuning, two files that do not go together, or packed weights.
        ParameterError: one file given twice; an option that is missing, or that the file contradicts.
        CorruptFileError, UnsafeFileError: see `open_checkpoint`.
    """
    with ExitStack() as stack:
        base_ck = stack.enter_context(open_checkpoint(base))
        refuse_packed(base_ck.path, base_ck.info.values(), "Measuring a tuning")
        layout = check_base(base_ck, [])
        ck = stack.enter_context(open_checkpoint(tuned))
        refuse_packed(ck.path, ck.info.values(), "Measuring a tuning")
        refuse_same_file(base_ck, [ck])
        method, adapter, quant = _opened(stack, ck, options, direction_only)
        if adapter:
            adapter.check({n: t.shape for n, t in base_ck.info.items()}, layout)
        elif method == "state":
            check_states(ck, layout)
        else:
            check_fine_tune(base_ck, ck, layout, [])
            check_dtypes(ck)
        yield Tuning(base_ck, ck, layout, method, adapter, quant)


@checked
def check_tuning(tuned: str | Path, options: TuningOptions, direction_only: bool = False) -> None:
    """Refuse a file that is no tuning, or options that do not fit it, from its header alone.

    Raises:
        RwkvLabError: as `open_tuning`.
    """
    with ExitStack() as stack:
        _opened(stack, stack.enter_context(open_checkpoint(tuned)), options, direction_only)


def _opened(
    stack: ExitStack, ck: Checkpoint, options: TuningOptions, direction_only: bool
) -> tuple[str, Adapter | None, str]:
    """(method, the adapter if it is one, how the base was stored in training)."""
    method = method_of(ck)
    if family_of(method) is not family_of(ANY):
        if options:
            raise ParameterError(
                f"alpha, pissa_init, parameters are of adapters; {ck.path.name} is a {ck.kind}: leave them out"
            )
        return method, None, "none"
    if "unmerge" in options.parameters:
        raise ParameterError("unmerge is for merging: nothing is merged here")
    given = {"alpha": options.alpha, "pissa_init": options.pissa_init, "parameters": dict(options.parameters)}
    silent = ck.kind == "lora" and ck.adapter_config is None and NOTE not in ck.metadata
    if direction_only and silent and options.pissa_init is None and not options.parameters.get("residual_base"):
        given["alpha"] = 1.0
    # An adapter is read without its base: any path will do.
    spec = MergeSpec.read({"base": ck.path, "tuned": ck.path, "method": ANY, **given})
    adapters = read_adapters(*open_tuned(spec, stack), family_of(ANY).check(spec))
    (adapter,) = adapters.adapters
    return adapter.method, adapter, adapters.quant


@checked
def note_on_base(tuning: Tuning) -> str:
    """That a tuned file says it was trained on another base than the one beside it, in a sentence; else ""."""
    origin = origin_of(tuning.tuned)
    known = () if origin is None else (weights_of(tuning.base), *bases_of(tuning.base))
    if origin is None or any(same_weights(origin.weights, weights) for weights in known):
        return ""
    return (
        f"{tuning.tuned.path.name} was trained on {origin.base}; {tuning.base.path.name} has other weights, "
        "so that this is not what was trained."
    )


@checked
def tensor_part(name: str) -> str:
    """What a tensor is a part of, whatever its layer: "att.key", "ln", "att, the rest", "emb"."""
    if re.search(r"(^|\.)ln\w*\.(weight|bias)$", name):
        return "ln"
    inside = split_block(name)
    if inside is None:
        return name.split(".")[0]
    part, *rest = inside[1].split(".")
    if len(rest) == 2 and rest[1] == "weight" or inside[1] == "att.time_state":
        return f"{part}.{rest[0]}"
    return f"{part}, the rest"


@checked
def select_tensors(names: Sequence[str], targets: Sequence[str]) -> list[str]:
    """The names that patterns select (`rwkv_lab.patterns`); [] selects all.

    Raises:
        ParameterError: a pattern that matches none; near names are listed.
    """
    refuse_unmatched("targets", targets, names, "tensors that were tuned")
    return [n for n in names if is_selected(n, targets, None)]
