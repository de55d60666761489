"""Which adapters a checkpoint says that it contains, and what follows: none goes in twice, and what comes out is what
went in.

An entry, as of `rwkv_lab.checkpoint.contents`, is {"name", "fingerprint", "weight"}, how the adapter was merged:
{"scaling", "variant", "start", "quant", "include", "exclude"}, and what it is known again by in another file: its
"content" (`adapter_content`) and, of those that rwkv_lab trained, its "training".
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from rwkv_lab.checkpoint import Checkpoint, file_facts
from rwkv_lab.checkpoint.contents import adapters_in, mixed
from rwkv_lab.checkpoint.origin import origin_of
from rwkv_lab.checkpoint.provenance import printable, records_of
from rwkv_lab.errors import ParameterError
from rwkv_lab.merge.adapter_content import blank, closeness, content_of, is_same, same_layers, without_change
from rwkv_lab.merge.adapter_set import AdapterSet
from rwkv_lab.merge.changed_tensors import ChangedTensor
from rwkv_lab.merge.spec import MergeSpec
from rwkv_lab.names import split_block
from rwkv_lab.patterns import is_selected
from rwkv_lab.peft.adapter import Adapter
from rwkv_lab.text import counted


def after_changes(base: Checkpoint, tuned: Sequence[Checkpoint], changes: Sequence[ChangedTensor]) -> list[dict]:
    """What an output with these changes contains: an adapter may be in whatever part of a model went in.

    Where no matrix of a layer is changed, the base's adapters are in there as they were.
    """
    if all(change.source == "base" for change in changes):
        return adapters_in(base)
    kept = not any(split_block(change.name) and change.name.endswith(".weight") for change in changes)
    own = adapters_in(base)
    whole = {one["fingerprint"] for one in own} if kept else set()
    others = [one for one in adapters_in(base, *tuned) if one["fingerprint"] not in whole]
    return [*(own if kept else []), *map(mixed, others)]


def after_merging(
    base: Checkpoint,
    tuned: Sequence[Checkpoint],
    adapters: AdapterSet,
    spec: MergeSpec,
    applied: Iterable[str],
    look: bool = False,
) -> tuple[list[dict], tuple[str, ...]]:
    """What the output of merging adapters, or taking them out, says that it contains; and notes for the plan.

    Args:
        applied: names of the tensors that the merge changes.
        look: read the adapters' values. Where the base contains adapters they are read anyway.
    Raises:
        ParameterError: the base contains one of them already, two are the same, or they are to be taken out in another
            way than they went in.
    """
    held = adapters_in(base)
    new = [
        _entry(ck, adapter, init, weight, adapters.quant, spec, look or bool(held))
        for ck, adapter, init, weight in zip(tuned, adapters.adapters, adapters.init, adapters.weights, strict=True)
        if weight
    ]
    _refuse_twice(new)
    if adapters.unmerge:
        return _without(base, held, new)
    n_layer = base.layout.n_layer if base.layout else 0
    into = [adapters.goes_into(i, applied, n_layer) for i, weight in enumerate(adapters.weights) if weight]
    notes = _notes_on_parts(new, held, into)
    for one in new:
        still = without_change(_content(one)) if look else 0
        if still:
            notes.append(
                f"{one['name']} adds nothing to {still} of {counted(len(_content(one)), 'matrix', 'matrices')}: "
                "it has zeros there."
            )
        for there in held:
            how = _same(one, there)
            if how:
                raise ParameterError(
                    f"{base.path} contains {there.get('name')} already, its provenance says so: {how}.\n"
                    "Give the base from before; parameters={'unmerge': True} takes the adapter out; for more of it, "
                    "say weights=[2] on the base from before."
                )
            near = closeness(_content(one), _content(there))
            if near and not same_layers(_content(one), _content(there)):
                notes.append(
                    f"{one['name']} changes the layers much as {there.get('name')} does, which the base contains "
                    f"(cosine {near:.2f}): if it is that adapter trained further, merge it into the base from before."
                )
    return [*held, *new], tuple(notes)


def _same(one: dict, there: dict) -> str:
    """Why two entries are one adapter; "" where they are not."""
    name, other = one["name"], there.get("name")
    called = "" if name == other else f"{name} and {other} are the same adapter, "
    if one["fingerprint"] == there["fingerprint"]:
        return f"{called}fingerprint {one['fingerprint'][:20]}…"
    if one.get("training") and one.get("training") == there.get("training"):
        return f"{name} is of the same training as {other}"
    if is_same(_content(one), _content(there)):
        layers = same_layers(_content(one), _content(there))
        return f"{name} has the values of {other} ({layers} of {len(_content(one))} matrices change alike)"
    return ""


def _content(entry: dict) -> dict[str, str]:
    content = entry.get("content")
    return content if isinstance(content, dict) else {}


def _entry(
    ck: Checkpoint,
    adapter: Adapter,
    init: Checkpoint | None,
    weight: float,
    quant: str,
    spec: MergeSpec,
    look: bool,
) -> dict[str, Any]:
    settings = [target.settings() for target in adapter.targets.values()]
    origin = origin_of(ck)
    return {
        # Of the cheap kind always: whatever the caller has the inputs hashed by, an adapter is known again.
        "name": printable(ck.path.name),
        "fingerprint": file_facts(ck).fingerprint,
        "weight": weight,
        "scaling": sorted({one["scaling"] for one in settings if "scaling" in one}),
        "variant": sorted({one["variant"] for one in settings if "variant" in one}),
        "start": [] if init is None else [file_facts(init).fingerprint],
        "quant": quant,
        "include": spec.include,
        "exclude": spec.exclude,
        "content": content_of(adapter) if look else blank(adapter),
        **({"training": origin.training} if origin else {}),
    }


_HOW = {  # of an entry -> what decides it when it is taken out
    "weight": "weights",
    "scaling": "alpha and use_rslora",
    "variant": "bat",
    "start": "pissa_init",
    "include": "include",
    "exclude": "exclude",
}


def _refuse_twice(new: Sequence[dict]) -> None:
    for i, one in enumerate(new):
        for earlier in new[:i]:
            how = _same(one, earlier) or _same(earlier, one)
            if how:
                raise ParameterError(
                    f"{earlier['name']} and {one['name']} are the same adapter, which goes in once: {how}.\n"
                    "Leave one out; for more of it say weights=[2]."
                )


def _notes_on_parts(new: Sequence[dict], held: Sequence[dict], changes: Sequence[set[str]]) -> list[str]:
    """Sentences on adapters that change some matrices alike, and are not the same otherwise.

    Args:
        changes: of each of `new`, the matrices that this merge changes.
    """
    notes, before = [], [(there, _went_in(there), "which the base contains") for there in held]
    for one, own in zip(new, changes, strict=True):
        content = {x: text for x, text in _content(one).items() if x in own}
        for there, theirs, which in before:
            if alike := same_layers(content, theirs):
                notes.append(
                    f"{one['name']} changes {alike} of {len(_content(one))} matrices as {there.get('name')} does, "
                    f"{which}: there the same change goes in twice. weights=[{{pattern: 0, '*': 1}}] leaves some out."
                )
        before.append((one, content, "which goes in too"))
    return notes


def _went_in(entry: dict) -> dict[str, str]:
    """The content of an entry, of the matrices that it changed."""
    include, exclude = ([p for p in entry.get(key) or () if isinstance(p, str)] for key in ("include", "exclude"))
    return {x: text for x, text in _content(entry).items() if is_selected(f"{x}.weight", include, exclude)}


def _without(base: Checkpoint, held: list[dict], new: list[dict]) -> tuple[list[dict], tuple[str, ...]]:
    known, notes = {one["fingerprint"]: one for one in held}, []
    new = [_as_held(one, held) for one in new]
    for one in new:
        before = known.get(one["fingerprint"])
        if before is None:
            _refuse_what_is_not_in_there(base, held, one)
            notes.append(f"Nothing in the base's provenance says that it contains this adapter, {one['name']}.")
            continue
        if before.get("mixed"):
            raise ParameterError(
                f"{base.path} is a mix of models, one of which contained {one['name']}: how much of it is in there\n"
                "cannot be said, so it cannot be taken out."
            )
        for what, decides in _HOW.items():
            if what in before and before[what] != one[what]:
                raise ParameterError(
                    f"{one['name']} was merged into {base.path} with {what} {before[what]}; to take it out with\n"
                    f"{one[what]} would leave something else than was there. Say {decides} as it was then."
                )
        if before.get("quant", "none") != "none":
            notes.append(
                f"Merging {one['name']} rounded the base to {before['quant']}, which unmerging does not bring back."
            )
    out = {one["fingerprint"] for one in new}
    _refuse_another_order(base, held, [one["fingerprint"] for one in new])
    return [one for one in held if one["fingerprint"] not in out], tuple(dict.fromkeys(notes))


def _refuse_what_is_not_in_there(base: Checkpoint, held: list[dict], one: dict) -> None:
    """Where the base's provenance says so: what is taken out then is added with the opposite sign."""
    if held:
        names = ", ".join(str(there.get("name")) for there in held)
        raise ParameterError(
            f"{base.path} contains {names}, its provenance says so, and not {one['name']}, which cannot be taken out.\n"
            "If another program merged it before them, take those out first."
        )
    for record in records_of(base)[:1]:
        with suppress(KeyError, TypeError):  # a record that says it in another way
            out = record["recipe"]["parameters"]["unmerge"]
            if out and any(source["fingerprint"] == one["fingerprint"] for source in record["inputs"]):
                raise ParameterError(f"{one['name']} was taken out of {base.path} already: its provenance says so.")


def _as_held(one: dict, held: list[dict]) -> dict:
    """An entry under the fingerprint that the base has of the same values, and of what they started from."""
    if any(one["fingerprint"] == there["fingerprint"] for there in held):
        return one
    there = next((there for there in held if is_same(_content(one), _content(there))), None)
    if there is None:
        return one
    return one | {"fingerprint": there["fingerprint"]} | {key: there[key] for key in ("start",) if key in there}


def _refuse_another_order(base: Checkpoint, held: list[dict], out: list[str]) -> None:
    """A bat changes what is there when it comes, so that what came later has to go first."""
    order = [one["fingerprint"] for one in held]
    places = [order.index(f) for f in out if f in order]
    if not places:
        return
    bats = any(v.startswith("bat") for one in held[min(places) :] for v in one.get("variant", ()))
    if bats and places != list(range(len(order) - len(places), len(order))):
        names = ", ".join(str(one.get("name")) for one in held)
        raise ParameterError(
            f"{base.path} contains {names}, in this order, and a bat of MiSS works on what is there before it.\n"
            "Take out the last ones, in the order of the list in which they went in."
        )
