"""An adapter that is there, trained further: what its file states decides the settings."""

import math
from collections.abc import Mapping

from rwkv_lab.checkpoint import Layout, open_checkpoint
from rwkv_lab.checkpoint.origin import origin_of, same_weights, weights_of
from rwkv_lab.errors import ParameterError
from rwkv_lab.patterns import matches
from rwkv_lab.peft import ADAPTER_KINDS, Adapter, open_adapter
from rwkv_lab.peft.selection import in_part
from rwkv_lab.train.spec import Planned, TrainSpec


def notes_on_start(spec: TrainSpec, other_base: bool) -> list[str]:
    """A sentence on an adapter or a state to train further that was trained on another base, or does not say on which.

    Args:
        other_base: whether it may be trained on another one.

    Raises:
        ParameterError: it was trained on another base, and may not.
    """
    if not spec.start:
        return []
    with open_checkpoint(spec.start) as ck:
        name, origin = ck.path.name, origin_of(ck)
    if origin is None:
        return [f"{name} does not say on which base it was trained."]
    with open_checkpoint(spec.base) as ck:
        if same_weights(origin.weights, weights_of(ck)):
            return []
    if not other_base:
        raise ParameterError(
            f"start={spec.start!r} was trained on {origin.base}, whose weights are not those of {spec.base}.\n"
            "Give the base that it was trained on; allow_other_base=True trains it all the same."
        )
    return [f"{name} was trained on {origin.base}; {spec.base} has other weights."]


def with_settings_of(spec: TrainSpec, method: str) -> TrainSpec:
    """The spec with rank, alpha, targets, train_parts and quant of the adapter that it starts from.

    Raises:
        ParameterError: the spec states otherwise, the adapter is of another kind, or its file leaves alpha open.
        LayoutError, CorruptFileError, UnsafeFileError: of the adapter.
    """
    with open_adapter(spec.start, alpha=spec.alpha if ADAPTER_KINDS[method].takes_alpha else None) as adapter:
        if adapter.method != method:
            raise ParameterError(
                f"start={spec.start!r} is {ADAPTER_KINDS[adapter.method].described}, and kind={method!r} was given.\n"
                f"Pass kind={adapter.method!r}."
            )
        found: dict[str, object] = {"targets": [*adapter.targets], "train_parts": [*adapter.full]}
        ranks = sorted({target.rank for target in adapter.targets.values()})
        alphas = {getattr(target, "alpha", None) for target in adapter.targets.values()}
        found |= {"rank": max(ranks), "quant": adapter.quant or spec.quant}
        found |= {"alpha": next(iter(alphas))} if ADAPTER_KINDS[method].takes_alpha and len(alphas) == 1 else {}
        _refuse_other(spec, adapter, ranks)
    return spec.changed(**found)


def _refuse_other(spec: TrainSpec, adapter: Adapter, ranks: list[int]) -> None:
    """Refuse options that the file contradicts."""
    where = f"{adapter.where} states"
    if spec.rank is not None and [spec.rank] != ranks:
        raise ParameterError(f"rank={spec.rank} was given, {where} {', '.join(map(str, ranks))}; leave it out.")
    if spec.quant != "none" and adapter.quant not in (None, spec.quant):
        raise ParameterError(f"quant={spec.quant!r} was given, {where} {adapter.quant!r}; leave it out.")
    lists = (
        ("targets", spec.targets, adapter.targets, matches),
        ("train_parts", spec.train_parts, adapter.full, in_part),
    )
    for name, given, there, meant in lists:
        odd = [pattern for pattern in given if not any(meant(one, pattern) for one in there)]
        missed = [one for one in there if given and not any(meant(one, pattern) for pattern in given)]
        if odd or missed:
            what = f"has nothing for {odd[0]!r}" if odd else f"has {missed[0]} too"
            raise ParameterError(
                f"{name}={list(given)} was given, and {adapter.where} {what}; what is trained further is what it has.\n"
                f"Leave {name} out."
            )


def planned_further(spec: TrainSpec, layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> list[Planned]:
    """What would be trained of the adapter that it starts from.

    Raises:
        LayoutError: an adapter of another model.
    """
    alpha = spec.alpha if ADAPTER_KINDS[spec.kind].takes_alpha else None
    with open_adapter(spec.start, alpha=alpha) as adapter:
        adapter.check(shapes, layout)
        rows: list[Planned] = []
        for name, target in adapter.targets.items():
            parts = [v for part, v in target.tensors.items() if not part.startswith("init_")]
            out, into = shapes[f"{name}.weight"]
            rows.append((f"{name}.weight", (out, into), sum(math.prod(v.shape) for v in parts)))
        rows += [(name, tuple(v.shape), math.prod(v.shape)) for name, v in adapter.full.items()]
    return rows
