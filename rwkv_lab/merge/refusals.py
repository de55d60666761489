"""What a merge refuses before it reads a byte of tensor data: parameters, methods and inputs that make no sense."""

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches

import torch

from rwkv_lab.checkpoint import Checkpoint, Layout
from rwkv_lab.errors import LayoutError, ParameterError
from rwkv_lab.merge.adapter import KINDS, TAKES
from rwkv_lab.merge.methods import ADAPTERS, INTO_BASE, METHODS
from rwkv_lab.merge.mixing import MIXING, signature_of
from rwkv_lab.merge.settings import GRADIENT, REST, with_default
from rwkv_lab.patterns import matches_any

log = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def method_of(tuned: Checkpoint) -> str:
    """The method that fits what `tuned` is.

    Raises:
        LayoutError: none of today's methods does.
    """
    methods = {"state": "state", "model": "overlay", "partial": "overlay"} | KINDS
    if tuned.kind in methods:
        return methods[tuned.kind]
    why = f": {tuned.reason}" if tuned.reason else ""
    raise LayoutError(
        f"{tuned.path} is of kind {tuned.kind!r}{why}.\nMerged can be: a state, a full or partial fine-tune, an "
        "adapter (LoRA, PiSSA, MiSS)."
    )


def check_alpha(method: str, alpha: float | None) -> None:
    """Refuse an alpha that the method cannot use.

    Raises:
        ParameterError: out of range, or not a finite number.
    """
    if alpha is not None and not math.isfinite(alpha):
        raise ParameterError(f"alpha is {alpha}; it must be a finite number")
    if method in ADAPTERS:
        if alpha is not None and not 0 <= alpha <= torch.finfo(torch.float32).max:
            raise ParameterError(f"alpha is {alpha}; a LoRA's alpha is 0 or more, and a number of float32")
    elif alpha is not None and not 0 <= alpha <= 1:
        raise ParameterError(f"alpha is {alpha}; for method {method!r} it is a share of the way, 0 to 1")


def check_parameters(scan: str, precision: str) -> torch.dtype:
    """The precision as a dtype.

    Raises:
        ParameterError: a word that is none of those there are.
    """
    if scan not in ("all", "changed"):
        raise ParameterError(f"scan={scan!r}: it must be 'all' or 'changed'")
    if precision not in ("float32", "float64"):
        raise ParameterError(f"precision={precision!r}: it must be 'float32' or 'float64'")
    return torch.float64 if precision == "float64" else torch.float32


def output_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype that a name stands for; None keeps each tensor's own."""
    if dtype is None or dtype in DTYPES.values():
        return dtype
    if dtype in DTYPES:
        return DTYPES[dtype]
    raise ParameterError(f"dtype={dtype!r}: it must be one of {', '.join(DTYPES)}, or None to keep each tensor's own")


def check_method(method: str, alpha: object, weights: object, parameters: Mapping | None, pissa_init: object) -> None:
    """Refuse an unknown method, and what a method cannot use of the arguments that only some take.

    Raises:
        ParameterError: says what the method takes.
    """
    if method not in METHODS:
        near = get_close_matches(str(method), METHODS, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ParameterError(
            f"method={method!r}: it must be 'auto' or one of {', '.join(METHODS)}{hint if near else ''}"
        )
    if pissa_init is not None and method not in ADAPTERS:
        raise ParameterError(f"method {method!r} takes no pissa_init: it is for PiSSA adapters")
    if method in ADAPTERS:
        _check_adapters(method, alpha, weights, parameters)
    if method in INTO_BASE:
        if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, (int, float))):
            raise ParameterError(f"alpha={alpha!r}: it must be a number")
        if weights is not None:
            raise ParameterError(f"method {method!r} takes no weights: they are for mixing several models")
        if parameters:
            raise ParameterError(f"method {method!r} takes no parameters beside alpha; given: {', '.join(parameters)}")
        check_alpha(method, alpha)


def _check_adapters(method: str, alpha: object, weights: object, parameters: object) -> None:
    if parameters is not None and not isinstance(parameters, Mapping):
        raise ParameterError(f"parameters={parameters!r}: a mapping of names to values is needed")
    for name in parameters or {}:
        if name not in TAKES:
            near = get_close_matches(str(name), TAKES, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise ParameterError(f"method {method!r} takes no {name!r}{hint}\nIts parameters: {', '.join(TAKES)}")
    plain("parameters", parameters or {})
    for one in alpha if isinstance(alpha, (list, tuple)) else [alpha]:
        if one is not None and (isinstance(one, bool) or not isinstance(one, (int, float))):
            raise ParameterError(f"alpha={one!r}: it must be a number, or a list with one per adapter")
        check_alpha(method, one)
    if weights is not None:
        good = isinstance(weights, (list, tuple)) and all(
            type(w) in (int, float) and abs(w) <= torch.finfo(torch.float32).max for w in weights
        )
        if not good:
            raise ParameterError(f"weights={weights!r}: a list of finite numbers is needed, one per adapter")


def plain(what: str, value: object) -> object:
    """A copy of what a person gave as JSON can hold it: the recipe is a part of the output.

    Raises:
        ParameterError: something else than numbers, texts, lists and mappings of them.
    """
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as e:
        raise ParameterError(f"{what}={value!r}: numbers, texts, lists and mappings are needed ({e})") from e


def mixing_values(method: str, alpha: object, weights: object, parameters: Mapping | None) -> dict[str, object]:
    """The settings of a mixing method by parameter name, defaults filled in.

    `alpha` and `weights` may stand in `parameters` too, as a mapping of patterns; the arguments of that name then hold
    for the tensors that no pattern fits.

    Raises:
        ParameterError: an unknown or missing name, or one value given twice.
    """
    if parameters is not None and not isinstance(parameters, Mapping):
        raise ParameterError(f"parameters={parameters!r}: a mapping of names to values is needed")
    values = dict(plain("parameters", parameters or {}))
    for name, given in (("alpha", alpha), ("weights", weights)):
        if given is None:
            continue
        there, given = values.get(name), plain(name, given)
        if isinstance(there, dict) and not {GRADIENT, REST} & set(there):
            given = there | {REST: given}
        elif there is not None:
            raise ParameterError(f"{name} is given twice: {given!r}, and {there!r} in parameters")
        values[name] = given
    signature = signature_of(MIXING[method])
    signature.check_names(method, values)
    return {
        p.name: with_default(values[p.name], p.default) if p.name in values else p.default
        for p in signature.parameters.values()
    }


def check_base(base: Checkpoint, allow_extra: list[str]) -> Layout:
    """The base must be a whole model, without a name that its generation does not know."""
    identity = base.identity
    if identity.layout is None:
        raise LayoutError(f"the base {base.path} is not a whole RWKV model (kind {base.kind!r}): {base.reason}")
    if identity.prefix:
        raise LayoutError(
            f"every name in the base {base.path} begins with {identity.prefix!r}; save it without that prefix"
        )
    misfit = identity.misfit
    if misfit.missing:
        more = f" and {len(misfit.missing) - 10} more" if len(misfit.missing) > 10 else ""
        raise LayoutError(
            f"the base {base.path} ({identity.layout}) lacks {len(misfit.missing)} tensors: "
            f"{', '.join(misfit.missing[:10])}{more}"
        )
    if misfit.wrong:
        name, found, expected = misfit.wrong[0]
        raise LayoutError(f"{name} in {base.path} has shape {list(found)}; its model needs {list(expected)}")
    extra = [n for n in misfit.extra if not matches_any(n, allow_extra)]
    if extra:
        raise LayoutError(
            f"the base {base.path} has {len(extra)} tensors that RWKV-{identity.layout.version} does not know: "
            f"{', '.join(extra[:10])}.\nIf they belong there, name them in allow_extra."
        )
    return identity.layout


def refuse_same(base: Checkpoint, tuned: Sequence[Checkpoint]) -> None:
    """Refuse one file given twice, under whatever names.

    Raises:
        ParameterError: says which.
    """
    called = ["base", *("tuned" if len(tuned) == 1 else f"tuned {i + 1}" for i in range(len(tuned)))]
    cks = [base, *tuned]
    for j, later in enumerate(cks):
        for i in range(j):
            if any(os.path.samestat(os.fstat(a.fd), os.fstat(b.fd)) for a in cks[i].files for b in later.files):
                hint = "; the output would be the base" if len(cks) == 2 else "; each model counts once"
                raise ParameterError(f"{called[i]} and {called[j]} are the same file {later.path}{hint}")


def check_dtypes(ck: Checkpoint) -> None:
    """Refuse tensors that are no floats of 16 bits or more.

    Raises:
        LayoutError: names the first.
    """
    for name, t in ck.info.items():
        if t.dtype not in _FLOATS:
            raise LayoutError(
                f"{name} in {ck.path} is {t.dtype}; weights must be bfloat16, float16, float32 or float64"
            )
    doubles = sum(t.dtype == torch.float64 for t in ck.info.values())
    if doubles:
        log.warning("%s holds %d float64 tensors; RWKV models have none", ck.path, doubles)
