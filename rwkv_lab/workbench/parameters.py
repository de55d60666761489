"""What each notebook takes: names, types, ranges and help. papermill only warns of a wrong name; here it is an error.

Types are strict: the text "true" is no bool, True is no number, 1.0 is no whole number. One thing is converted: text
that reads as a number, where one with a fraction is asked for, because YAML 1.1 takes `1e-3` for text.
"""

import ast
import os
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from rwkv_lab.bench.peers import parse_peers
from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.errors import ParameterError
from rwkv_lab.merge.adapter import check_adapter_files
from rwkv_lab.merge.methods import ADAPTERS, INTO_BASE, METHODS
from rwkv_lab.merge.mixing import MIXING
from rwkv_lab.merge.recipe import read_recipe
from rwkv_lab.merge.refusals import DTYPES, check_alpha, check_method, method_of, mixing_values
from rwkv_lab.paths import path_fault
from rwkv_lab.wkv import backends
from rwkv_lab.workbench.tuned_file import Said, check_tuned

DEMO = ("demo:base", "demo:state")


def _number(value: Any) -> Any:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value  # refused by its type
    if isinstance(value, float) and not abs(value) < float("inf"):
        raise ValueError("it should be a finite number")
    return value


def _given(text: str) -> str:
    if not text.strip():
        raise ValueError("it is empty")
    return text


def _absolute(path: str) -> str:
    """Seen from the current folder: the caller's under papermill, the notebook's in JupyterLab. Demo names, "" stay."""
    if path in ("", *DEMO):
        return path
    if path.startswith("demo:"):
        raise ValueError(f"it should be one of {', '.join(DEMO)}, or a path")
    fault = path_fault(path)
    if fault:
        raise ValueError(fault)
    return os.path.abspath(os.path.expanduser(path))


def _backend(name: str) -> str:
    if name not in backends():
        raise ValueError(f"it should be one of {', '.join(backends())}")
    return name


Number = Annotated[float, BeforeValidator(_number)]
InputPath = Annotated[str, AfterValidator(_given), AfterValidator(_absolute)]
InputPaths = InputPath | list[InputPath]
PathOrEmpty = Annotated[str, AfterValidator(_absolute)]
Patterns = list[Annotated[str, AfterValidator(_given)]]


class Parameters(BaseModel):
    """What all notebooks share. Field order is the order in the notebook, descriptions are its help comments."""

    model_config = ConfigDict(strict=True, extra="forbid", validate_default=True)


class MergeParameters(Parameters):
    base: InputPath = Field("demo:base", description="the model to merge into: .pth, .safetensors or a folder")
    tuned: InputPaths = Field(
        "demo:state", description="a state, a fine-tune, an adapter; a list of adapters, or of models to mix"
    )
    out: PathOrEmpty = Field("", description="empty: merged.pth in the report folder, replaced by the next run")
    method: Literal[("auto", *METHODS)] = Field(
        "auto",
        description="auto reads it off the file; or state, overlay, lora, pissa, miss; linear, slerp, … mix models",
    )
    alpha: Annotated[Number, Field(ge=0)] | None = Field(
        None, description="0 to 1: how far to go; for a LoRA: its alpha; where deltas are added: their factor"
    )
    weights: list[Number] = Field([], description="linear: base, then each tuned; where deltas are added: each tuned")
    pissa_init: PathOrEmpty = Field("", description="of a PiSSA adapter: the file or folder that it started from")
    parameters: dict[str, Any] = Field(
        {}, description="what else a method takes: density, seed, layers; of adapters bat, quant, unmerge, …"
    )
    recipe: PathOrEmpty = Field("", description="a YAML recipe as of mergekit; it says all of the above but out")
    include: Patterns = Field([], description="shell patterns of tensors that may change; empty: all")
    exclude: Patterns = Field([], description="shell patterns of tensors that stay the base's")
    scan: Literal["all", "changed"] = Field("all", description="where to look for NaN and Inf: all or changed")
    dtype: Literal[("", *DTYPES)] = Field(
        "", description="bf16, fp16 or fp32 for every tensor; empty: each keeps its own"
    )
    allowed_dir: PathOrEmpty = Field("", description="the only folder that the output may go to; empty: any")
    overwrite: bool = Field(False, description="replace the output if it is there; never an input")
    dry_run: bool = Field(False, description="stop after the plan")
    allow_extra: Patterns = Field(
        [], description="patterns of tensors that the generation does not know but may be there"
    )
    allow_nonfinite: bool = Field(False, description="record NaN, Inf and overflow in the report instead of refusing")
    precision: Literal["float32", "float64"] = Field("float32", description="of the arithmetic: float32 or float64")
    hash: Literal["records", "sha256"] = Field("records", description="records: free; sha256: reads the inputs whole")
    report: PathOrEmpty = Field("", description="folder of this run's report; empty: reports/merge")


class InspectParameters(Parameters):
    checkpoint: InputPath = Field("demo:base", description="any checkpoint: .pth, .safetensors, a folder, an adapter")
    report: PathOrEmpty = Field("", description="folder of this run's report; empty: reports/inspect")


class TrainParameters(Parameters):
    kind: Literal["pretrain", "full", "state", "lora", "pissa", "miss"] = Field(
        "state", description="pretrain, full, state, lora, pissa or miss: what is trained"
    )
    base: PathOrEmpty = Field("demo:base", description="the model to start from; empty: a fresh one, for pretrain only")
    data: Annotated[str, AfterValidator(_given)] = Field(
        "python", description="english, python, or the path of a text, a folder of texts or a .jsonl"
    )
    out: PathOrEmpty = Field("", description="empty: trained.pth in the report folder, replaced by the next run")
    steps: Annotated[int, Field(ge=1)] | None = Field(None, description="updates; None: the kind's own number")
    batch_size: Annotated[int, Field(ge=1)] | None = Field(None, description="texts per batch; None: the kind's own")
    ctx_len: Annotated[int, Field(ge=1)] | None = Field(None, description="tokens per text; None: the kind's own")
    lr: Annotated[Number, Field(gt=0)] | None = Field(
        None, description="highest learning rate; None: the kind's own, which suits the demo model"
    )
    rank: Annotated[int, Field(ge=1)] | None = Field(None, description="of adapters; None: 8")
    alpha: Annotated[Number, Field(gt=0)] | None = Field(
        None, description="of a LoRA, scaled by alpha over rank; None: twice the rank"
    )
    targets: Patterns = Field([], description="layers to adapt, such as att.key, or patterns; empty: all of the blocks")
    train_parts: Patterns = Field([], description="trained beside adapters: emb, head, ln, time_state or patterns")
    quant: Literal["none", "int8", "nf4"] = Field("none", description="of frozen matrices: none, int8 or nf4")
    dtype: Literal["float32", "float64", "bfloat16"] = Field(
        "float32", description="of the model: float32, float64, bfloat16"
    )
    autocast: Literal["", "bfloat16", "float16"] = Field(
        "", description="compute in bfloat16, or on CUDA float16; empty: in dtype"
    )
    device: Annotated[str, AfterValidator(_given)] = Field("cpu", description="cpu or cuda")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="the same seed gives the same file")
    accumulate: Annotated[int, Field(ge=1)] = Field(1, description="batches per update")
    warmup: Annotated[int, Field(ge=0)] | None = Field(
        None, description="updates until the rate is highest; None: a twentieth"
    )
    gradient_checkpointing: bool = Field(False, description="less memory, about a third more time")
    eval_every: Annotated[int, Field(ge=0)] = Field(0, description="updates between two measurements; 0: none")
    patience: Annotated[int, Field(ge=0)] = Field(
        0, description="measurements without a new best before it stops; 0: never stops"
    )
    checkpoint_every: Annotated[int, Field(ge=0)] = Field(0, description="updates between two checkpoints; 0: none")
    resume: bool = Field(False, description="go on from the checkpoint beside the output, if there is one")
    compare: bool = Field(False, description="then compare all methods at equal parameters: a minute more")
    overwrite: bool = Field(False, description="replace the output if it is there")
    dry_run: bool = Field(False, description="stop after the plan")
    report: PathOrEmpty = Field("", description="folder of this run's report; empty: reports/train")


class ModesParameters(Parameters):
    model: InputPath = Field("demo:base", description="a whole model of any generation: .pth, .safetensors, a folder")
    compare_with: PathOrEmpty = Field("", description="a second model of the same layout: where do the two part?")
    length: Annotated[int, Field(ge=16)] = Field(512, description="tokens of each sequence")
    batch: Annotated[int, Field(ge=1)] = Field(2, description="sequences")
    dtypes: Annotated[list[Literal["float64", "float32", "bfloat16", "float16"]], Field(min_length=1)] = Field(
        ["float64", "float32", "bfloat16"], description="of float64, float32, bfloat16, float16"
    )
    backends: list[Annotated[str, AfterValidator(_backend)]] = Field(
        [], description="of the WKV operator; empty: all there are"
    )
    report: PathOrEmpty = Field("", description="folder of this run's report; empty: reports/modes")


def _peer(text: str) -> str:
    parse_peers([text])
    return text


class BenchmarkParameters(Parameters):
    model: InputPath = Field("demo:base", description="a whole model of any generation: .pth, .safetensors, a folder")
    lengths: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = Field(
        [64, 256], description="tokens of the prompts that are read at once"
    )
    batches: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = Field(
        [1, 8], description="sequences that are decoded at once"
    )
    dtypes: Annotated[list[Literal["bf16", "fp32", "fp16", "int8", "int4"]], Field(min_length=1)] = Field(
        ["bf16", "fp32"], description="of bf16, fp32, fp16, int8, int4; the last two are of the weights alone"
    )
    backends: list[Annotated[str, AfterValidator(_backend)]] = Field(
        [], description="of the WKV operator; empty: all there are"
    )
    device: Annotated[str, AfterValidator(_given)] = Field("cpu", description="cpu or cuda")
    peers: list[Annotated[str, AfterValidator(_peer)]] = Field(
        ["auto"], description="auto is the package rwkv where it is installed; others by a command, see the README"
    )
    rounds: Annotated[int, Field(ge=1)] = Field(3, description="samples of everything, taken in turn")
    report: PathOrEmpty = Field("", description="folder of this run's report; empty: reports/benchmark")


class PeftParameters(Parameters):
    base: InputPath = Field("demo:base", description="the model that was tuned: .pth, .safetensors or a folder")
    adapter: InputPath = Field("demo:state", description="what was trained on it: an adapter, a state, a fine-tune")
    second: PathOrEmpty = Field("", description="another tuning of the same base: do the two pull the same way?")
    targets: Patterns = Field(
        [], description="what is measured: names or ends such as att.key, or patterns; empty: all"
    )
    rank: Annotated[int, Field(ge=1)] = Field(8, description="how much of each change would a LoRA of this rank keep?")
    data: Annotated[str, AfterValidator(_given)] = Field(
        "python", description="held-out text it is judged by: english, python, or a path"
    )
    alpha: Annotated[Number, Field(gt=0)] | None = Field(None, description="of a LoRA whose file does not say it")
    pissa_init: PathOrEmpty | list[PathOrEmpty] = Field(
        "", description="of PiSSA: file or folder that it started from; a list of two: second's, too"
    )
    parameters: dict[str, Any] = Field(
        {}, description="what else files may not say: use_rslora, bat, residual_base, quant; each may be a list of two"
    )
    report: PathOrEmpty = Field("", description="folder of this run's report; empty: reports/peft")

    def said(self, which: int) -> Said:
        """What was said of the adapter (0) or of the second one (1). One value is of the adapter, a list of both."""
        given = {"pissa_init": self.pissa_init, **self.parameters}
        pairs = {n: v if isinstance(v, list) else [v, None] for n, v in given.items()}
        odd = next((n for n, v in pairs.items() if len(v) != 2), None)
        if odd:
            raise ParameterError(f"{odd}={pairs[odd]!r}: one value is needed, or a list of two")
        own = {n: v[which] for n, v in pairs.items() if v[which] is not None}
        return Said(None if which else self.alpha, own.pop("pissa_init", None) or None, own)


NOTEBOOKS: dict[str, type[Parameters]] = {
    "merge": MergeParameters,
    "inspect": InspectParameters,
    "train": TrainParameters,
    "modes": ModesParameters,
    "benchmark": BenchmarkParameters,
    "peft": PeftParameters,
}

_PLAIN = (str, bytes, int, float, complex, list, dict, tuple, set, type(None))
_HINTS = {
    "bool_type": "papermill's -p takes True and False, spelled like this.",
    "string_type": "papermill's -p turns text that looks like a number into one; -r {name} keeps it as text.",
    "dict_type": 'papermill takes a mapping by -y: -y \'{{"{name}": {{"density": 0.3}}}}\'',
    "list_type": 'papermill takes a list by -y: -y \'{{"{name}": ["blocks.0.*"]}}\'',
}


def read_parameters(notebook: str, namespace: Mapping[str, Any], names_are_all: bool) -> Parameters:
    """Validate the parameters of a notebook.

    Args:
        notebook: a key of `NOTEBOOKS`.
        namespace: variables by name, such as `globals()`; a parameter that is not in it keeps its default.
        names_are_all: every public variable with a plain value must be a parameter. True in batch; in JupyterLab a
            person's own variables lie in the same namespace.
    Raises:
        ParameterError: an unknown name, a wrong type, a value out of range, or parameters that do not go together.
    """
    model = NOTEBOOKS[notebook]
    if names_are_all:
        _refuse_code(notebook, namespace)
        for name, value in namespace.items():
            hidden = name.startswith("_") or name in ("In", "Out")  # IPython's own
            if not hidden and name not in model.model_fields and isinstance(value, _PLAIN):
                raise _unknown(notebook, name)
    return _validated(model, {name: namespace[name] for name in model.model_fields if name in namespace})


def changed(config: Parameters, **values: Any) -> Parameters:
    """The same parameters with some changed, validated again.

    Raises:
        ParameterError: as `read_parameters`.
    """
    for name in values:
        if name not in type(config).model_fields:
            raise ParameterError(f"there is no parameter {name!r}; there are: {', '.join(type(config).model_fields)}")
    return _validated(type(config), config.model_dump() | values)


def input_path(value: str) -> Path:
    """The file behind an input parameter; the demo files are trained now if they are not there."""
    from rwkv_lab import train  # here, because it brings the model with it

    if value == "demo:base":
        return train.demo_base()
    if value == "demo:state":
        return train.demo_state()
    return Path(value)


def train_demo(config: Parameters) -> None:
    """Have the demo files that the parameters name, now rather than in the middle of a run: training takes minutes."""
    if isinstance(config, MergeParameters) and config.recipe:
        return
    for value in config.model_dump().values():
        if value in DEMO:
            input_path(value)


def check_files(config: Parameters) -> None:
    """Refuse what only the files' headers, or the method's own signature, can tell.

    Raises:
        ParameterError: alpha out of range, or missing for a LoRA; parameters that the method does not take.
        RwkvLabError: the file cannot be opened.
    """
    if isinstance(config, PeftParameters):
        for which, path in enumerate((config.adapter, config.second)):
            if path and path not in DEMO:
                check_tuned(path, config.said(which), direction_only=which == 1)
    if not isinstance(config, MergeParameters):
        return
    if config.recipe:
        read_recipe(config.recipe)
    elif config.method in MIXING:
        mixing_values(config.method, config.alpha, config.weights or None, config.parameters)
    elif config.method in ("auto", *ADAPTERS) and config.tuned not in DEMO:
        _check_tuned(config)
    elif config.method in ("auto", *INTO_BASE):
        check_alpha("state" if config.method == "auto" else config.method, config.alpha)


def _check_tuned(config: MergeParameters) -> None:
    tuned = config.tuned if isinstance(config.tuned, list) else [config.tuned]
    method = config.method
    if method == "auto":
        with open_checkpoint(tuned[0]) as ck:
            method = method_of(ck)
    given = (config.alpha, config.weights or None, config.parameters, config.pissa_init or None)
    check_method(method, *given)
    if method in ADAPTERS:
        alpha, weights, parameters, init = given
        check_adapter_files(tuned, config.method, alpha, weights, init, parameters)


def _validated(model: type[Parameters], values: Mapping[str, Any]) -> Parameters:
    try:
        config = model(**values)
    except ValidationError as e:
        raise _in_our_words(e) from None
    if isinstance(config, MergeParameters) and config.recipe:
        _refuse_beside_recipe(config)
    elif isinstance(config, MergeParameters) and (config.base in DEMO) != (config.tuned in DEMO):
        given, missing = ("base", "tuned") if config.tuned in DEMO else ("tuned", "base")
        raise ParameterError(
            f"{missing} is missing: {given} is {getattr(config, given)}, {missing} is still the demo's.\n"
            f"Give both, or neither for the demo."
        )
    elif isinstance(config, PeftParameters) and config.adapter in DEMO and config.base not in DEMO:
        raise ParameterError(f"adapter is missing: base is {config.base}, adapter is still the demo's.")
    if isinstance(config, TrainParameters):
        _check_training(config)
    return config


def _check_training(c: TrainParameters) -> None:
    """Refuse what does not go together, by the trainer's own rules."""
    if c.kind != "pretrain" and not c.base:
        raise ParameterError(f"base is missing: kind={c.kind!r} tunes a model; give that model")
    from rwkv_lab.train import Tuning, choose_recipe  # here, because it brings the model with it

    recipe = choose_recipe(c.kind, steps=c.steps, warmup=c.warmup, rank=c.rank)
    tuning = Tuning(c.kind, c.dtype, c.autocast, c.device, c.quant, c.rank or recipe.rank, c.alpha)
    replace(tuning, targets=c.targets or None, train_parts=c.train_parts).check(c.base or None)
    if c.patience and not c.eval_every:
        raise ParameterError(f"patience={c.patience} counts measurements: say with eval_every when to measure")


def _refuse_beside_recipe(config: MergeParameters) -> None:
    for name in ("base", "tuned", "method", "alpha", "weights", "pissa_init", "parameters", "dtype"):
        if getattr(config, name) != MergeParameters.model_fields[name].default:
            raise ParameterError(f"{name}={getattr(config, name)!r}: the recipe says it; leave one of them out")


def _unknown(notebook: str, name: str) -> ParameterError:
    allowed = list(NOTEBOOKS[notebook].model_fields)
    near = get_close_matches(name, allowed, n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    return ParameterError(f"{notebook} has no parameter {name!r}{hint}\nIt takes: {', '.join(allowed)}")


def _in_our_words(error: ValidationError) -> ParameterError:
    """The first of pydantic's findings, what to do about it, and which other parameters are wrong too."""
    first, *rest = error.errors()
    name, value = first["loc"][0], repr(first["input"])
    says = first["msg"].removeprefix("Value error, ").replace("Input should", "it should")
    lines = [f"{name}={value if len(value) <= 80 else value[:80] + '…'}: {says}"]
    if first["type"] in _HINTS:
        lines.append(_HINTS[first["type"]].format(name=name))
    others = sorted({str(e["loc"][0]) for e in rest} - {str(name)})
    if others:
        lines.append(f"Wrong too: {', '.join(others)}")
    return ParameterError("\n".join(lines))


def _refuse_code(notebook: str, namespace: Mapping[str, Any]) -> None:
    """papermill writes `name = value` without looking at the name, so that a name may be code. Read what it wrote."""
    for source in namespace.get("In", []):
        if not source.startswith("# Parameters"):
            continue
        for statement in ast.parse(source).body:
            target = statement.targets[0] if isinstance(statement, ast.Assign) and len(statement.targets) == 1 else None
            if not isinstance(target, ast.Name):
                raise ParameterError(f"{ast.unparse(statement)[:80]!r} does not set a parameter; names are plain words")
            if target.id not in NOTEBOOKS[notebook].model_fields:
                raise _unknown(notebook, target.id)
