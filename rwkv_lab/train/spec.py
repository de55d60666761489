"""What `train` takes: `TrainSpec` decides the bytes of the result, `TrainOptions` how the job runs.

Descriptions are the help texts of notebooks, panels, the command line and the reference tables.
"""

import os
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from rwkv_lab.errors import ParameterError
from rwkv_lab.model.device import parse_device
from rwkv_lab.paths import path_fault
from rwkv_lab.peft.quantised import QUANTS
from rwkv_lab.spec import Number, Patterns, Spec, Text
from rwkv_lab.train.processes import PARALLEL
from rwkv_lab.train.recipe import ADAPTER_KINDS, AUTOCASTS, DTYPES, RECIPES


def _path_text(value: Any) -> Any:
    """Paths and None, as Python callers give them, as text."""
    return "" if value is None else os.fsdecode(value) if isinstance(value, os.PathLike) else value


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


PathOrEmpty = Annotated[str, BeforeValidator(_path_text), AfterValidator(_path_or_empty)]
Names = Annotated[Patterns, BeforeValidator(_list)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]


class TrainSpec(Spec):
    """What decides the result of a training. `None` stands for the kind's own value, which `resolved` fills in."""

    kind: Literal[tuple(RECIPES)] = Field(
        "state", description="pretrain, full, state, lora, pissa or miss: what is trained"
    )
    base: PathOrEmpty = Field("", description="the model to start from; empty: a fresh one, for pretrain only")
    data: Text | None = Field(None, description="english, python, or the path of a text, a folder of texts or a .jsonl")
    steps: Positive | None = Field(None, description="updates; None: the kind's own number")
    batch_size: Positive | None = Field(None, description="texts per batch; None: the kind's own")
    ctx_len: Positive | None = Field(None, description="tokens per text; None: the kind's own")
    lr: Annotated[Number, Field(gt=0)] | None = Field(
        None, description="highest learning rate; None: the kind's own, which suits the demo model"
    )
    rank: Positive | None = Field(None, description="of adapters; None: 8")
    alpha: Annotated[Number, Field(gt=0)] | None = Field(
        None, description="of a LoRA, scaled by alpha over rank; None: twice the rank"
    )
    targets: Names = Field([], description="layers to adapt, such as att.key, or patterns; empty: all of the blocks")
    train_parts: Names = Field([], description="trained beside adapters: emb, head, ln, time_state or patterns")
    quant: Literal[QUANTS] = Field("none", description="of frozen matrices: none, int8 or nf4")
    dtype: Literal[tuple(DTYPES)] = Field("float32", description="of the model: float32, float64, bfloat16")
    autocast: Literal[tuple(AUTOCASTS)] = Field(
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
        if self.kind != "pretrain" and not self.base:
            raise ParameterError(f"base is missing: kind={self.kind!r} tunes a model; pass that model as base=.")
        self._check_adapter()
        if self.quant != "none" and self.kind in ("pretrain", "full"):
            raise ParameterError(f"quant={self.quant!r} stores frozen matrices; kind={self.kind!r} freezes none.")
        check_device(self.device, self.autocast)
        if self.autocast and self.dtype != "float32":
            raise ParameterError(f"autocast computes below float32: pass dtype='float32' with it, not {self.dtype!r}.")
        steps = self.resolved_value("steps")
        if self.warmup is not None and self.warmup > steps:
            raise ParameterError(f"warmup={self.warmup} must be from 0 to the {steps} steps that there are.")
        if self.patience and not self.eval_every:
            raise ParameterError(f"patience={self.patience} counts measurements: pass eval_every= too.")
        return self

    def _check_adapter(self) -> None:
        if self.alpha is not None and self.kind != "lora":
            raise ParameterError(f"alpha={self.alpha} scales a LoRA; kind={self.kind!r} has none.")
        if self.kind in ADAPTER_KINDS:
            return
        for name in ("rank", "targets", "train_parts"):
            value = getattr(self, name)
            if value:
                raise ParameterError(
                    f"{name}={value!r} goes with the kinds {', '.join(ADAPTER_KINDS)}, not with {self.kind!r}."
                )

    def resolved_value(self, name: str) -> Any:
        """The value of one field, the kind's own where it is None."""
        value = getattr(self, name)
        return getattr(RECIPES[self.kind], name) if value is None else value

    def resolved(self) -> Self:
        """The same with the kind's own data, steps, batch_size, ctx_len, lr and rank where they are None."""
        names = ["data", "steps", "batch_size", "ctx_len", "lr", *(["rank"] if self.kind in ADAPTER_KINDS else [])]
        return self.changed(**{name: self.resolved_value(name) for name in names})


class TrainOptions(Spec):
    """How a training runs; none of it changes the result, but for the rounding of several processes."""

    checkpoint_every: Count = Field(0, description="updates between two checkpoints; 0: none")
    resume: bool = Field(False, description="go on from the checkpoint beside the output, if there is one")
    log_folder: PathOrEmpty = Field("", description="folder of log.csv and log.json; empty: no log")
    parallel: Literal[PARALLEL] = Field("ddp", description="several processes: ddp copies the model, fsdp spreads it")
    overwrite: bool = Field(False, description="replace the output if it is there")
    samples: bool = Field(True, description="let the model write a text before and after")
    on_step: Callable[[int, list[float]], object] | None = Field(
        None, description="called after every step with the number of steps done and the losses so far"
    )


def check_device(device: str, autocast: str = "") -> None:
    """Refuse a device that training does not run on, or that is not there.

    Raises:
        ParameterError: says which.
    """
    kind = parse_device(device).type
    if kind not in ("cpu", "cuda"):
        raise ParameterError(f"device={device!r}: training runs on 'cpu', 'cuda', 'cuda:1' and the like.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ParameterError(f"device={device!r}, but torch finds no CUDA device here; pass device='cpu'.")
    if autocast == "float16" and kind != "cuda":
        raise ParameterError("autocast='float16' is for CUDA devices; on a CPU pass 'bfloat16'.")
