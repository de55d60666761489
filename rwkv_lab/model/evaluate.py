"""How well a model predicts a text."""

import math

import torch
from torch.nn import functional as F

from rwkv_lab.errors import ParameterError

_TOKENS_AT_ONCE = 4096  # bounds memory: logits and layers of this many tokens


@torch.no_grad()
def bits_per_byte(model, data: bytes, ctx_len: int, state=None) -> float:
    """Mean number of bits the model needs for a byte of `data`, given the bytes before it in its window.

    The data is cut into windows of `ctx_len` bytes, and every window starts afresh from `state`. A window is shown the
    byte before its first one and predicts each of its own, so every byte but the very first is predicted exactly once.

    Args:
        data: at least two bytes; they need not be text.
        ctx_len: bytes per window. A longer one gives more context, so figures compare only at equal ctx_len.
        state: RWKVState of one sequence to start every window from; None for `model.create_state()`.

    Raises:
        ParameterError: too little data, or the model does not read bytes.
    """
    if len(data) < 2 or ctx_len < 1:
        raise ParameterError(f"bits_per_byte needs 2 bytes or more and ctx_len >= 1; given {len(data)} and {ctx_len}.")
    tokens = torch.tensor(model.tokenizer.encode(data))
    start = model.create_state() if state is None else state
    n_window = (len(data) - 1) // ctx_len
    whole = torch.arange(n_window)[:, None] * ctx_len + torch.arange(ctx_len + 1)  # [window, ctx_len + 1]
    batches = list(tokens[whole].split(max(1, _TOKENS_AT_ONCE // ctx_len))) if n_window else []
    tail = tokens[n_window * ctx_len :]
    if len(tail) > 1:
        batches.append(tail[None])

    nats = 0.0
    for batch in batches:
        batch = batch.to(model.get_device())
        logits, _ = model.parallel(batch[:, :-1], start.expand(len(batch)))
        nats += F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum").item()
    return nats / math.log(2) / (len(data) - 1)
