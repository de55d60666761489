"""What a merge takes: `MergeSpec` decides the bytes of the output, `MergeOptions` how the job runs.

`merge`'s keywords, merge.ipynb's parameters, the recipe in the provenance and the reference table in docs/ come from
these two, or are tested against them. Values are normalised: paths to `Path`, dtypes to their short names, tuples to
lists, no patterns to None. What a method makes of alpha, weights and parameters, the method checks.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from rwkv_lab.dtypes import in_long, in_short, to_dtype
from rwkv_lab.errors import ParameterError
from rwkv_lab.lazy_torch import torch
from rwkv_lab.merge.method import MERGE_METHODS
from rwkv_lab.paths import path_fault
from rwkv_lab.spec import Number, OneOf, Patterns, Spec

SVD = Path("svd")  # as pissa_init, and the only path that is not absolute: computed again from the base


def _path(value: Any) -> Path:
    if not isinstance(value, str | os.PathLike):
        raise ValueError("it should be a path")
    fault = path_fault(os.fsdecode(value))
    if fault:
        raise ValueError(fault)
    return Path(os.path.expanduser(value)).absolute()


def _paths(value: Any) -> tuple[Path, ...]:
    if value is None:
        return ()
    return tuple(_path(one) for one in value) if isinstance(value, list | tuple) else (_path(value),)


def _paths_or_none(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_paths_or_none(one) for one in value]
    return value if value is None or value == SVD else SVD if value == str(SVD) else _path(value)


def _patterns(value: Any) -> list | None:
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError("it must be a list of patterns")
    wrong = next((p for p in value if not isinstance(p, str)), None)
    if wrong is not None:
        raise ValueError(f"{wrong!r} is no pattern; a pattern is a text such as 'blocks.0.*'")
    return list(value) or None


def _setting(value: Any) -> Any:
    """A copy as JSON can hold it: the recipe is a part of the output."""
    try:
        copy = json.loads(json.dumps(value))
    except (TypeError, ValueError) as e:
        raise ValueError(f"numbers, texts, lists and mappings are needed ({e})") from None
    if isinstance(copy, float) and not math.isfinite(copy):
        raise ValueError("it should be a finite number")
    _refuse_not_finite(copy)
    return copy


def _refuse_not_finite(value: Any) -> None:
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _refuse_not_finite(one)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("every number must be finite")


def _as_given(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """A whole number stays one: it is recorded as it was given."""
    number = validate(value)
    return value if isinstance(value, int) else number


def _parameters(value: Any) -> Any:
    if value is not None and not isinstance(value, dict):
        raise ValueError("a mapping of names to values is needed")
    return _setting(value or {})


def _methods() -> list[str]:
    return ["auto", *MERGE_METHODS]


AbsolutePath = Annotated[Path, BeforeValidator(_path)]
NamePatterns = Annotated[Patterns | None, BeforeValidator(_patterns)]  # None where there are none
OutputDtype = Annotated[Literal["bf16", "fp16", "fp32"] | None, BeforeValidator(in_short)]
Setting = Annotated[Any, BeforeValidator(_setting)]  # a number, or one that differs by tensor or model: `settings`


class MergeSpec(Spec):
    """What decides the bytes of a merged checkpoint."""

    base: AbsolutePath = Field(description="the model to merge into: .pth, .safetensors or a folder")
    tuned: Annotated[tuple[AbsolutePath, ...], BeforeValidator(_paths)] = Field(
        description="a state, a fine-tune, an adapter; a list of adapters, or of models to mix"
    )
    method: Annotated[str, OneOf(_methods)] = Field(
        "auto",
        description="auto reads it off the file; or state, overlay, lora, pissa, miss; linear, slerp, … mix models",
    )
    alpha: Setting = Field(None, description="0 to 1: how far to go; of a LoRA: its alpha; of deltas: a factor")
    weights: Setting = Field(None, description="linear: base, then each tuned; where deltas are added: each tuned")
    pissa_init: Annotated[Path | list[Path | None] | None, BeforeValidator(_paths_or_none)] = Field(
        None, description="of a PiSSA adapter: the file or folder that it started from, or svd"
    )
    parameters: Annotated[dict[str, Any], BeforeValidator(_parameters)] = Field(
        {}, description="what else a method takes: density, seed, layers; of adapters bat, quant, unmerge, …"
    )
    include: NamePatterns = Field(
        None, examples=[["blocks.0.*"]], description="shell patterns of tensors that may change; empty: all"
    )
    exclude: NamePatterns = Field(
        None, examples=[["emb", "head"]], description="shell patterns of tensors that stay the base's"
    )
    dtype: OutputDtype = Field(None, description="bf16, fp16 or fp32 for every tensor; empty: each keeps its own")
    allow_extra: NamePatterns = Field(
        None,
        examples=[["blocks.*.att.extra"]],
        description="patterns of tensors that the generation does not know but may be there",
    )
    allow_nonfinite: bool = Field(False, description="record NaN, Inf and overflow in the report instead of refusing")
    precision: Annotated[Literal["float32", "float64"], BeforeValidator(in_long)] = Field(
        "float32", description="of the arithmetic: float32 or float64"
    )

    @property
    def output_dtype(self) -> torch.dtype | None:
        """The dtype of every tensor of the output; None: each keeps its own."""
        return None if self.dtype is None else to_dtype(self.dtype)

    @property
    def arithmetic(self) -> torch.dtype:
        """The dtype of the arithmetic."""
        return torch.float64 if self.precision == "float64" else torch.float32

    def recipe(self) -> dict[str, Any]:
        """Everything but the files, JSON-ready: what the provenance records, and `verify_merge` computes from."""
        return {
            "method": self.method,
            "alpha": self.alpha,
            "weights": self.weights,
            "parameters": self.parameters,
            "include": self.include,
            "exclude": self.exclude,
            "dtype": str(self.output_dtype).removeprefix("torch.") if self.dtype else None,
            "precision": self.precision,
            "allow_extra": self.allow_extra,
            "allow_nonfinite": self.allow_nonfinite,
            **({"pissa_init": svd} if (svd := self._computed_starts()) else {}),
        }

    def _computed_starts(self) -> str | list[str | None] | None:
        """ "svd" where starts are computed from the base, a list where only some are; None where none is."""
        starts = self.pissa_init
        if isinstance(starts, list):
            return ["svd" if start == SVD else None for start in starts] if SVD in starts else None
        return "svd" if starts == SVD else None


class ExtractSpec(Spec):
    """What decides the bytes of an extracted LoRA."""

    base: AbsolutePath = Field(description="the model that was tuned: .pth, .safetensors or a folder")
    tuned: AbsolutePath = Field(description="the fine-tune, full or partial")
    rank: Annotated[int, Field(ge=1)] | None = Field(None, description="of every pair; or energy")
    energy: Annotated[Number, Field(gt=0, le=1), WrapValidator(_as_given)] | None = Field(
        None, description="share of each delta's squared norm to keep; every matrix gets the rank that it needs"
    )
    targets: NamePatterns = Field(None, description="patterns of the matrices to decompose; empty: all of the layers")
    dtype: OutputDtype = Field(None, description="bf16, fp16 or fp32 of the pairs; empty: that of the tuned matrix")
    seed: int = Field(0, description="of the randomised decomposition")

    @model_validator(mode="after")
    def _check_amount(self) -> Self:
        if (self.rank is None) == (self.energy is None):
            raise ParameterError("pass rank or energy, one of them: how much of the deltas the adapter keeps")
        return self

    @property
    def output_dtype(self) -> torch.dtype | None:
        """The dtype of the pairs; None: that of the tuned matrix."""
        return None if self.dtype is None else to_dtype(self.dtype)

    def recipe(self, alpha: float) -> dict[str, Any]:
        """What the provenance records; alpha is that of the adapter."""
        return {
            "rank": self.rank,
            "energy": self.energy,
            "alpha": float(alpha),
            "dtype": str(self.output_dtype or ""),
            "seed": self.seed,
            "targets": self.targets,
        }


class MergeOptions(Spec):
    """How a merge runs. None of it changes a tensor of the output; `hash` is seen in the fingerprints beside them."""

    scan: Literal["all", "changed"] = Field("all", description="where to look for NaN and Inf: all or changed")
    allowed_dir: AbsolutePath | None = Field(None, description="the only folder that the output may go to; empty: any")
    overwrite: bool = Field(False, description="replace the output if it is there; never an input")
    allow_other_base: bool = Field(
        False, description="merge adapters and states that say they were trained on another base"
    )
    dry_run: bool = Field(False, description="stop after the plan")
    hash: Literal["records", "sha256"] = Field("records", description="records: free; sha256: reads the inputs whole")
