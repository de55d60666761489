"""Rows of different lengths, padded on the right, of which no padding is read."""

from collections.abc import Callable, Iterable

import torch

from rwkv_lab.arguments import shown_value, whole_numbers
from rwkv_lab.errors import ParameterError
from rwkv_lab.model.state import RWKVState, join


def read_ragged(
    read: Callable[[torch.Tensor, RWKVState | None], tuple[torch.Tensor, RWKVState]],
    tokens: torch.Tensor,
    state: RWKVState | None,
    lengths: Iterable[int],
) -> tuple[torch.Tensor, RWKVState]:
    """Read the first `lengths[row]` tokens of each row of tokens `[B,T]`.

    Rows that have ended drop out, so every length that occurs costs one pass.

    Args:
        read: `(tokens, state)` -> something `[B,...]` of the last token, and the state after it.

    Returns:
        What `read` gives after each row's own last token, and the states there.

    Raises:
        ParameterError: not B numbers from 1 to T.
    """
    B, T = tokens.shape
    if isinstance(lengths, torch.Tensor) and (lengths.ndim != 1 or lengths.dtype == torch.bool):
        raise ParameterError(
            f"lengths={shown_value(lengths)}: it must be {B} numbers, how many tokens of each row count.\n"
            "Of a mask of tokens that count they are mask.sum(1)."
        )
    lengths = whole_numbers(lengths, "lengths")
    if len(lengths) != B or not all(1 <= n <= T for n in lengths):
        raise ParameterError(f"lengths={lengths}: tokens of shape {[B, T]} need {B} numbers from 1 to {T}.")
    rows, start, last, states = list(range(B)), 0, {}, {}
    for end in sorted(set(lengths)):
        x, after = read(tokens[rows, start:end], state)
        for i, row in enumerate(rows):
            if lengths[row] == end:
                last[row], states[row] = x[i], after.rows([i])
        left = [i for i, row in enumerate(rows) if lengths[row] > end]
        rows, start, state = [rows[i] for i in left], end, after.rows(left)
    return torch.stack([last[row] for row in range(B)]), join([states[row] for row in range(B)])
