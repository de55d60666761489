"""Methods "lora", "pissa", "miss" and "adapters": what was trained beside a frozen base is worked into its matrices.

Which of them a file is, `rwkv_lab.peft.open_adapter` reads off it. Several adapters are taken in the order of the list,
each on what the ones before it left (it matters for MiSS's bats alone); a weight scales what its adapter adds. Where
training kept the base in fewer bits (`quant`), every matrix of the layers is quantised and restored first. A whole
tensor in an adapter takes the place of the base's. With `unmerge` the same is taken out again, in reverse.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rwkv_lab.checkpoint import Checkpoint, Layout, TensorInfo, open_checkpoint
from rwkv_lab.checkpoint.source import BLOCK
from rwkv_lab.errors import LayoutError, NumericsError, ParameterError
from rwkv_lab.merge.change import Change, overwrite
from rwkv_lab.merge.overlay import refuse_prefix
from rwkv_lab.names import is_block_matrix, split_block
from rwkv_lab.paths import to_path
from rwkv_lab.patterns import matches_any
from rwkv_lab.peft.adapter import Adapter, Target, refuse_overlap
from rwkv_lab.peft.files import open_adapter
from rwkv_lab.peft.hf_layout import PREFIX
from rwkv_lab.peft.quantised import QUANTS, quantised_and_back

KINDS = {"lora": "lora", "pissa": "pissa", "miss": "miss", "bone": "miss"}  # of a checkpoint -> method
TAKES = {
    "use_rslora": "whether a LoRA whose file does not say is scaled by alpha / sqrt(r); False",
    "bat": '"hf" or "rwkv-peft": which of the two a MiSS block of three dimensions means, where its file does not say',
    "residual_base": "True: of PiSSA, the base given is what the SVD left over, so that no pissa_init is needed",
    "quant": 'how training stored the base: "nf4", "int8" or "none"; what the file says, else "none"',
    "unmerge": "True: take the adapters out of a base that holds them",
}
_PER_ADAPTER = ("alpha", "use_rslora", "bat", "residual_base", "pissa_init")
_PIECES = 96  # of a block's bytes that one thread holds at most: a dozen matrices of float64 from 16-bit weights, twice


@dataclass(frozen=True)
class Adapters:
    """Open adapters, and how they are to be merged. Close them by `with`."""

    opened: tuple[Adapter, ...]
    weights: tuple[float, ...]
    quant: str
    unmerge: bool
    inits: tuple[Path | None, ...]  # files of PiSSA's start, one per adapter

    @property
    def method(self) -> str:
        methods = {a.method for a in self.opened}
        return methods.pop() if len(methods) == 1 else "adapters"

    @property
    def init_files(self) -> list[Checkpoint]:
        return [ck for adapter in self.opened for ck in adapter.opened[1:]]

    def __enter__(self) -> "Adapters":
        return self

    def __exit__(self, *exc) -> None:
        for adapter in self.opened:
            adapter.close()


def open_adapters(
    tuned: Sequence[Checkpoint],
    method: str,
    alpha: float | None,
    weights: Sequence[float] | None,
    pissa_init: str | Path | Sequence | None,
    parameters: Mapping[str, object],
) -> Adapters:
    """Read the headers of adapters, and say what is missing to merge them.

    Args:
        method: one of them, or "auto".
        alpha, pissa_init, and `parameters` but quant and unmerge: one value for all, or a list with one per adapter.
    Raises:
        ParameterError: what a file does not say and was not given, or was given and is said otherwise.
        LayoutError: an adapter that is incomplete, or two that carry the same whole tensor.
    """
    given = {"alpha": alpha, "pissa_init": pissa_init} | dict(parameters)
    _check_given(given, len(tuned))
    if weights is not None and len(weights) != len(tuned):
        raise ParameterError(f"weights={list(weights)!r}: one per adapter is needed, {len(tuned)} in all")
    asked = [{k: _of(given.get(k), i) for k in _PER_ADAPTER} for i in range(len(tuned))]
    # One alpha of 0 for all gives the base, whatever the weights are; `merge` sees to that.
    alphas = [one["alpha"] if isinstance(alpha, (list, tuple)) else None for one in asked]
    with ExitStack() as stack:
        opened = []
        for ck, one in zip(tuned, asked, strict=True):
            if one["alpha"] == 0:  # nothing of it: any alpha will do, where one is asked for
                says = ck.kind != "lora" or ck.adapter_config is not None or ck.metadata.get("rwkv_lab.adapter")
                one["alpha"] = None if says else 1.0
            adapter = stack.enter_context(open_adapter(ck.path, **one | {"residual_base": bool(one["residual_base"])}))
            if method not in ("auto", "adapters", adapter.method):
                raise ParameterError(f"method={method!r}, and {ck.path} is {adapter.method}; say method='auto'")
            opened.append(adapter)
        refuse_overlap(opened)
        _refuse_whole_and_adapted(opened)
        stack.pop_all()
    return Adapters(
        tuple(opened),
        tuple(float(w) * (a != 0) for w, a in zip(weights or [1.0] * len(opened), alphas, strict=True)),
        _quant(opened, given.get("quant")),
        bool(given.get("unmerge")),
        tuple(None if one["pissa_init"] is None else Path(one["pissa_init"]) for one in asked),
    )


def check_adapter_files(tuned: Sequence[str | Path], method: str, alpha, weights, pissa_init, parameters) -> None:
    """Refuse what `open_adapters` refuses, of files that are not open."""
    with ExitStack() as stack:
        cks = [stack.enter_context(open_checkpoint(path)) for path in tuned]
        stack.enter_context(open_adapters(cks, method, alpha, weights, pissa_init, parameters))


def changes(
    base: Checkpoint,
    tuned: Sequence[Checkpoint],
    layout: Layout,
    adapters: Adapters,
    precision: torch.dtype,
    allow_extra: Sequence[str],
) -> list[Change]:
    """One change per adapted matrix, per matrix that is only quantised, and per whole tensor.

    Raises:
        LayoutError: an adapter of another generation or other dimensions, or names the base does not have.
        ParameterError: whole tensors that are to be taken out again.
    """
    shapes = {n: t.shape for n, t in base.info.items()}
    for ck, adapter in zip(tuned, adapters.opened, strict=True):
        _refuse_unmatched(ck, adapter, base)
        known = {n: v for n, v in adapter.full.items() if n in shapes or not matches_any(n, allow_extra)}
        replace(adapter, full=known).check(shapes, layout)
    pairs = [(a, w) for a, w in zip(adapters.opened, adapters.weights, strict=True) if w]
    whole = {n: (v, w) for a, w in pairs for n, v in a.full.items()}
    if adapters.unmerge and whole:
        raise ParameterError(
            f"{next(iter(whole))} stands whole in an adapter; what it replaced cannot be had from the merged file.\n"
            "Take the base that it was merged into."
        )
    steps: dict[str, list[tuple[Target, float]]] = {}
    for adapter, weight in pairs:
        for x, target in adapter.targets.items():
            steps.setdefault(f"{x}.weight", []).append((target, weight))
    quant = "none" if adapters.unmerge else adapters.quant
    action = "unmerge" if adapters.unmerge else adapters.method
    out = []
    for name, info in base.info.items():
        packed = quant != "none" and name not in whole and is_block_matrix(name, info.shape)
        if name in steps:
            out.append(_changed(name, info, steps[name], quant, adapters.unmerge, precision, action))
        elif packed and pairs:
            out.append(_changed(name, info, [], quant, False, precision, "quantise"))
    return out + [overwrite(n, base.info.get(n), v, w, precision) for n, (v, w) in whole.items()]


def memory_for(base: Checkpoint, adapters: Adapters, precision: torch.dtype) -> int:
    """Bytes that one thread holds at most: an adapter's parts for one matrix in the precision, and pieces of it."""
    parts: dict[str, int] = {}
    piece = BLOCK
    for adapter in adapters.opened:
        for x, target in adapter.targets.items():
            size = sum(
                math.prod(v.shape) * (v.dtype.itemsize + 2 * precision.itemsize) for v in target.tensors.values()
            )
            parts[x] = parts.get(x, 0) + size
    for name, info in base.info.items():
        targets = [a.targets[name[:-7]] for a in adapters.opened if name[:-7] in a.targets]
        if targets:
            rows = _row_multiple(info, targets, adapters.quant)
            piece = max(piece, rows * info.shape[1] * info.dtype.itemsize)
    return max(parts.values()) + _PIECES * piece


def notes_on_adapters(base: Checkpoint, adapters: Adapters) -> tuple[str, ...]:
    """Sentences for the plan and the report."""
    notes = []
    if adapters.quant != "none" and not adapters.unmerge:
        notes.append(
            f"The base was quantised to {adapters.quant} in training, stored as in training: what rounding took away "
            "is lost."
        )
    for adapter in adapters.opened:
        touched = {inside[0] for x in adapter.targets if (inside := split_block(x))}
        n_layer = base.layout.n_layer
        if len(touched) < n_layer:
            notes.append(
                f"{Path(adapter.where).name} adapts {len(touched)} of {n_layer} layers: right if it was trained so, "
                "wrong if it is of a model with fewer layers."
            )
    if any(a.residual_base for a in adapters.opened):
        notes.append("PiSSA without its start: right only if the base given is what the SVD left over of the original.")
    if len(adapters.opened) > 1:
        order = ", ".join(
            f"{Path(a.where).name} × {w:g}" for a, w in zip(adapters.opened, adapters.weights, strict=True)
        )
        notes.append(f"Order of the adapters: {order}{', taken out from the last to the first' * adapters.unmerge}.")
    return tuple(notes)


def _changed(
    name: str,
    info: TensorInfo,
    steps: list[tuple[Target, float]],
    quant: str,
    unmerge: bool,
    precision: torch.dtype,
    action: str,
) -> Change:
    multiple = _row_multiple(info, [target for target, _ in steps], quant)

    def compute() -> Iterator[torch.Tensor]:
        ready = [target.prepared(weight, precision) for target, weight in steps]
        first = 0
        for rows in _row_blocks(info, multiple):
            values = rows.to(precision)  # [rows, in]
            if unmerge:
                for target in reversed(ready):
                    values = _restored(name, target, values, first)
            for i, target in enumerate([] if unmerge else ready):
                values = target.residual_rows(values, first)
                if i == 0 and quant != "none":
                    values = quantised_and_back(values, quant)
                values = target.adapted_rows(values, first)
            if not ready:
                values = quantised_and_back(values, quant)
            first += len(values)
            yield values.flatten()

    source = "base + tuned" if steps else "base"
    return Change(name, action, source, info.shape, info.dtype, compute=compute)


def _restored(name: str, target: Target, values: torch.Tensor, first: int) -> torch.Tensor:
    try:
        return target.restored_rows(values, first)
    except torch.linalg.LinAlgError as e:
        raise NumericsError(f"{name}: this bat cannot be undone, its I + D has no inverse.") from e


def _row_multiple(info: TensorInfo, targets: Sequence[Target], quant: str) -> int:
    """Rows that belong together: of an adapter's tile, and of NF4's blocks of 64 values."""
    whole_blocks = 64 // math.gcd(info.shape[1], 64) if quant == "nf4" else 1
    return math.lcm(whole_blocks, *(t.row_multiple for t in targets))


def _row_blocks(info: TensorInfo, multiple: int) -> Iterator[torch.Tensor]:
    """Its rows in order, `[rows, in]`, in such multiples; a strided tensor comes whole and is cut here."""
    columns = info.shape[1]
    at_once = max(BLOCK // info.dtype.itemsize // (columns * multiple), 1) * multiple
    for block in info.blocks(multiple=columns * multiple):
        yield from block.view(-1, columns).split(at_once)


def _check_given(given: Mapping[str, object], count: int) -> None:
    for name, value in given.items():
        if isinstance(value, (list, tuple)) and (name not in _PER_ADAPTER or len(value) != count):
            raise ParameterError(f"{name}={value!r}: one value is needed, or a list of {count}, one per adapter")
    for name in ("use_rslora", "residual_base", "unmerge"):
        value = given.get(name)
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if one is not None and not isinstance(one, bool):
                raise ParameterError(f"{name}={one!r}: it must be True or False")
    if given.get("quant") is not None and given["quant"] not in QUANTS:
        raise ParameterError(f"quant={given['quant']!r}: it must be one of {', '.join(QUANTS)}")
    value = given.get("pissa_init")
    for one in value if isinstance(value, (list, tuple)) else [value]:
        if one is not None:
            to_path(one, "pissa_init")


def _of(value: object, i: int) -> object:
    return value[i] if isinstance(value, (list, tuple)) else value


def _quant(opened: Sequence[Adapter], given: str | None) -> str:
    """How the base was stored in training.

    Raises:
        ParameterError: adapters that say differing things, or another than was given.
    """
    said = {a.quant for a in opened if a.quant is not None}
    if len(said) > 1:
        raise ParameterError(
            f"the adapters were trained on bases stored as {' and as '.join(sorted(said))}; merge them\none by one"
        )
    if said and given is not None and given not in said:
        raise ParameterError(f"quant={given!r} was given, {opened[0].where} says {said.pop()!r}; leave it out")
    return given or (said.pop() if said else "none")


def _refuse_whole_and_adapted(opened: Sequence[Adapter]) -> None:
    for a in opened:
        for b in opened:
            clash = next((x for x in a.targets if f"{x}.weight" in b.full), None)
            if clash:
                raise LayoutError(
                    f"{clash}.weight stands whole in {b.where}, and {a.where} adapts it; only one can be meant."
                )


def _refuse_unmatched(ck: Checkpoint, adapter: Adapter, base: Checkpoint) -> None:
    """A file whose names begin with a wrapper's prefix, or which is of no model like the base."""
    stems = {n.removesuffix(".weight") for n in base.info}
    names = {n.removeprefix(PREFIX) if adapter.layout == "hf" else n: t for n, t in ck.info.items()}
    unmatched = [n for n in names if not any(n[:i] in stems for i, c in enumerate(n) if c == ".")]
    refuse_prefix([n for n in unmatched if n not in base.info], names, base)
