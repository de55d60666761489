"""What mixing weights means for an RWKV model: which of its tensors are no plain matrices, and what their mean is."""

import re
from collections.abc import Sequence

from rwkv_lab.checkpoint import Layout
from rwkv_lab.merge.plan import PlanRow

# What a tensor is, by name and generation, and what a mean of it does.
_KINDS = [
    (
        r"\.time_decay$",
        "4 5 6",
        "is the log of the decay rate, decay = exp(-exp(w)): a mean of it is the geometric mean of the rates, so that "
        "half-lives meet in the middle of a log scale",
    ),
    (
        r"\.att\.w0$",
        "7",
        "is the logit of the decay rate, decay = exp(-0.607 sigmoid(w)): its mean is near the geometric mean of slow "
        "rates, and not a mean of decays",
    ),
    (r"\.time_first$", "4 5", "is a bonus to the exponent (a log of a weight in 5): means are geometric"),
    (
        r"\.att\.[av]0$",
        "7",
        "is the logit of a gate (in-context learning rate, share of v_first): the mean is one of logits",
    ),
    (
        r"\.att\.([wavg][12]|time_maa_w[12]|time_decay_w[12])$",
        "6 7",
        "is one half of a low-rank pair: the product of mean halves is not the mean of the products, and makes sense "
        "only for models tuned from one base",
    ),
    (
        r"\.time_state$",
        "5 6 7",
        "is the state that reading begins with; where a model has none it counts as zeros",
    ),
]


def notes_on(method: str, layout: Layout, rows: Sequence[PlanRow]) -> tuple[str, ...]:
    """Sentences for the plan and the report; none where nothing is mixed or stacked."""
    if not rows:
        return ()
    if method == "passthrough":
        notes = ["Stacked layers were never trained to follow each other: expect to tune the result before use."]
        if layout.version == "7.0":
            notes.append("All layers take v_first from the layer 0 of the first run, whichever model they come from.")
        return tuple(notes)
    notes = ["Mixing assumes models tuned from one base: the channels of independently trained ones do not correspond."]
    for pattern, generations, says in _KINDS:
        found = [r.name for r in rows if re.search(pattern, r.name)]
        if found and layout.version[0] in generations:
            notes.append(f"{found[0]} ({len(found)} tensors like it) {says}.")
    return tuple(notes)
