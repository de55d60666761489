"""Adapters that are merged together: read from open files, with what was given for each, and checked side by side."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rwkv_lab.checkpoint import Checkpoint
from rwkv_lab.errors import LayoutError, ParameterError
from rwkv_lab.merge.inputs import init_paths, value_of
from rwkv_lab.merge.method_parameters import Parameter, Takes, check_values
from rwkv_lab.merge.settings import GRADIENT, REST, check_setting, value_for, with_default
from rwkv_lab.merge.spec import SVD, MergeSpec
from rwkv_lab.peft.adapter import Adapter, refuse_overlap
from rwkv_lab.peft.files import read_adapter
from rwkv_lab.peft.pissa_start import check_computable, with_computed_start
from rwkv_lab.text import counted

ANY = "adapters"  # the method of adapters of several kinds
WEIGHTS = Parameter("weights", float, Takes("factor on what an adapter adds; one per adapter", each="tuned"), 1.0)


@dataclass(frozen=True)
class AdapterSet:
    """Adapters in the order in which they are merged."""

    adapters: tuple[Adapter, ...]
    init: tuple[Checkpoint | None, ...]  # one per adapter: of PiSSA, what it started from
    weights: tuple[Any, ...]  # factor on what each adds: a number, or a setting that differs by tensor
    quant: str  # how training stored the base: "none", or another of `rwkv_lab.peft.settings.QUANTS`
    unmerge: bool  # they are taken out of a base that contains them

    def weight(self, i: int, name: str, n_layer: int) -> float:
        """The factor on what the i-th adapter adds to the tensor `name`.

        Raises:
            ParameterError: none is given for it, or no number.
        """
        setting = self.weights[i]
        where = f" for {name}" if isinstance(setting, Mapping) else ""
        return check_values(WEIGHTS, value_for(setting, name, n_layer), 1, where)[0]

    def goes_into(self, i: int, applied: Iterable[str], n_layer: int) -> set[str]:
        """The matrices that the i-th adapter changes, of a merge that changes the tensors `applied`."""
        names, targets = set(applied), self.adapters[i].targets
        return {x for x in targets if f"{x}.weight" in names and self.weight(i, f"{x}.weight", n_layer)}

    @property
    def method(self) -> str:
        methods = {a.method for a in self.adapters}
        return methods.pop() if len(methods) == 1 else ANY


def read_adapters(tuned: Sequence[Checkpoint], init: Sequence[Checkpoint | None], spec: MergeSpec) -> AdapterSet:
    """The adapters in open files; only headers are read.

    Args:
        spec: as the family checked it. A list in alpha or parameters has one value per adapter.
    Raises:
        ParameterError: what a file does not state and was not given, or was given and is stated otherwise.
        LayoutError: an adapter that is incomplete, or two that carry the same whole tensor.
    """
    adapters, alphas = [], []
    for i, (ck, start) in enumerate(zip(tuned, init, strict=True)):
        alpha = value_of(spec.alpha, i)
        # One alpha of 0 for all gives the base, whatever the weights are; planning sees to that.
        alphas.append(alpha if isinstance(spec.alpha, list) else None)
        if alpha == 0:  # nothing of it: any alpha will do, where one is needed
            states_it = ck.kind != "lora" or ck.adapter_config is not None or ck.metadata.get("rwkv_lab.adapter")
            states_it = states_it or any(name.endswith(".alpha") for name in ck.info)
            alpha = None if states_it else 1.0
        use_rslora, bat, residual = (
            value_of(spec.parameters.get(name), i) for name in ("use_rslora", "bat", "residual_base")
        )
        computed = init_paths(spec.pissa_init, len(tuned))[i] == SVD
        if computed:
            check_computable(ck)
        adapter = read_adapter(ck, start, alpha, use_rslora, bat, bool(residual) or computed)
        if spec.method not in (ANY, adapter.method):
            raise ParameterError(f"method={spec.method!r}, and {ck.path} is {adapter.method}; pass method='auto'")
        adapters.append(adapter)
    refuse_overlap(adapters)
    _refuse_whole_and_adapted(adapters)
    weights = spec.weights or [1.0] * len(adapters)
    return AdapterSet(
        tuple(adapters),
        tuple(init),
        tuple(0.0 if alpha == 0 else w for w, alpha in zip(weights, alphas, strict=True)),
        _quant(adapters, spec.parameters.get("quant")),
        bool(spec.parameters.get("unmerge")),
    )


def with_computed_starts(adapters: AdapterSet, spec: MergeSpec, base: Checkpoint) -> AdapterSet:
    """The set; where pissa_init is "svd", with starts that are computed from the base when they are read."""
    starts = init_paths(spec.pissa_init, len(adapters.adapters))
    each = [
        with_computed_start(adapter, base) if start == SVD else adapter
        for adapter, start in zip(adapters.adapters, starts, strict=True)
    ]
    return replace(adapters, adapters=tuple(each))


def weights_of_each(given: Any, count: int) -> list[Any]:
    """One setting per adapter, with 1 where no pattern of it matches.

    Args:
        given: a list with one for each, or a mapping for all, whose values may be lists of numbers.
    Raises:
        ParameterError: more or fewer than there are adapters, or no number.
    """
    if not isinstance(given, list | Mapping) or isinstance(given, list) and len(given) != count:
        raise ParameterError(
            f"weights={given!r}: a list of {counted(count, 'number')} is needed, one per adapter.\n"
            "One that differs by tensor is a mapping: {'blocks.0.*': 0.5, '*': 1.0}."
        )
    each = given if isinstance(given, list) else [_of_one(given, i, count) for i in range(count)]
    return [with_default(w, 1.0) if isinstance(w, Mapping) else check_values(WEIGHTS, w, 1, "")[0] for w in each]


def _of_one(setting: Any, i: int, count: int) -> Any:
    """The part of a setting for all adapters that is the i-th one's."""
    if isinstance(setting, Mapping) and GRADIENT not in setting:
        return {pattern: _of_one(inner, i, count) for pattern, inner in setting.items()}
    if isinstance(setting, list):
        if len(setting) != count:
            needed = f"{count} {'number is' if count == 1 else 'numbers are'} needed"
            raise ParameterError(f"weights has the list {setting!r}; {needed}, one per adapter")
        return setting[i]
    return setting


def check_weights(adapters: AdapterSet, n_layer: int) -> None:
    """Refuse patterns that match nothing that the adapter changes, and values that are no numbers.

    Raises:
        ParameterError: with the nearest names.
    """
    for i, adapter in enumerate(adapters.adapters):
        names = [*(f"{x}.weight" for x in adapter.targets), *adapter.full]
        if isinstance(adapters.weights[i], Mapping):
            given = {p: s for p, s in adapters.weights[i].items() if p != REST}
            check_setting("weights", given, names)
        for name in names:
            adapters.weight(i, name, n_layer)


def _quant(adapters: Sequence[Adapter], given: str | None) -> str:
    """How the base was stored in training.

    Raises:
        ParameterError: adapters that state different things, or another than was given.
    """
    stated = {a.quant for a in adapters if a.quant is not None}
    if len(stated) > 1:
        raise ParameterError(
            f"the adapters were trained on bases stored as {' and as '.join(sorted(stated))}; merge them\none by one"
        )
    own = stated.pop() if stated else None
    if own is not None and given is not None and given != own:
        raise ParameterError(f"quant={given!r} was given, {adapters[0].where} states {own!r}; leave it out")
    return given or own or "none"


def _refuse_whole_and_adapted(adapters: Sequence[Adapter]) -> None:
    for a in adapters:
        for b in adapters:
            clash = next((x for x in a.targets if f"{x}.weight" in b.full), None)
            if clash:
                raise LayoutError(
                    f"{clash}.weight stands whole in {b.where}, and {a.where} adapts it; only one can be meant."
                )
