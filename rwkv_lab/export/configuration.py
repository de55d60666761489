"""What an export takes: `ExportConfiguration`."""

import string
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, model_validator

from rwkv_lab.arguments import checked
from rwkv_lab.convert.spec import AbsolutePath, ByteCount, Line
from rwkv_lab.export.onnx_folder import Attention, Exporter
from rwkv_lab.export.profiles import PROFILES, ProfileName
from rwkv_lab.export.weight_storage import Level, PytorchFormat
from rwkv_lab.paths import path_fault
from rwkv_lab.spec import Number, Spec, Text
from rwkv_lab.suggestions import did_you_mean

_PARTS = ("model_name", "timestamp", "quantization_level", "export_id")  # what a pattern of names is made of
_EXAMPLE = dict.fromkeys(_PARTS, "x")
_SHORTEST = 32  # tokens of a text: with fewer, there would be nothing to compare


def _pattern(text: str) -> str:
    """A pattern of names of folders."""
    try:
        parts = [part for _, part, _, _ in string.Formatter().parse(text) if part is not None]
        if wrong := [part for part in parts if part not in _PARTS]:
            raise ValueError(f"it has {{{wrong[0]}}}{did_you_mean(wrong[0], _PARTS)}; there are {', '.join(_PARTS)}")
        name = text.format(**_EXAMPLE)
    except (IndexError, KeyError, AttributeError) as e:
        raise ValueError(f"it is no pattern of names: {e}") from None
    return _name(name) and text


def _name(text: str) -> str:
    """A name of a file or folder, or empty."""
    if text and (not text.isprintable() or "/" in text or text.startswith(".") or len(text.encode()) > 150):
        raise ValueError("it should be a name: without /, not hidden, of 150 bytes at most")
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("it is empty")
    return text


def _numbers(value: Any) -> Any:
    """Numbers as commands give them: texts, or one text with commas."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list):
        return value
    return [int(x) if isinstance(x, str) and x.strip().isdecimal() else x for x in parts]


def _sizes(sizes: list[int]) -> list[int]:
    """Least, optimal and largest size of an axis."""
    if len(sizes) != 3 or not 1 <= sizes[0] <= sizes[1] <= sizes[2] < 2**31:
        raise ValueError("it should be three sizes: the least, the optimal and the largest, from 1 on")
    return sizes


def _fixed_sizes(sizes: list[int]) -> list[int]:
    if len(sizes) != 3 or sizes[0] < 1 or not 1 <= sizes[1] <= sizes[2] < 2**31 or sizes[2] < _SHORTEST:
        raise ValueError(
            "it should be three sizes: rows, tokens of a call, and tokens that a text may have, "
            f"which are {_SHORTEST} or more"
        )
    return sizes


Sizes = Annotated[list[int], BeforeValidator(_numbers), AfterValidator(_sizes)]
FixedSizesList = Annotated[list[int], BeforeValidator(_numbers), AfterValidator(_fixed_sizes)]


def _a_path(text: str) -> str:
    if text and (fault := path_fault(text)):
        raise ValueError(fault)
    return text


class ExportConfiguration(Spec):
    """What is exported, how, and where it goes."""

    title: ClassVar[str] = "an export"
    GROUPS: ClassVar[dict[str, tuple[str, ...]]] = {  # of the YAML file, under `export:`
        "checkpoint": ("checkpoint_path", "checkpoint_name"),
        "base_model": ("base_model_name", "tokenizer", "alpha"),
        "optimization": (
            *("quantization_level", "remove_training_artifacts", "optimise_structure", "compress_weights"),
            *("sensitivity_scan", "size_budget", "kl_budget", "calibration_data", "calibration_samples"),
        ),
        "formats": (
            *("export_pytorch", "export_onnx", "export_tensorrt", "pytorch_format", "onnx_dynamic_axes"),
            *("onnx_fixed_sizes", "onnx_opset_version", "onnx_optimize_graph", "use_external_data_format"),
            *("onnx_exporter", "attention_implementation", "onnx_recurrence"),
            *("tensorrt_batch", "tensorrt_length"),
        ),
        "recovery": ("profile", "max_attempts", "attempt_time_limit"),
        "validation": ("run_validation_tests", "test_input_samples"),
        "output": (
            *("output_directory", "naming_pattern", "model_name", "overwrite"),
            *("enable_progress_monitoring", "log_level"),
        ),
    }

    checkpoint_path: AbsolutePath = Field(
        description="an adapter, tuned state or model: a file, or a folder of checkpoints, of which the latest is taken"
    )
    checkpoint_name: Line = Field("", description="of a folder of checkpoints: the one to take; empty: the latest")
    base_model_name: Annotated[str, AfterValidator(_a_path)] = Field(
        "", description="path of the model that an adapter or a state is of; empty: the checkpoint is a whole model"
    )
    tokenizer: str = Field("", description="world, bytes or a vocabulary file; empty: what the vocabulary size tells")
    alpha: Annotated[Number, Field(gt=0)] | None = Field(
        None, description="alpha of a LoRA whose file does not state it"
    )
    quantization_level: Level = Field(
        "none", description="how weights are stored; none: float32 in ONNX graphs; nf4 is for PyTorch alone"
    )
    remove_training_artifacts: bool = Field(
        True, description="leave out, and list, what a checkpoint has beside its model; False: refuse such a checkpoint"
    )
    optimise_structure: bool = Field(
        False, description="leave out, and list, tensors that no layer reads; ONNX graphs never have them"
    )
    compress_weights: bool = Field(
        True, description="store the PyTorch model at that level, too; False: in its own dtype"
    )
    sensitivity_scan: bool = Field(
        False, description="measure what int8 or int4 costs each part, and give parts more bits where a budget needs it"
    )
    size_budget: ByteCount | None = Field(
        None, description='of a scan: bytes of all weights of an ONNX graph, "20MB" or a number; empty: any'
    )
    kl_budget: Annotated[Number, Field(gt=0)] | None = Field(
        None, description="of a scan: KL in nats per token; empty and no size_budget: what validation allows the level"
    )
    calibration_data: Annotated[str, AfterValidator(_a_path)] = Field(
        "", description="what a scan reads: english, python, a file, a folder; empty: english, or what was trained on"
    )
    calibration_samples: Annotated[int, Field(ge=1, le=256)] = Field(
        8, description="texts of it, of 256 tokens at most"
    )
    export_pytorch: bool = Field(True, description="write the model for PyTorch")
    export_onnx: bool = Field(True, description="write the model as ONNX")
    export_tensorrt: bool = Field(
        False, description="check the graphs for TensorRT and write what builds engines; built where TensorRT is there"
    )
    pytorch_format: PytorchFormat = Field(
        "pth", description="of the model for PyTorch; gguf, of RWKV-6 and 7: int8 is Q8_0 and int4 Q4_0"
    )
    onnx_dynamic_axes: bool = Field(
        True, description="batch and length of any size; False, of Hugging Face models: onnx_fixed_sizes alone"
    )
    onnx_fixed_sizes: FixedSizesList = Field(
        [1, 16, 512], description="where sizes are fixed: rows, tokens of a call, tokens that a text may have"
    )
    onnx_opset_version: Annotated[int, Field(ge=18, le=25)] = Field(20, description="opset of the ONNX graphs")
    onnx_optimize_graph: bool = Field(True, description="fold constants, leave out nodes without use")
    use_external_data_format: bool | None = Field(
        None, description="weights of the graphs in a file of their own; empty: where there are more than 16 MiB"
    )
    onnx_exporter: Exporter = Field(
        "dynamo", description="of torch, for Hugging Face models; legacy traces by TorchScript, up to opset 23"
    )
    attention_implementation: Attention = Field(
        "eager", description="of Hugging Face models as they are traced; sdpa is one operator from opset 23 on"
    )
    onnx_recurrence: Literal["scan", "linear_attention"] = Field(
        "scan", description="of RWKV's sequence graph; linear_attention, for RWKV-5 and 6: an operator of onnxruntime"
    )
    tensorrt_batch: Sizes = Field([1, 1, 8], description="least, optimal and largest batch of engines")
    tensorrt_length: Sizes = Field([1, 128, 1024], description="the same of their length in tokens")
    profile: Literal["auto", "conservative", "balanced", "aggressive"] = Field(
        "auto", description="sets what was not given, of graphs and of recovery; auto: by size and earlier errors"
    )
    max_attempts: Annotated[int, Field(ge=1, le=20)] = Field(
        5, description="to write the ONNX graphs: after an error, with what its cause asks for; 1: no recovery"
    )
    attempt_time_limit: Annotated[Number, Field(gt=0)] = Field(3600.0, description="seconds for each of them")
    run_validation_tests: bool = Field(True, description="compare what was exported with the model")
    test_input_samples: Annotated[int, Field(ge=1, le=64)] | Annotated[list[Text], Field(min_length=1)] = Field(
        4, description="texts to compare on, or how many of the built-in English text"
    )
    output_directory: AbsolutePath = Field(
        "exports",  # pyright: ignore[reportAssignmentType]  # made a path when it is validated
        description="where the folder of the export goes",
    )
    naming_pattern: Annotated[str, AfterValidator(_not_blank), AfterValidator(_pattern)] = Field(
        "{model_name}_{timestamp}", description=f"name of that folder; parts: {', '.join(_PARTS)}"
    )
    model_name: Annotated[str, AfterValidator(_name)] = Field("", description="empty: the name of the checkpoint")
    overwrite: bool = Field(False, description="replace a folder of that name")
    enable_progress_monitoring: bool = Field(
        True, description="log every stage, and sample memory and disk; False: log warnings alone"
    )
    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR"],
        BeforeValidator(lambda v: v.upper() if isinstance(v, str) else v),
    ] = Field("INFO", description="from which level on messages go into export.log")

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def origins(self) -> dict[str, str]:
        """Where each value comes from: "default", the name of the file, of the variable, or "argument"."""
        given = {name: "argument" for name in self.model_fields_set}
        return {name: self._origins.get(name, given.get(name, "default")) for name in type(self).model_fields}

    @checked
    def with_profile(self, name: ProfileName, why: str = "") -> "ExportConfiguration":
        """The same with a profile's values where none was given; `origins` says "profile" of them.

        Args:
            why: the profile was chosen, where it was not given.

        Raises:
            ParameterError: there is no such profile.
        """
        origins = self.origins
        values = {key: value for key, value in PROFILES[name].items() if origins[key] in ("default", "profile")}
        changed = self.changed(**values, profile=name)
        changed._origins = origins | dict.fromkeys(values, "profile") | ({"profile": f"auto: {why}"} if why else {})
        return changed

    def coming_from(self, origins: Mapping[str, str]) -> "ExportConfiguration":
        """The same, whose values come from where `origins` says, by option; others from their defaults."""
        same = self.model_copy()
        same._origins = dict(origins)
        return same

    def from_where(self, words: Mapping[str, str]) -> "ExportConfiguration":
        """The same, with other words for where options come from that were given as keywords."""
        theirs = {name: words.get(name, where) for name, where in self.origins.items() if where.startswith("argument")}
        same = self.model_copy()
        same._origins = self.origins | theirs
        return same

    def described(self) -> str:
        """A line for each value: its name, the value and where it comes from."""
        return "\n".join(f"{name} = {getattr(self, name)!s}  ({where})" for name, where in self.origins.items())

    @model_validator(mode="after")
    def _possible(self) -> "ExportConfiguration":
        if self.export_tensorrt and not self.export_onnx:
            raise ValueError("export_tensorrt=True needs export_onnx=True: engines are built from those graphs")
        if self.export_tensorrt and self.onnx_recurrence != "scan":
            raise ValueError("export_tensorrt=True needs onnx_recurrence='scan': TensorRT has no LinearAttention")
        if self.export_tensorrt and self.quantization_level not in ("none", "fp16"):
            raise ValueError(
                f"export_tensorrt=True and quantization_level={self.quantization_level!r}: TensorRT has no operator "
                "for weights stored like that; take none or fp16"
            )
        if self.export_tensorrt and not self.onnx_dynamic_axes:
            raise ValueError(
                "export_tensorrt=True needs onnx_dynamic_axes=True; engines of one size: tensorrt_batch=[1, 1, 1], "
                "tensorrt_length=[128, 128, 128]"
            )
        if self.quantization_level == "nf4" and (self.export_onnx or self.pytorch_format == "gguf"):
            raise ValueError(
                "quantization_level='nf4' is for PyTorch alone: export_onnx=False, pytorch_format pth or safetensors"
            )
        self._scan_possible()
        if not (self.export_pytorch or self.export_onnx):
            raise ValueError("export_pytorch and export_onnx are both False: nothing would be written")
        return self

    def _scan_possible(self) -> None:
        of_scan = ("size_budget", "kl_budget", "calibration_data")
        if not self.sensitivity_scan:
            if given := next((name for name in of_scan if getattr(self, name)), None):
                raise ValueError(f"{given} is of sensitivity_scan=True, which is not set")
        elif self.quantization_level not in ("int8", "int4"):
            raise ValueError(f"sensitivity_scan is of int8 and int4, not of {self.quantization_level!r}")
        elif self.export_pytorch and self.pytorch_format == "gguf" and self.compress_weights:
            raise ValueError("sensitivity_scan: a GGUF file has one level; choose pytorch_format pth or safetensors")
