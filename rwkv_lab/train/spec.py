"""What `train` takes: `TrainSpec` decides the bytes of the result, `TrainOptions` how the job runs; kinds of training.

Descriptions are the help texts of notebooks, panels, the command line and the reference tables. A kind of training is
one object (`Kind`), registered by its module in `rwkv_lab.train.kinds`; nothing else knows the kinds by name.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from rwkv_lab import model as models
from rwkv_lab.checkpoint import Layout
from rwkv_lab.checks import Check
from rwkv_lab.dtypes import in_long, to_dtype
from rwkv_lab.errors import ParameterError
from rwkv_lab.lazy_torch import torch
from rwkv_lab.model.device import parse_device
from rwkv_lab.paths import path_fault
from rwkv_lab.peft.settings import QUANTS
from rwkv_lab.spec import Number, OneOf, Patterns, Spec, Text
from rwkv_lab.text import counted
from rwkv_lab.train.presets import preset_names, preset_settings

Planned = tuple[str, tuple[int, ...], int]  # tensor, shape, values that are trained of or for it


@dataclass(frozen=True)
class Defaults:
    """What a kind of training takes where nothing else is given. The numbers suit the demo model and one to two minutes
    on two CPU cores.

    final_lr: the share of the highest learning rate that the last step has.
    weight_decay: of large matrices.
    """

    data: str
    steps: int
    batch_size: int
    ctx_len: int
    lr: float
    final_lr: float
    weight_decay: float = 0.0
    rank: int = 8


class Kind(ABC):
    """One kind of training.

    Attributes:
        takes: the options that only some kinds have, and this one does.
        needs_base: whether it starts from a model that is there.
        may_be_folder: whether its output may be a folder.
        output_kind: what `open_checkpoint` finds in its output.
        compared_lr: learning rate in `compare_methods`; None where it takes no part.
    """

    name: str
    defaults: Defaults
    takes: frozenset[str] = frozenset()
    needs_base: bool = True
    may_be_folder: bool = False
    output_kind: str
    compared_lr: float | None = None

    @abstractmethod
    def make_model(self, spec: TrainSpec) -> models.RWKV_Dual:
        """The model to train, with all frozen that is not trained. New values are drawn from torch's generator.

        Raises:
            ParameterError, NumericsError: of adapters and quantisation.
            LayoutError, CorruptFileError, UnsafeFileError, DeviceError: of the base.
        """

    @abstractmethod
    def planned(self, spec: TrainSpec, layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> list[Planned]:
        """What would be trained, from the shapes of the base's tensors.

        Raises:
            ParameterError: as `make_model`.
        """

    @abstractmethod
    def save(self, model: models.RWKV_Dual, out: Path, note: Mapping[str, str], overwrite: bool) -> None:
        """Write what was trained. `note` travels in the file, where it has no note of its own.

        Raises:
            OutputError: `out` exists (unless `overwrite`) or cannot be written.
        """

    @abstractmethod
    def open(self, spec: TrainSpec, out: Path) -> models.RWKV_Dual:
        """The model that training ended with, from the files alone.

        Raises:
            RwkvLabError: of the files.
        """

    def check_savable(self, model: models.RWKV_Dual, out: Path) -> None:  # noqa: B027  # most kinds have nothing to refuse
        """Refuse, before the first step, what `save` would refuse after the last.

        Raises:
            ParameterError: an output that cannot hold what is trained.
        """

    def output_checks(self, names: Sequence[str]) -> list[Check]:
        """What `verify_training` checks in an output of this kind beside what it checks in all.

        Args:
            names: of the tensors in the output.
        """
        return []

    def started(self, spec: TrainSpec) -> TrainSpec:
        """The spec with what the file `spec.start` states: rank, alpha, targets, …

        Raises:
            ParameterError: the spec states otherwise, or the file is of another kind.
            RwkvLabError: of the file.
        """
        return spec

    def mark_trained(self, model: models.RWKV_Dual) -> None:
        """Freeze all of an opened output (`open`) but what is trained, to train it further.

        Raises:
            ParameterError: it cannot be trained further.
        """
        raise ParameterError(f"What kind={self.name!r} wrote cannot be trained further.")

    def recorded(self, model: models.RWKV_Dual) -> dict[str, str]:
        """What decides the result beside the spec, before the first step: has to be the same to resume."""
        return {}


KINDS: dict[str, Kind] = {}  # by name, filled by the modules of `rwkv_lab.train.kinds`
OF_FRESH_MODELS = ("n_embd", "n_layer", "head_size")
OF_SOME_KINDS = ("start", "rank", "alpha", "targets", "train_parts", "quant")


def register(kind: Kind) -> None:
    """Make a kind of training known.

    Raises:
        ParameterError: there is one of that name, or it takes options that all kinds have.
    """
    if kind.name in KINDS:
        raise ParameterError(f"There is a kind of training named {kind.name!r} already.")
    if not kind.takes <= set(OF_SOME_KINDS):
        raise ParameterError(f"{kind.name} takes {sorted(kind.takes)}; the options of some kinds are {OF_SOME_KINDS}.")
    KINDS[kind.name] = kind


def _path_given(value: Any) -> Any:
    """Paths, as Python callers give them, as text."""
    return os.fsdecode(value) if isinstance(value, os.PathLike) else value


def _path_text(value: Any) -> Any:
    """The same, and None as an empty text."""
    return "" if value is None else _path_given(value)


def _path_or_empty(text: str) -> str:
    fault = path_fault(text) if text else ""
    if fault:
        raise ValueError(fault)
    return text


def _list(value: Any) -> Any:
    """Tuples and None, as Python callers give them, as lists."""
    return [] if value is None else list(value) if isinstance(value, tuple) else value


def _one(value: Any) -> Any:
    return 1 if value is None else value


def _whole_if_given(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """A whole number stays one: files record the settings as they were given."""
    number = validate(value)
    return value if isinstance(value, int) else number


PathOrEmpty = Annotated[str, BeforeValidator(_path_text), AfterValidator(_path_or_empty)]
Names = Annotated[Patterns, BeforeValidator(_list)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[Number, Field(gt=0), WrapValidator(_whole_if_given)]


class TrainSpec(Spec):
    """What decides the result of a training. `None` stands for the kind's own value, which `resolved` fills in."""

    title: ClassVar[str] = "train"

    kind: Annotated[str, OneOf(lambda: KINDS)] = Field(
        "state", description="pretrain, full, state, lora, pissa or miss: what is trained"
    )
    base: PathOrEmpty = Field("", description="the model to start from; empty: a fresh one, for pretrain only")
    start: PathOrEmpty = Field("", description="an adapter or a tuned state of that base, to train further")
    data: Annotated[Text | None, BeforeValidator(_path_given)] = Field(
        None, description="english, python, or the path of texts, records or tokens, or of a folder"
    )
    preset: Annotated[str, OneOf(preset_names)] = Field(
        "",
        description="sets what is not given by the model's size: auto, 0.1B, 0.4B, 1.5B, 2.9B, 7B; "
        "empty: the kind's own",
    )
    tokenizer: PathOrEmpty = Field(
        "", description="world, bytes, or the path of a vocabulary or tokenizer.json; empty: by the vocabulary's size"
    )
    template: Annotated[Text, BeforeValidator(_path_text)] = Field(
        "world", description="of conversations: world, or the path of a JSON file with one"
    )
    ignore: Names = Field(
        [], examples=[["id", "source"]], description="fields of records that are not trained on, or patterns of them"
    )
    long: Literal["split", "cut", "drop", "error"] | None = Field(
        None,
        description="examples longer than ctx_len: split, cut, drop or error; None or empty: cut, texts are split",
    )
    steps: Positive | None = Field(None, description="updates; None: the kind's own number")
    batch_size: Positive | None = Field(None, description="texts per batch; None: the kind's own")
    ctx_len: Positive | None = Field(None, description="tokens per text; None: the kind's own")
    lr: Rate | None = Field(None, description="highest learning rate; None: the kind's own, which suits the demo model")
    rank: Positive | None = Field(None, description="of adapters; None: 8")
    alpha: Rate | None = Field(None, description="of a LoRA, scaled by alpha over rank; None: twice the rank")
    targets: Names = Field(
        [],
        examples=[["att.key", "ffn.key"]],
        description="layers to adapt, such as att.key, or patterns; empty: all of the blocks",
    )
    train_parts: Names = Field(
        [], examples=[["emb", "head"]], description="trained beside adapters: emb, head, ln, time_state or patterns"
    )
    quant: Annotated[str, OneOf(lambda: QUANTS)] = Field(
        "none", description="of frozen matrices: none, int8, nf4, fp4 or bnb-int8"
    )
    dtype: Annotated[Literal["float32", "float64", "bfloat16"], BeforeValidator(in_long)] = Field(
        "float32", description="of the model: float32, float64, bfloat16"
    )
    autocast: Annotated[Literal["", "bfloat16", "float16"], BeforeValidator(in_long)] = Field(
        "", description="compute in bfloat16, or on CUDA float16; empty: in dtype"
    )
    device: Text = Field("cpu", description="cpu or cuda")
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = Field(0, description="the same seed gives the same file")
    accumulate: Annotated[Positive, BeforeValidator(_one)] = Field(1, description="batches per update")
    warmup: Count | None = Field(None, description="updates until the rate is highest; None: a twentieth")
    gradient_checkpointing: bool = Field(False, description="less memory, about a third more time")
    eval_every: Count = Field(0, description="updates between two measurements; 0: none")
    patience: Count = Field(0, description="measurements without a new best before it stops; 0: never stops")
    n_embd: Positive = Field(128, description="channels of a fresh model")
    n_layer: Positive = Field(3, description="layers of a fresh model")
    head_size: Positive = Field(32, description="channels per head of a fresh model")

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Refuse what does not go together, and devices that are not there."""
        kind = KINDS[self.kind]
        if kind.needs_base and not self.base:
            raise ParameterError(f"base is missing: kind={self.kind!r} tunes a model; pass that model as base=.")
        for name in OF_SOME_KINDS:
            if name not in kind.takes and getattr(self, name) not in (None, [], "none", ""):
                takers = ", ".join(k.name for k in KINDS.values() if name in k.takes)
                raise ParameterError(
                    f"{name}={getattr(self, name)!r} goes with {takers}; kind={self.kind!r} takes no {name}."
                )
        fresh = next((n for n in OF_FRESH_MODELS if getattr(self, n) != type(self).model_fields[n].default), None)
        if self.base and fresh:
            raise ParameterError(
                f"{fresh}={getattr(self, fresh)} is of a fresh model, and {self.base} has its own: leave it out, "
                "or pass kind='pretrain' and base=''."
            )
        check_device(self.device, self.autocast)
        if self.autocast and self.dtype != "float32":
            raise ParameterError(f"autocast computes below float32: pass dtype='float32' with it, not {self.dtype!r}.")
        steps = self.steps if self.preset else self.effective("steps")  # a preset may need the header of the base
        if self.warmup is not None and steps is not None and self.warmup > steps:
            raise ParameterError(f"warmup={self.warmup} must be from 0 to the {counted(steps, 'step')} that there are.")
        if self.patience and not self.eval_every:
            raise ParameterError(f"patience={self.patience} counts measurements: pass eval_every= too.")
        return self

    @classmethod
    def applies(cls, name: str, kind: str) -> bool:
        """Whether the option means anything for that kind of training."""
        return name not in OF_SOME_KINDS or name in KINDS[kind].takes

    def effective(self, name: str) -> Any:
        """The value of an option; where it is None that of the preset, or the kind's own.

        Raises:
            RwkvLabError: of the base, whose size the preset "auto" looks at.
        """
        value = getattr(self, name)
        if value is not None:
            return value
        return self.preset_settings()[1].get(name, getattr(KINDS[self.kind].defaults, name))

    def preset_settings(self) -> tuple[str, Mapping[str, float]]:
        """(size, what its preset sets where nothing is given); see `rwkv_lab.train.presets`.

        Raises:
            RwkvLabError: as `effective`.
        """
        return preset_settings(self.model_dump(), takes_rank="rank" in KINDS[self.kind].takes)

    def resolved(self) -> ResolvedSpec:
        """The same with the kind's own values where they are None, rank only where the kind has one."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        names = [n for n in ("data", "steps", "batch_size", "ctx_len", "lr", "rank") if self.applies(n, self.kind)]
        return ResolvedSpec.read(values | {name: self.effective(name) for name in names} | {"preset": ""})

    @property
    def warmup_steps(self) -> int:
        return max(1, round(0.05 * self.effective("steps"))) if self.warmup is None else self.warmup

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the model."""
        return to_dtype(self.dtype)

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """What is computed in; None for the model's dtype."""
        return to_dtype(self.autocast) if self.autocast else None


class ResolvedSpec(TrainSpec):
    """A spec in which nothing is left to the kind; `TrainSpec.resolved` makes it."""

    data: Text
    steps: Positive
    batch_size: Positive
    ctx_len: Positive
    lr: Rate


class TrainOptions(Spec):
    """How a training runs; none of it changes the result, but for the rounding of several processes."""

    title: ClassVar[str] = "train"

    checkpoint_every: Count = Field(0, description="updates between two checkpoints; 0: none")
    resume: bool = Field(False, description="continue from the checkpoint beside the output, if there is one")
    log_folder: PathOrEmpty = Field("", description="folder of log.csv and log.json; empty: no log")
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="several processes: ddp copies the model, fsdp spreads it"
    )
    overwrite: bool = Field(False, description="replace the output if it is there")
    allow_other_base: bool = Field(False, description="train a start that says it was trained on another base")
    samples: bool = Field(True, description="let the model write a text before and after")
    on_step: Callable[[int, list[float]], object] | None = Field(
        None, description="called after every step with the number of steps done and the losses so far"
    )


def check_device(device: str, autocast: str = "") -> None:
    """Refuse a device that training does not run on, or that is not there.

    Raises:
        ParameterError: names it.
    """
    if device == "cpu" and autocast != "float16":
        return  # it is there, which is known without torch
    kind = parse_device(device).type
    if kind not in ("cpu", "cuda"):
        raise ParameterError(f"device={device!r}: training runs on 'cpu', 'cuda', 'cuda:1' and the like.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ParameterError(f"device={device!r}, but torch finds no CUDA device here; pass device='cpu'.")
    if autocast == "float16" and kind != "cuda":
        raise ParameterError("autocast='float16' is for CUDA devices; on a CPU pass 'bfloat16'.")
