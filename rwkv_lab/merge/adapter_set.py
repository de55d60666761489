"""Adapters that are merged together: read from open files, with what was given for each, and checked side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

from rwkv_lab.checkpoint import Checkpoint
from rwkv_lab.errors import LayoutError, ParameterError
from rwkv_lab.merge.inputs import value_of
from rwkv_lab.merge.spec import MergeSpec
from rwkv_lab.peft.adapter import Adapter, refuse_overlap
from rwkv_lab.peft.files import read_adapter

ANY = "adapters"  # the method of adapters of several kinds


@dataclass(frozen=True)
class AdapterSet:
    """Adapters in the order in which they are merged."""

    adapters: tuple[Adapter, ...]
    init: tuple[Checkpoint | None, ...]  # one per adapter: of PiSSA, what it started from
    weights: tuple[float, ...]  # factor on what each adds
    quant: str  # how training stored the base: "none", "int8" or "nf4"
    unmerge: bool  # they are taken out of a base that contains them

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
            alpha = None if states_it else 1.0
        use_rslora, bat, residual = (
            value_of(spec.parameters.get(name), i) for name in ("use_rslora", "bat", "residual_base")
        )
        adapter = read_adapter(ck, start, alpha, use_rslora, bat, bool(residual))
        if spec.method not in (ANY, adapter.method):
            raise ParameterError(f"method={spec.method!r}, and {ck.path} is {adapter.method}; pass method='auto'")
        adapters.append(adapter)
    refuse_overlap(adapters)
    _refuse_whole_and_adapted(adapters)
    weights = spec.weights or [1.0] * len(adapters)
    return AdapterSet(
        tuple(adapters),
        tuple(init),
        tuple(w * (alpha != 0) for w, alpha in zip(weights, alphas, strict=True)),
        _quant(adapters, spec.parameters.get("quant")),
        bool(spec.parameters.get("unmerge")),
    )


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
