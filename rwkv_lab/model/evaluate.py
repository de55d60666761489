"""How well a model predicts a text."""

import math
from typing import Annotated

import torch
from annotated_types import Ge
from torch.nn import functional as F

from rwkv_lab.arguments import checked
from rwkv_lab.errors import ParameterError
from rwkv_lab.model.protocol import Model
from rwkv_lab.model.state import RWKVState

_TOKENS_AT_ONCE = 4096  # bounds memory: logits and layers of this many tokens


@checked
@torch.no_grad()
def bits_per_byte(model: Model, data: bytes, ctx_len: Annotated[int, Ge(1)], state: RWKVState | None = None) -> float:
    """Mean number of bits the model needs for a byte of `data`, given the bytes before it in its window.

    The data is cut into windows of `ctx_len` tokens, and every window starts afresh from `state`. A window is shown the
    token before its first one and predicts each of its own, so every token but the very first is predicted exactly
    once. The bits are shared out over the bytes of the predicted tokens, so models of different vocabularies compare.

    Args:
        data: at least two tokens; bytes that are no text are for vocabularies of bytes (World, demo) only.
        ctx_len: tokens per window. A longer one gives more context, so figures compare only at equal ctx_len.
        state: RWKVState of one sequence to start every window from; None for `model.create_state()`.

    Raises:
        ParameterError: too little data, or a vocabulary whose tokenizer has to be named first.
    """
    ids = model.tokenizer.encode(data)
    if len(ids) < 2:
        raise ParameterError(f"bits_per_byte needs 2 tokens or more; the data has {len(ids)}.")
    ctx_len = min(ctx_len, len(ids))
    n_bytes = len(data) - len(model.tokenizer.decode_bytes(ids[:1]))
    tokens = torch.tensor(ids, device="cpu")
    start = model.create_state() if state is None else state
    n_window = (len(ids) - 1) // ctx_len
    steps = torch.arange(ctx_len + 1, device="cpu")
    whole = torch.arange(n_window, device="cpu")[:, None] * ctx_len + steps  # [window, ctx_len + 1]
    batches = list(tokens[whole].split(max(1, _TOKENS_AT_ONCE // ctx_len))) if n_window else []
    tail = tokens[n_window * ctx_len :]
    if len(tail) > 1:
        batches.append(tail[None])

    nats = 0.0
    for batch in batches:
        batch = batch.to(model.get_device())
        logits, _ = model.parallel(batch[:, :-1], start.expand(len(batch)))
        nats += F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum").item()
    return nats / math.log(2) / n_bytes
