"""What mixing weights means for an RWKV model: which of its tensors are no plain matrices, and what their mean is."""

import re
from collections.abc import Sequence

from rwkv_lab.checkpoint import Layout
from rwkv_lab.text import counted

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


def notes_on_mixing(layout: Layout, mixed: Sequence[str]) -> tuple[str, ...]:
    """Sentences for the plan and the report.

    Args:
        mixed: names of the tensors whose values are mixed; none give no sentence.
    """
    if not mixed:
        return ()
    notes = ["Mixing assumes models tuned from one base: the channels of independently trained ones do not correspond."]
    for pattern, generations, meaning in _KINDS:
        found = [name for name in mixed if re.search(pattern, name)]
        if found and layout.version[0] in generations:
            notes.append(f"{found[0]} ({counted(len(found), 'tensor')} like it) {meaning}.")
    return tuple(notes)
