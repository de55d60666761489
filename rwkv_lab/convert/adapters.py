"""Adapters between layouts: one file as RWKV-PEFT writes it, or a folder of Hugging Face's peft, under BlinkDL's names
or those of a foreign format, so that an adapter that was trained in one place merges in the other."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from rwkv_lab.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from rwkv_lab.checkpoint.adapter_names import their_module
from rwkv_lab.checkpoint.foreign_format import FOREIGN_FORMATS, ForeignFormat, general_name
from rwkv_lab.checkpoint.layout import possible_versions
from rwkv_lab.checkpoint.numerics import round_to
from rwkv_lab.checks import Check
from rwkv_lab.convert.containers import CONTAINERS
from rwkv_lab.convert.output import Output, Tensors, computed, copied
from rwkv_lab.convert.plan import ConvertPlan
from rwkv_lab.convert.spec import ConvertSpec
from rwkv_lab.convert.targets import PLAIN
from rwkv_lab.errors import LayoutError, ParameterError
from rwkv_lab.lazy_torch import torch
from rwkv_lab.peft import hf_layout, rwkv_peft_layout
from rwkv_lab.peft.adapter import Adapter, Target, Values
from rwkv_lab.peft.config import ADAPTER_KINDS
from rwkv_lab.peft.files import read_adapter
from rwkv_lab.text import counted

_STATED_ELSEWHERE = ("pissa_init", "bat")  # of `open_adapter`: what `save_adapter` writes down


def is_adapter(ck: Checkpoint) -> bool:
    """Whether it is an adapter: of a kind that is known, or a folder that states another one, which is refused then."""
    return ck.kind in ADAPTER_KINDS or ck.adapter_config is not None


def about_copy(ck: Checkpoint) -> list[str]:
    """Of an adapter that is copied as it is: what is odd about it, in words.

    Raises:
        LayoutError: no program could read it as an adapter.
    """
    for alpha in (None, 1.0):  # a copy does not have to know it
        try:
            adapter = _read(ck, alpha)
            return [*adapter.notes, *_of_no_model(adapter)]
        except ParameterError:  # something that the file does not state
            continue
    return []


def adapter_output(ck: Checkpoint, spec: ConvertSpec, out: Path) -> Output:
    """An adapter as a target's trainers hold it. Its tensors stay in `ck`.

    Raises:
        ParameterError: something that the file does not state was not given, or the layout cannot express the adapter.
        LayoutError: it adapts layers that the target does not have, or could be of several generations.
    """
    _refuse_without_folders(spec)
    adapter = _read(ck, spec.alpha)
    notes = [*adapter.notes, *_of_no_model(adapter)]
    if spec.to in PLAIN and out.suffix:
        tensors, note = rwkv_peft_layout.written(adapter)
        content = _content(tensors, {name: name for name in tensors}, spec.output_dtype)
        note_of = {rwkv_peft_layout.NOTE: note}
        return Output(spec, CONTAINERS[spec.to], content, notes=notes, as_adapter=True, file_notes=note_of)
    known = None if spec.to in PLAIN else _format(adapter, spec)
    parts, settings = hf_layout.written(adapter)
    names = {name: name if known is None else _their_name(known, name) for name in parts}
    if known is not None:
        settings = _their_settings(known, settings)
    content = _content(parts, {name: hf_layout.PREFIX + theirs for name, theirs in names.items()}, spec.output_dtype)
    config = (json.dumps(dict(sorted(settings.items())), indent=2) + "\n").encode()
    quant = {} if adapter.quant is None else {hf_layout.QUANT: adapter.quant}
    others = {"adapter_config.json": config}
    notes += _recomputed(adapter, parts)
    return Output(
        spec, CONTAINERS["adapter"], content, known, notes=notes, others=others, as_adapter=True, file_notes=quant
    )


def _of_no_model(adapter: Adapter) -> list[str]:
    """Layers that are in no RWKV model, in words.

    Raises:
        LayoutError: all are.
    """
    rows = [row for known in FOREIGN_FORMATS.values() for row in (*known.rows, *known.older)]
    others = _not_among({name for row in rows for name in row.names}, adapter.targets)
    if others and len(others) == len(adapter.targets):
        odd = _not_among({row.theirs for row in rows}, others) or others
        raise LayoutError(
            f"{adapter.where} is no adapter of an RWKV model that is read: its layers are in none, such as {odd[0]}."
        )
    if not others:
        return []
    return [
        f"{len(others)} of {counted(len(adapter.targets), 'layer')} that the adapter changes are in no RWKV "
        f"model, first "
        f"{others[0]}: there is no base that it can be merged into."
    ]


def _not_among(names: Collection[str], layers: Iterable[str]) -> list[str]:
    return [x for x in layers if not {general_name(f"{x}.weight")[0], general_name(x)[0]} & {*names}]


def _recomputed(adapter: Adapter, parts: dict[str, Values]) -> list[str]:
    """Layers whose change is held by other matrices than in the source, in words."""
    made = [name for name, values in parts.items() if not isinstance(values, TensorInfo)]
    changed = [x for x in adapter.targets if any(name.startswith(f"{x}.") for name in made)]
    if not changed:
        return []
    return [
        f"{counted(len(changed), 'layer')} of the {adapter.method} adapter become LoRA of another rank, "
        "which makes the same "
        "change; what they started from is not kept."
    ]


def _read(ck: Checkpoint, alpha: float | None) -> Adapter:
    """The adapter as `merge` reads it.

    Raises:
        ParameterError: something that the file does not state; says how an adapter file is made that states it.
    """
    try:
        return read_adapter(ck, alpha=alpha)
    except ParameterError as e:
        missing = [name for name in _STATED_ELSEWHERE if f"{name}=" in str(e)]
        if not missing:
            raise
        text = str(e).replace("\n", " ")
        raise ParameterError(
            f"{text}\nOnly alpha= is taken by convert. For the others make a file that states them, and convert that:\n"
            f"with rwkv_lab.peft.open_adapter({str(ck.path)!r}, {missing[0]}=…) as a: save_adapter(a, 'stated.pth')"
        ) from None


def _content(tensors: dict[str, Values], names: dict[str, str], dtype: torch.dtype | None) -> Tensors:
    content = []
    for name, values in tensors.items():
        wanted, theirs = dtype or values.dtype, names[name]
        if isinstance(values, TensorInfo):
            content.append(copied(theirs, (name,), values, values.shape, wanted))
        else:
            content.append(computed(theirs, (name,), values.read, values.shape, wanted, "computed"))
    return content


def _refuse_without_folders(spec: ConvertSpec) -> None:
    """Refuse a target whose readers take no adapter.

    Raises:
        LayoutError: says what to do.
    """
    if spec.to not in PLAIN and not any(
        f.target == spec.to and f.container == "folder" for f in FOREIGN_FORMATS.values()
    ):
        raise LayoutError(
            f"to={spec.to!r}: what reads it takes no folder of Hugging Face's peft.\n"
            f"Merge the adapter into its base, then convert the merged model to {spec.to}."
        )


def _format(adapter: Adapter, spec: ConvertSpec) -> ForeignFormat:
    """The format of the target that has every layer of the adapter.

    Raises:
        LayoutError: none has, or several have.
        ParameterError: `generation` is not one that its layers can be of.
    """
    names = [f"{x}.weight" for x in adapter.targets]
    could_be = possible_versions([*names, *adapter.full])[0]
    versions = could_be & {spec.generation} if spec.generation else could_be
    if could_be and not versions:
        raise ParameterError(
            f"generation={spec.generation!r}: the layers of {adapter.where} are those of RWKV-"
            f"{' or '.join(sorted(could_be))}."
        )
    formats = [f for f in FOREIGN_FORMATS.values() if f.target == spec.to]
    of_generation = [f for f in formats if not versions or versions & set(f.versions)]
    if not of_generation:
        takes = ", ".join(sorted({version for f in formats for version in f.versions}))
        raise LayoutError(
            f"to={spec.to!r} takes adapters of RWKV-{takes}; this is of RWKV-{' or '.join(sorted(versions))}."
        )
    fitting = [f for f in of_generation if all(their_module(f, x) for x in adapter.targets)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        could = ", ".join(sorted(version for f in fitting for version in f.versions))
        raise LayoutError(f"The adapter could be of RWKV-{could}. Pass generation=, the one of its base.")
    missing = next(x for x in adapter.targets if not their_module(of_generation[-1], x))
    raise LayoutError(
        f"to={spec.to!r} has no layer for every one that the adapter changes, such as {missing}, in RWKV-"
        f"{' or '.join(sorted(versions)) or 'x'}."
    )


def _their_name(known: ForeignFormat, name: str) -> str:
    """The name there of a part of an adapter, or of a whole tensor.

    Raises:
        ParameterError: there is none.
    """
    end = len(name)
    while end > 0:
        end = name.rfind(".", 0, end)
        theirs = their_module(known, name[:end]) if end > 0 else None
        if theirs is not None:
            return theirs + name[end:]
    whole = next((row.theirs for row in known.rows if row.ours == name), None)
    if whole is None:
        raise ParameterError(
            f"{name} is trained whole, and has no name in {known.described}. Write safetensors or pth instead."
        )
    return whole


def _their_settings(known: ForeignFormat, settings: dict[str, Any]) -> dict[str, Any]:
    def pattern(names: dict[str, Any]) -> dict[str, Any]:
        return {_their_name(known, x.replace("\\", "")).replace(".", r"\."): value for x, value in names.items()}

    changed: dict[str, Any] = {"target_modules": [their_module(known, x) for x in settings["target_modules"]]}
    changed |= {key: pattern(settings[key]) for key in ("rank_pattern", "alpha_pattern") if settings.get(key)}
    if settings.get("modules_to_save"):
        changed["modules_to_save"] = [_their_name(known, f"{m}.weight")[:-7] for m in settings["modules_to_save"]]
    return settings | changed


def verify_adapter(plan: ConvertPlan) -> list[Check]:
    """Open what was written as an adapter and compare it with the source: the layers that it changes, how each change
    is scaled, and every tensor."""
    with plan.source_opened(), open_checkpoint(plan.out) as written:
        ours, theirs = read_adapter(plan.checkpoint, alpha=plan.spec.alpha), read_adapter(written)
        layers = set(ours.targets) ^ set(theirs.targets) | set(ours.full) ^ set(theirs.full)
        both = [x for x in ours.targets if x in theirs.targets]
        wrong = [x for x in both if not _same_change(ours.targets[x], theirs.targets[x])]
        wrong += [n for n in ours.full if n in theirs.full and not _same_values(ours.full[n], theirs.full[n])]
        return [
            Check("layers that only one of source and output changes", len(layers), 0, not layers),
            Check(f"changes that differ from the source's, of {len(both) + len(ours.full)}", len(wrong), 0, not wrong),
        ]


def _same_change(ours: Target, theirs: Target) -> bool:
    """The same tensors up to the output's dtype, scaled the same; or, where parts were computed, the same product."""
    if {*ours.tensors} == {*theirs.tensors}:
        same = all(_same_values(values, theirs.tensors[name]) for name, values in ours.tensors.items())
        return same and ours.settings() == theirs.settings()
    a, b = ours.factors(), theirs.factors()
    return a is not None and b is not None and torch.allclose(a[0] @ a[1], b[0] @ b[1], rtol=1e-2, atol=1e-6)


def _same_values(ours: Values, theirs: Values) -> bool:
    found, expected = theirs.read(), round_to(ours.read(), theirs.dtype)
    return torch.equal(found.flatten().nan_to_num(), expected.flatten().nan_to_num())
