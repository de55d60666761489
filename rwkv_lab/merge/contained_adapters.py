"""Which adapters a checkpoint says that it contains, and what follows: none goes in twice, and what comes out is what
went in.

An entry is {"name", "fingerprint", "weight"} and how the adapter was merged: {"scaling", "variant", "start", "quant",
"include", "exclude"}. After models were mixed it is {"name", "fingerprint", "mixed": true}: how much of it is
in there is unknown.
"""

import json
from collections.abc import Sequence
from typing import Any

from rwkv_lab.checkpoint import Checkpoint, file_facts
from rwkv_lab.checkpoint.provenance import RECORD, printable
from rwkv_lab.errors import ParameterError
from rwkv_lab.merge.adapter_set import AdapterSet
from rwkv_lab.merge.changed_tensors import ChangedTensor
from rwkv_lab.names import split_block
from rwkv_lab.peft.adapter import Adapter


def adapters_in(*models: Checkpoint) -> list[dict]:
    """The adapters that checkpoints say they contain, each once; none of a file by others, or one that cannot be
    understood."""
    held: dict[str, dict] = {}
    for ck in models:
        try:
            found = json.loads(ck.metadata[RECORD])["contains"]
            for one in [dict(one) for one in found if isinstance(one["fingerprint"], str)]:
                held.setdefault(one["fingerprint"], one)
        except (KeyError, ValueError, TypeError, RecursionError):
            continue
    return list(held.values())


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
    mixed = [{"name": one.get("name"), "fingerprint": one["fingerprint"], "mixed": True} for one in others]
    return [*(own if kept else []), *mixed]


def after_merging(
    base: Checkpoint,
    tuned: Sequence[Checkpoint],
    adapters: AdapterSet,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
) -> tuple[list[dict], tuple[str, ...]]:
    """What the output of merging adapters, or taking them out, says that it contains; and notes for the plan.

    Raises:
        ParameterError: the base contains one of them already, two are the same, or they are to be taken out in another
            way than they went in.
    """
    held = adapters_in(base)
    new = [
        _entry(ck, adapter, init, weight, adapters.quant, include, exclude)
        for ck, adapter, init, weight in zip(tuned, adapters.adapters, adapters.init, adapters.weights, strict=True)
        if weight
    ]
    _refuse_twice(new)
    if adapters.unmerge:
        return _without(base, held, new)
    there = {one["fingerprint"] for one in held}
    for one in new:
        if one["fingerprint"] in there:
            raise ParameterError(
                f"{base.path} contains {one['name']} already, its provenance says so (fingerprint "
                f"{one['fingerprint'][:20]}…).\nGive the base from before; parameters={{'unmerge': True}} takes the "
                "adapter out; for more of it, say weights=[2] on the base from before."
            )
    return [*held, *new], ()


def _entry(
    ck: Checkpoint,
    adapter: Adapter,
    init: Checkpoint | None,
    weight: float,
    quant: str,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
) -> dict[str, Any]:
    settings = [target.settings() for target in adapter.targets.values()]
    return {
        # Of the cheap kind always: whatever the caller has the inputs hashed by, an adapter is known again.
        "name": printable(ck.path.name),
        "fingerprint": file_facts(ck).fingerprint,
        "weight": weight,
        "scaling": sorted({one["scaling"] for one in settings if "scaling" in one}),
        "variant": sorted({one["variant"] for one in settings if "variant" in one}),
        "start": [] if init is None else [file_facts(init).fingerprint],
        "quant": quant,
        "include": include,
        "exclude": exclude,
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
    seen: dict[str, str] = {}
    for one in new:
        if one["fingerprint"] in seen:
            raise ParameterError(
                f"{seen[one['fingerprint']]} and {one['name']} are the same adapter; for more of it say weights=[2]."
            )
        seen[one["fingerprint"]] = one["name"]


def _without(base: Checkpoint, held: list[dict], new: list[dict]) -> tuple[list[dict], tuple[str, ...]]:
    known, notes = {one["fingerprint"]: one for one in held}, []
    for one in new:
        before = known.get(one["fingerprint"])
        if before is None:
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
