"""What an error of an export means: its text -> its cause -> the one change of settings that can help.

Settings are values by name, such as `{"onnx_opset_version": 23}`. Those that are options of `ExportConfiguration` have
their names; the others are of the code that writes a model (`SETTINGS`). A change is tried only where that code has the
setting, and where its value is another.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rwkv_lab.errors import DeviceError, ONNXExportError, RwkvLabError, TracerWarningError, UnorderedMapError

Settings = dict[str, Any]

# What a writer of ONNX may do in more than one way.
SETTINGS = (
    *("onnx_exporter", "attention_implementation", "onnx_optimize_graph", "onnx_opset_version", "onnx_dynamic_axes"),
    *("use_external_data_format", "device", "example_length", "cache_as_tensors", "example_dtype"),
)
# What a result lacks that was made with a value that was not asked for; other values lose nothing.
LOSSES: dict[tuple[str, Any], str] = {
    ("onnx_exporter", "legacy"): "written by torch's old exporter, which takes the branches that its example took",
    ("onnx_optimize_graph", False): "the graph is not optimised",
    ("onnx_dynamic_axes", False): "takes only the batch and length that it was traced at",
}


@dataclass(frozen=True)
class Failure:
    """One known failure.

    text: a regular expression in the text of the error.
    fix: the settings that can help; empty where none can.
    advice: what a person can do where the fix is not possible.
    error: what is raised then.
    when: settings that it occurs with; others have other causes for the same text.
    """

    name: str
    text: str
    cause: str
    fix: Settings
    advice: str
    error: type[RwkvLabError] = ONNXExportError
    when: Settings = field(default_factory=dict)


_OLD: Settings = {"onnx_exporter": "legacy"}
_NEW: Settings = {"onnx_exporter": "dynamo"}
_FIXED = r"(is fixed at|speciali[sz]ed (it )?to|inferred a static shape|ConstraintViolationError)"

# The first one whose text and settings fit counts.
FAILURES: tuple[Failure, ...] = (
    Failure(
        "TorchScript and what it cannot trace",
        r"unordered_map",
        "torch's old exporter cannot trace gradient checkpointing, nor torch.vmap in attention masks",
        _NEW,
        "Turn gradient checkpointing off, and give the attention mask as a tensor of four dimensions.",
        UnorderedMapError,
    ),
    Failure(
        "branch on a value",
        r"GuardOnDataDependent|data-dependent expression|Could not guard on data-dependent",
        "the model's code branches on a value that is known only when it runs",
        {},
        "Rewrite the branch by torch.where or torch.cond; the old exporter would silently write one of the branches.",
        TracerWarningError,
    ),
    Failure(
        "example of one token",
        rf"must be bool, not SymBool|invalid expand shape|{_FIXED}",
        "torch takes a size of 1 in the example for a constant",
        {"example_length": 2},
        "Trace with two tokens or more.",
        TracerWarningError,
        {"example_length": 1},
    ),
    Failure(
        "unrolled by the old exporter",
        _FIXED,
        "torch's old exporter wrote a size of its example into the graph",
        _NEW,
        "Export with the exporter that torch has by default.",
        TracerWarningError,
        _OLD,
    ),
    Failure(
        "size fixed by the model's code",
        rf"{_FIXED}|'SymInt' object has no attribute",
        "the model's code, or torch's translation of it, works at one size alone",
        {"onnx_dynamic_axes": False},
        "Ask for fixed sizes by onnx_dynamic_axes=False, or change the loop that depends on the size.",
        TracerWarningError,
    ),
    Failure(
        "cache as an object",
        r"Cannot associate shape|DynamicCache|Constant tensor lifted_tensor|treespec",
        "torch.export does not know the class of the cache",
        {"cache_as_tensors": True},
        "Take and return the cache as tensors.",
    ),
    Failure(
        "bfloat16",
        r"(?i)NOT_IMPLEMENTED|Could not find an implementation|bfloat16",
        "onnxruntime has no bfloat16 arithmetic on processors",
        {"example_dtype": "float32"},
        "Export in float32, and convert the weights to float16 afterwards.",
        when={"example_dtype": "bfloat16"},
    ),
    Failure(
        "RotaryEmbedding of opset 23",
        r"cos_cache\W+and\W+sin_cache\W+are expected",
        "for opset 23 torch writes a rotary embedding that works for a batch of 1 alone",
        {"onnx_opset_version": 22},
        "Ask for opset 22 or 24.",
    ),
    Failure(
        "another opset written",
        r"is of opset \d+, not \d+|No Op registered for|is not a registered function/op|[Vv]ersion conversion failed",
        "torch and onnx cannot write this model at the opset that was asked for",
        {"onnx_opset_version": 20},
        "Ask for opset 20, which torch writes without conversion.",
    ),
    Failure(
        "opset of the old exporter",
        r"Unsupported onnx_opset_version",
        "torch's old exporter writes opsets up to 23",
        {"onnx_opset_version": 20},
        "Ask for opset 18 to 23, or for the exporter that torch has by default.",
        when=_OLD,
    ),
    Failure(
        "operator of the old exporter",
        r"Exporting the operator .* is not supported",
        "torch's old exporter has no translation of an operator",
        _NEW,
        "Replace the operator in the model's code.",
        when=_OLD,
    ),
    Failure(
        "operator without a translation",
        r"No ONNX function found for|No decompositions? registered|Exporting the operator .* is not supported",
        "ONNX has no translation of an operator",
        {},
        "Replace the operator in the model's code, or register a translation of it.",
    ),
    Failure(
        "more than 2 GB in one file",
        r"(?i)exceed\w* (the )?maximum protobuf size|larger than 2 ?Gi?B|Failed to seriali[sz]e proto|2 ?GiB limit",
        "protobuf holds at most 2 GB, and the weights are more",
        {"use_external_data_format": True},
        "Leave use_external_data_format empty, or set it True.",
    ),
    Failure(
        "GPU",
        r"CUDA out of memory|CUDA error|no kernel image is available|NVIDIA driver",
        "the GPU has too little memory, or does not run this torch",
        {"device": "cpu"},
        "Export on the CPU.",
        DeviceError,
    ),
    Failure(
        "memory of the old exporter",
        r"MemoryError|not enough memory|killed by signal 9",
        "memory ran out; torch's old exporter copies the weights",
        _NEW,
        "Export with the exporter that torch has by default.",
        DeviceError,
        _OLD,
    ),
    Failure(
        "memory",
        r"MemoryError|not enough memory|killed by signal 9",
        "memory ran out, or the process was killed from outside",
        {},
        "End other programs, or export on a machine with more memory.",
        DeviceError,
    ),
    Failure(
        "package that is missing",
        r"ModuleNotFoundError|No module named",
        "a package is not installed",
        {},
        "Install it: pip install 'rwkv_lab[export]'.",
    ),
)


@dataclass(frozen=True)
class Rung:
    """A change that is tried where the cause is not known, and the stages of an export whose failures it can change."""

    change: Settings
    stages: frozenset[str]


def _stages(text: str) -> frozenset[str]:
    return frozenset(text.split())


# From what loses nothing to what loses most. A failure of an unknown stage may be any of them.
LADDER: tuple[Rung, ...] = (
    Rung({"attention_implementation": "eager"}, _stages("capture translate open unknown")),
    Rung({"attention_implementation": "sdpa"}, _stages("capture translate open unknown")),
    Rung({"onnx_exporter": "dynamo"}, _stages("capture translate open unknown")),
    Rung({"use_external_data_format": True}, _stages("write open unknown")),
    Rung({"device": "cpu"}, _stages("capture translate unknown")),
    Rung({"onnx_optimize_graph": False}, _stages("optimise open unknown")),
    Rung({"onnx_opset_version": 20}, _stages("translate open unknown")),
    Rung({"onnx_opset_version": 18}, _stages("translate open unknown")),
    Rung({"onnx_exporter": "legacy"}, _stages("capture translate unknown")),
    Rung({"onnx_dynamic_axes": False}, _stages("capture translate open unknown")),
)

_STAGES = (  # how the text of an error shows the stage that it came from; the first one counts
    ("open", r"onnxruntime does not open|onnxruntime does not run|no valid ONNX file|ONNXRuntimeError"),
    ("translate", r"step [23]/3|ConversionError|UnsupportedOperatorError"),
    ("capture", r"step 1/3|TorchExportError|torch\._dynamo|torch\.export"),
    ("optimise", r"onnxscript.*optimi[sz]|optimi[sz]er"),
    ("write", r"protobuf|[Ss]erializ"),
)


def diagnose(text: str, settings: Mapping[str, Any]) -> Failure | None:
    """The known failure that the text of an error with these settings stands for."""
    for failure in FAILURES:
        if re.search(failure.text, text) and all(settings.get(name) == value for name, value in failure.when.items()):
            return failure
    return None


def stage_of(text: str) -> str:
    """Where an export failed: "capture", "translate", "optimise", "write", "open" or "unknown"."""
    return next((stage for stage, pattern in _STAGES if re.search(pattern, text)), "unknown")


def last_resorts(text: str, settings: Settings) -> Iterator[Settings]:
    """Settings to try where the cause is not known: each differs from the given ones in one value."""
    stage = stage_of(text)
    for rung in LADDER:
        if stage in rung.stages and changes(rung.change, settings):
            yield settings | rung.change


def changes(change: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether a writer with these settings can make a change, and whether it is one."""
    return bool(change) and all(name in settings and settings[name] != value for name, value in change.items())


def what_is_lost(asked: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What a result made with `now` lacks of one made with `asked`, in words."""
    changed = {name: value for name, value in now.items() if asked[name] != value}
    lost = [says for (name, value), says in LOSSES.items() if name in changed and changed[name] == value]
    if opset := changed.get("onnx_opset_version"):
        lost.append(f"opset {opset}, not {asked['onnx_opset_version']} as asked for")
    return lost
