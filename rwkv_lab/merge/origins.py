"""Whether tuned files belong to the base that they are merged into, as far as they say."""

from rwkv_lab.checkpoint import Checkpoint
from rwkv_lab.checkpoint.origin import bases_of, origin_of, same_weights, weights_of
from rwkv_lab.errors import ParameterError
from rwkv_lab.merge.inputs import MergeInputs

_WHOLE = ("model", "partial")  # kinds that bring values of their own, and take nothing from the base for granted


def notes_on_origins(inputs: MergeInputs, other_base: bool) -> list[str]:
    """Sentences on files that were trained on another base, on a quantised one, or do not say on which.

    Args:
        other_base: whether adapters and states of another base may go in.
    Raises:
        ParameterError: an adapter or a state was trained on another base, and may not.
    """
    notes, weights, silent = [], None, []
    for role, ck in inputs.with_roles[1:]:
        origin = origin_of(ck)
        if origin is None:
            silent += [ck.path.name] if role == "tuned" and ck.kind not in _WHOLE else []
            continue
        weights = weights_of(inputs.base) if weights is None else weights
        if same_weights(origin.weights, weights):
            pass
        elif any(same_weights(origin.weights, one) for one in bases_of(inputs.base)):
            notes.append(f"{ck.path.name} was trained on {origin.base}, which this base was made from.")
        elif other_base or ck.kind in _WHOLE:
            notes.append(f"{ck.path.name} was trained on {origin.base}; this base has other weights.")
        else:
            raise ParameterError(
                f"{ck.path} was trained on {origin.base}, whose weights are not those of {inputs.base.path}.\n"
                f"{_if_rounded(inputs.base)}"
                "Give the base that it was trained on; allow_other_base=True merges it all the same."
            )
        if origin.quant != "none" and ck.kind == "state":
            notes.append(f"{ck.path.name} was trained on a base stored in {origin.quant}; this base is not rounded so.")
    if silent:
        names = ", ".join(silent[:3]) + (f" and {len(silent) - 3} more" if len(silent) > 3 else "")
        says = "does not say" if len(silent) == 1 else "do not say"
        notes.append(f"{names} {says} on which base {'it was' if len(silent) == 1 else 'they were'} trained.")
    return notes


def _if_rounded(base: Checkpoint) -> str:
    """That a base whose values were rounded to few bits cannot be known again by them; "" for others."""
    if not base.quantised:
        return ""
    return (
        f"Its values are rounded ({', '.join(base.quantised)}): they do not tell whether it was made from that base.\n"
    )
