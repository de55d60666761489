"""Recipes in mergekit's spelling: YAML with `merge_method`, `models` or `slices`, `parameters`, `base_model`, `dtype`.

Taken are the methods that both know. Where the two differ: the arithmetic is float32 whatever `dtype` says, rounded
once; DARE draws other random numbers, and rescales by 1/density; slerp between a tensor of zeros and another is a
straight line; model_stock has no floor under norms, and stays between base and mean. Outside the layers a gradient has
its first value, as there.
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.dtypes import short_name, to_dtype
from rwkv_lab.errors import ParameterError
from rwkv_lab.merge.merge import AnyPath, run_merge
from rwkv_lab.merge.plan import MergeResult
from rwkv_lab.merge.settings import GRADIENT, REST, with_default
from rwkv_lab.merge.spec import MergeOptions, MergeSpec
from rwkv_lab.paths import to_path
from rwkv_lab.suggestions import did_you_mean
from rwkv_lab.yaml_file import read_mapping

log = logging.getLogger(__name__)

_OUTPUT = ("float32", "float16", "bfloat16")
_KEYS = ("merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype")
_OF_A_SLICE, _OF_A_MODEL = ("sources", "parameters", "base_model"), ("model", "parameters")
_OF_A_SOURCE = (*_OF_A_MODEL, "layer_range")
_ELSEWHERE = ("tokenizer_source", "tokenizer", "chat_template")  # a checkpoint of RWKV holds no tokenizer

# Of each method: mergekit's name of a parameter -> (ours, its default there). None: it must be given.
_SHARED = {
    "linear": {"normalize": ("normalize", True)},
    "slerp": {"t": ("alpha", None)},
    "task_arithmetic": {"lambda": ("alpha", 1.0), "normalize": ("normalize", False)},
    "ties": {"lambda": ("alpha", 1.0), "normalize": ("normalize", True)},
    "dare_linear": {"lambda": ("alpha", 1.0), "normalize": ("normalize", False), "rescale": ("rescale", True)},
    "dare_ties": {"lambda": ("alpha", 1.0), "normalize": ("normalize", False), "rescale": ("rescale", True)},
    "model_stock": {},
    "passthrough": {},
}
_EACH = {
    "linear": {"weight": ("weights", None)},
    "task_arithmetic": {"weight": ("weights", None)},
    "ties": {"weight": ("weights", None), "density": ("density", 1.0)},
    "dare_linear": {"weight": ("weights", None), "density": ("density", 1.0)},
    "dare_ties": {"weight": ("weights", None), "density": ("density", 1.0)},
}
# What may stand there and changes nothing, with the only values that do not.
_WITHOUT_EFFECT = {"int8_mask": (True, False), "rescale": (False,), "filter_wise": (False,), "scale": (1, None)}


def merge_recipe(recipe: AnyPath, out: AnyPath, **options: Any) -> MergeResult:
    """Merge as a recipe in mergekit's spelling says.

    Args:
        recipe: path of the YAML file. Models are files or folders, as seen from its folder or the current one.
        out: as in `merge`.
        options: other arguments of `merge`, such as overwrite, dry_run, precision, allowed_dir.
    Raises:
        ParameterError: a method or parameter that is not known here, or a recipe that contradicts itself.
        RwkvLabError: as `merge`.
    """
    given = _read(recipe)
    twice = next((name for name in given if name in options), None)
    if twice:
        raise ParameterError(f"{twice} is in the recipe {recipe} already; it cannot be given beside it")
    job = {name: options.pop(name) for name in MergeOptions.model_fields if name in options}
    return run_merge(MergeSpec.read(given | options), out, MergeOptions.read(job))


def read_recipe(recipe: AnyPath) -> MergeSpec:
    """What a recipe stands for.

    Raises:
        ParameterError, CorruptFileError: as `merge_recipe`.
    """
    return MergeSpec.read(_read(recipe))


def _read(recipe: AnyPath) -> dict[str, Any]:
    """base, tuned, method, alpha, weights, parameters and dtype, as far as the recipe states them."""
    path = to_path(recipe, "recipe")
    asked = read_mapping(path, "a recipe", "merge_method, models, parameters, …")
    _refuse_unknown(path, asked, (*_KEYS, *_ELSEWHERE), "")
    for name in _ELSEWHERE:
        if name in asked:
            log.info("%s: %s has no effect, RWKV checkpoints hold no tokenizer", path.name, name)
    method = asked.get("merge_method")
    if not isinstance(method, str) or method not in _SHARED:
        raise ParameterError(f"{path}: merge_method is {method!r}; known here are {', '.join(_SHARED)}")
    if ("models" in asked) == ("slices" in asked):
        raise ParameterError(f"{path}: one of models and slices is needed, and not both")
    given = _stack(path, asked) if method == "passthrough" else _mix(path, asked, method)
    for name in ("dtype", "out_dtype"):  # the second has the last word
        if asked.get(name) is not None:
            given["dtype"] = short_name(to_dtype(asked[name], f"{path}: {name}", _OUTPUT))
    return {"method": method, **given}


def _refuse_unknown(path: Path, found: Mapping, known: tuple[str, ...], where: str) -> None:
    for name in found:
        if name not in known:
            hint = did_you_mean(str(name), known) or "."
            raise ParameterError(f"{path}: {name!r} is not known here{where}{hint}\nKnown are: {', '.join(known)}")


def _mix(path: Path, asked: dict, method: str) -> dict[str, object]:
    """base, tuned and the parameters of a method that mixes models."""
    scopes, entries, base = [asked.get("parameters")], asked.get("models"), asked.get("base_model")
    layers = None
    if entries is None:
        slices = _entries(path, asked["slices"], "slices")
        if len(slices) != 1:
            raise ParameterError(f"{path}: method {method!r} takes one slice, with all layers; {len(slices)} are given")
        _refuse_unknown(path, slices[0], _OF_A_SLICE, " in a slice")
        entries, base = slices[0].get("sources"), slices[0].get("base_model", base)
        scopes.insert(0, slices[0].get("parameters"))
        layers = [e.get("layer_range") for e in _entries(path, entries, "sources")]
    entries = _entries(path, entries, "models" if layers is None else "sources")
    for entry in entries:
        _refuse_unknown(path, entry, _OF_A_MODEL if layers is None else _OF_A_SOURCE, " in an entry of a model")
    models = [_model(path, e.get("model")) for e in entries]
    if base is None and method != "linear":
        raise ParameterError(f"{path}: method {method!r} needs base_model")
    base = models[0] if base is None else _model(path, base)
    if layers:
        _check_all_layers(path, models, layers)
    own = {m: e.get("parameters") for m, e in zip(models, entries, strict=True)}
    tuned = [m for m in models if m != base]
    if len(set(models)) < len(models):
        raise ParameterError(f"{path}: a model stands in it twice")
    for scope in (*scopes, *own.values()):
        _check_parameters(path, scope, method)
    parameters = {ours: _setting(path, name, scopes, there) for name, (ours, there) in _SHARED[method].items()}
    for name, (ours, there) in _EACH.get(method, {}).items():
        counted = [base, *tuned] if method == "linear" else tuned
        parameters[ours] = [_setting(path, name, [own.get(m), *scopes], there, m) for m in counted]
    given = {name: parameters.pop(name) for name in ("alpha", "weights") if name in parameters}
    return {"base": base, "tuned": tuned, **given, "parameters": parameters}


def _stack(path: Path, asked: dict) -> dict[str, object]:
    """base, tuned and layers of a stack: each slice is a run of layers of one model."""
    runs = []
    for piece in _entries(path, asked.get("slices"), "slices"):
        _refuse_unknown(path, piece, _OF_A_SLICE, " in a slice")
        sources = _entries(path, piece.get("sources"), "sources")
        if len(sources) != 1:
            raise ParameterError(f"{path}: a slice of method 'passthrough' has one source; {len(sources)} are given")
        _refuse_unknown(path, sources[0], _OF_A_SOURCE, " in an entry of a model")
        for scope in (asked.get("parameters"), piece.get("parameters"), sources[0].get("parameters")):
            _check_parameters(path, scope, "passthrough")
        runs.append((_model(path, sources[0].get("model")), _range(path, sources[0].get("layer_range"))))
    models = list(dict.fromkeys(model for model, _ in runs))
    called = ["base", *(f"tuned{i + 1 if i else ''}" for i in range(len(models) - 1))]
    layers = [f"{called[models.index(model)]}[{first}:{end}]" for model, (first, end) in runs]
    return {"base": models[0], "tuned": models[1:], "parameters": {"layers": layers}}


def _entries(path: Path, found: object, what: str) -> list[dict]:
    if not isinstance(found, list) or not found or not all(isinstance(e, dict) for e in found):
        raise ParameterError(f"{path}: {what} must be a list of mappings, such as - model: path")
    return found


def _model(path: Path, named: object) -> Path:
    """The file or folder that a recipe names."""
    if isinstance(named, dict):
        _refuse_unknown(path, named, ("model", "lora") if "model" in named else ("path",), " in the name of a model")
        inner = named.get("model", named)
        if named.get("lora") or not isinstance(inner, dict) or set(inner) - {"path"}:
            raise ParameterError(f"{path}: model {named!r}: only a path can be meant; merge a LoRA first")
        named = inner.get("path")
    if not isinstance(named, str):
        raise ParameterError(f"{path}: model {named!r}: a path is needed")
    here = path.parent / named
    found = here if here.exists() else to_path(named, "model")
    if not found.exists() and "+" in named:
        raise ParameterError(f"{path}: {named}: a model with a LoRA on it; merge the LoRA first, and name the result")
    return found.absolute()


def _range(path: Path, found: object) -> tuple[int, int]:
    if not isinstance(found, list) or len(found) != 2 or not all(type(i) is int for i in found):
        raise ParameterError(f"{path}: layer_range {found!r}: [first, after the last] is needed")
    return found[0], found[1]


def _check_all_layers(path: Path, models: list[Path], ranges: Sequence[object]) -> None:
    for model, found in zip(models, ranges, strict=True):
        first, end = _range(path, found)
        with open_checkpoint(model) as ck:
            depth = ck.layout.n_layer if ck.layout else end
        if (first, end) != (0, depth):
            raise ParameterError(f"{path}: layer_range {found} of {model.name}: mixed are all layers, [0, {depth}]")


def _check_parameters(path: Path, scope: object, method: str) -> None:
    if scope is None:
        return
    if not isinstance(scope, dict):
        raise ParameterError(f"{path}: parameters {scope!r}: a mapping of names to values is needed")
    known = {**_SHARED[method], **_EACH.get(method, {})}
    for name, value in scope.items():
        if name in known or name == "density" and method == "task_arithmetic":
            continue
        if name not in _WITHOUT_EFFECT or value not in _WITHOUT_EFFECT[name]:
            takes = ", ".join(known) or "none"
            raise ParameterError(f"{path}: {name}={value!r} is not known for {method!r} here; it takes: {takes}")


def _setting(path: Path, name: str, scopes: list, default: object, model: Path | None = None) -> object:
    """A parameter through its scopes, the narrowest first, in the words of `settings`.

    Args:
        model: whose parameter it is, for the message.
    """
    found = default
    for scope in reversed(scopes):
        if scope and name in scope:
            found = with_default(_translated(path, name, scope[name]), found)
    if found is None or isinstance(found, dict) and REST in found and found[REST] is None:
        where = f" for what no filter fits of {model or 'the merge'}" if found else f" for {model}" if model else ""
        advice = (
            f"\nGive it under parameters of that model, or once for all: parameters: {{{name}: …}}." if model else ""
        )
        raise ParameterError(f"{path}: {name} is missing{where}{advice}")
    return found


def _translated(path: Path, name: str, value: object) -> object:
    """mergekit's forms of a value: a number, points along the layers, or values by filter."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return _number(path, name, value)
    if not any(isinstance(v, dict) for v in value):
        return {GRADIENT: [_number(path, name, v) for v in value]}
    out: dict[str, object] = {}
    for v in value:
        if not isinstance(v, dict) or set(v) - {"filter", "value"} or "value" not in v:
            raise ParameterError(f"{path}: {name}: {v!r}: a filter and a value are needed")
        wanted = v.get("filter")
        if not isinstance(wanted, str | None):
            raise ParameterError(f"{path}: {name}: the filter {wanted!r} is no text")
        if wanted in ("self_attn", "mlp"):
            raise ParameterError(f"{path}: {name}: RWKV has no {wanted}; its blocks have att and ffn")
        pattern = REST if wanted in (None, "*") else f"*{glob.escape(str(wanted))}*"
        out.setdefault(pattern, _translated(path, name, v["value"]))
    return out


def _number(path: Path, name: str, value: object) -> object:
    if isinstance(value, str):  # YAML 1.1 takes 1e-3 for text
        try:
            return float(value)
        except ValueError:
            raise ParameterError(f"{path}: {name}={value!r}: a number is needed") from None
    return value
