"""What a conversion takes: `ConvertSpec` decides the bytes of the output, `ConvertOptions` how the job runs."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from rwkv_lab.checkpoint.foreign_format import ForeignFormat
from rwkv_lab.checkpoint.generation import GENERATIONS
from rwkv_lab.convert.targets import target_names
from rwkv_lab.dtypes import in_short, to_dtype
from rwkv_lab.errors import ParameterError
from rwkv_lab.lazy_torch import torch
from rwkv_lab.paths import path_fault
from rwkv_lab.spec import Number, OneOf, Spec

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
QUANTISED = ("Q8_0", "Q4_0")  # what GGUF files can be written in beside floats
SIZES = {  # name -> (layers, channels) of the models that are called so
    "169M": [(12, 768)],
    "430M": [(24, 1024)],
    "1B5": [(24, 2048)],
    "3B": [(32, 2560)],
    "7B": [(32, 4096)],
    "14B": [(40, 5120)],
    "0.1B": [(12, 768)],
    "0.4B": [(24, 1024)],
    "1.5B": [(24, 2048)],
    "1B6": [(24, 2048)],
    "1.6B": [(24, 2048)],
    "2.9B": [(32, 2560)],
    "7.2B": [(32, 4096)],
    "7B6": [(32, 4096)],
    "13.3B": [(61, 4096)],
}


_HUB_ADDRESS = re.compile(  # what people copy from the site, or write for other programs
    r"(?:hf://(?:models/)?|https?://(?:www\.)?(?:huggingface\.co|hf\.co)/)([\w.-]+/[\w.-]+)"
    r"(?:/(?:resolve|blob|tree)/([^/?#]+))?(?:/([^?#]*))?"
)


def _path(value: Any) -> Path:
    if not isinstance(value, str | os.PathLike):
        raise ValueError("it should be a path")
    if isinstance(value, str) and (found := _HUB_ADDRESS.match(value)):
        raise ValueError(f"it is an address of the Hugging Face Hub: leave it out and give {_on_the_hub(found)}")
    fault = path_fault(os.fsdecode(value))
    if fault:
        raise ValueError(fault)
    return Path(os.path.expanduser(value)).absolute()


def _path_text(value: Any) -> Any:
    """The same as text, and None as an empty one."""
    if isinstance(value, os.PathLike | str):
        return os.path.expanduser(os.fsdecode(value))
    return "" if value is None else value


def _on_the_hub(address: re.Match[str]) -> str:
    """The options that stand for an address."""
    given = {"repo_id": address[1], "file": address[3], "revision": address[2] if address[2] != "main" else ""}
    return ", ".join(f"{name}={value!r}" for name, value in given.items() if value)


def _repository(text: str) -> str:
    """A name of a repository, or empty."""
    if found := _HUB_ADDRESS.match(text):
        file = f"; the file's is {found[3]!r}" if found[3] else ""
        raise ValueError(f"it is an address: the name of the repository alone is {found[1]!r}{file}")
    if text and not re.fullmatch(r"(?:[\w.-]+/)?[\w.-]+", text):
        raise ValueError("it should be owner/name, as the Hugging Face Hub has it; a file in it goes by itself")
    return text


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("it should be one line of printable characters")
    return text


def _bytes(value: Any) -> Any:
    """A number of bytes from "2GB" or "500 MB"; powers of ten, as in transformers; KiB, MiB, GiB are powers of two."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value)
    if not found or found[2].upper() not in _UNITS:
        raise ValueError('it should be a size such as "2GB" or "500MB"')
    return int(float(found[1]) * _UNITS[found[2].upper()])


def _dtype(value: Any) -> Any:
    """Its short name, in any spelling."""
    if isinstance(value, str) and value.strip().upper() in QUANTISED:
        return value.strip().upper()
    return in_short(value)


AbsolutePath = Annotated[Path, BeforeValidator(_path)]
RepositoryName = Annotated[str, AfterValidator(_repository)]
Line = Annotated[str, AfterValidator(_one_line)]
ByteCount = Annotated[int, BeforeValidator(_bytes), Field(ge=1)]


_SOURCE = ("source", "repo_id", "file", "revision")


class ConvertSpec(Spec):
    """What decides the bytes of a converted checkpoint."""

    source: AbsolutePath | None = Field(
        None, description="a model, adapter or state: file or folder, of any format that is read; empty: repo_id"
    )
    repo_id: RepositoryName = Field("", description="instead of source: owner/name of a model on the Hugging Face Hub")
    file: Line = Field(
        "", description="of repo_id: the file or folder in it; empty: the repository itself, or its only checkpoint"
    )
    revision: Line = Field("", description="of repo_id: a branch, tag or commit; empty: the main branch")
    to: Annotated[str, OneOf(target_names)] = Field(description="the format to write")
    dtype: Annotated[Literal["bf16", "fp16", "fp32", "Q8_0", "Q4_0"] | None, BeforeValidator(_dtype)] = Field(
        None, description="bf16, fp16 or fp32 for every tensor, Q8_0 or Q4_0 of gguf; empty: each keeps its own"
    )
    max_shard_size: ByteCount = Field(
        5 * 10**9, description='of a folder: tensor data per file, "2GB", "500MB" or a number of bytes'
    )
    tokenizer: Annotated[str, BeforeValidator(_path_text)] = Field(
        "", description="world, bytes or a vocabulary file; empty: what the vocabulary size tells"
    )
    size: Annotated[str, OneOf(lambda: ["", *SIZES])] = Field(
        "", description="what the model is called, 0.4B; it is checked against the weights; empty: nothing is checked"
    )
    alpha: Annotated[Number, Field(gt=0)] | None = Field(None, description="of a LoRA whose file does not state it")
    generation: Annotated[str, OneOf(lambda: ["", *GENERATIONS])] = Field(
        "",
        description="of an adapter whose layers several have: 7.0; of a model it is checked; empty: its layers tell",
    )
    rescale: Annotated[int, Field(ge=0)] = Field(
        0,
        description="halve att.output and ffn.value after every so many layers, for consumers that expect it; 0: never",
    )
    allow_nonfinite: bool = Field(False, description="record NaN, Inf and overflow instead of refusing them")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.source is None and not self.repo_id:
            raise ValueError("source is missing: a file or folder on this disk; or repo_id, a model on the Hub")
        if self.source is not None and self.repo_id:
            raise ValueError(f"source={str(self.source)!r} and repo_id={self.repo_id!r}: give one of them")
        if not self.repo_id and (self.file or self.revision):
            raise ValueError("file and revision are of a repository: give repo_id, owner/name on the Hub, too")
        return self

    @property
    def quantised(self) -> str:
        """The type of blocks that matrices are quantised to; "" where they are not."""
        return self.dtype if self.dtype in QUANTISED else ""

    @property
    def output_dtype(self) -> torch.dtype | None:
        """The dtype of every tensor of the output that is not quantised; None: each keeps its own."""
        return None if self.dtype is None else to_dtype("fp16" if self.quantised else self.dtype)

    def recipe(self) -> dict[str, Any]:
        """Everything but the source, JSON-ready: what the provenance records."""
        return {name: getattr(self, name) for name in type(self).model_fields if name not in _SOURCE}


def with_dtype(spec: ConvertSpec, known: ForeignFormat) -> ConvertSpec:
    """The spec with the dtype that readers of the format take, where they take one only.

    Raises:
        ParameterError: another was asked for.
    """
    if known.dtype is None:
        return spec
    name = in_short(known.dtype)
    if spec.dtype not in (None, name):
        raise ParameterError(f"dtype={spec.dtype!r}: the readers of {spec.to} take {name} only.")
    return spec.changed(dtype=name)


class ConvertOptions(Spec):
    """How a conversion runs. None of it changes a tensor of the output."""

    allowed_dir: AbsolutePath | None = Field(None, description="the only folder that the output may go to; empty: any")
    overwrite: bool = Field(False, description="replace the output if it is there; never an input")
    dry_run: bool = Field(False, description="stop after the plan")
    verify: bool = Field(True, description="open the output again and compare every tensor with its source")
    push_to_hub: bool = Field(False, description="upload the output to the Hugging Face Hub once it has been verified")
    model_name: RepositoryName = Field(
        "", description="of push_to_hub: owner/name there; without an owner: your own account"
    )
    private: bool = Field(True, description="of push_to_hub: whether a repository that is made is private")
    licence: Line = Field(
        "", description="of push_to_hub: for the model card, as the Hub calls it: apache-2.0; empty: it states none"
    )

    @model_validator(mode="after")
    def _push(self) -> Self:
        if self.push_to_hub and not self.model_name:
            raise ValueError("push_to_hub=True needs model_name, owner/name of the repository")
        if self.model_name and not self.push_to_hub:
            raise ValueError(f"model_name={self.model_name!r} is where push_to_hub=True uploads to; it is not set")
        idle = "licence" if self.licence else "" if self.private else "private"
        if idle and not self.push_to_hub:
            value = getattr(self, idle)
            raise ValueError(f"{idle}={value!r} is of what push_to_hub=True uploads; it is not set")
        if self.push_to_hub and not self.verify:
            raise ValueError("push_to_hub=True with verify=False: only what has been verified is uploaded")
        return self
