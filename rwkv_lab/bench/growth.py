"""Does a token get dearer as the context grows? Its time and the memory, after one thousand tokens and after many."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from rwkv_lab.arguments import Size, checked
from rwkv_lab.bench.comparison import OURS, Agreement, Rounds, Row, compare, interleave, log_row, median_share, refusal
from rwkv_lab.bench.engines import as_rnn, load_model, seconds_of, tokens_for
from rwkv_lab.bench.speed import LIMITS
from rwkv_lab.errors import ParameterError
from rwkv_lab.machine import memory_of
from rwkv_lab.model import RWKV_Dual, RWKVState
from rwkv_lab.paths import to_path

_PIECE = 512  # tokens read at once
_STEPS = 16  # tokens decoded in one sample


@checked
@torch.no_grad()
def measure_growth(
    path: str | Path, subject: str, dtype: str, contexts: Sequence[Size], rounds: Rounds, device: str = "cpu"
) -> list[Row]:
    """Jobs "growth decode" and "growth prefill" in ms per token, "growth memory" in MB (size: tokens before).

    One text is read piece by piece. The state at each context is kept, so that contexts are measured in turn; memory is
    what the process holds when it gets there, above what it held with the model just loaded.

    Raises:
        ParameterError: no context, or a dtype that is not measured.
        RwkvLabError: the checkpoint is no model that runs here.
    """
    if not contexts or dtype not in LIMITS:
        raise ParameterError(f"contexts={contexts}, dtype={dtype!r}: one context at least, and of {', '.join(LIMITS)}.")
    model = load_model(to_path(path, "path"), dtype, device)
    tokens = tokens_for(model.layout.vocab_size, 1, max(contexts)).to(model.get_device())
    agreement = _whole_or_in_pieces(model, tokens[:, : 2 * _PIECE], LIMITS[dtype])
    rows, states, held, state, read = [], {}, {}, None, 0
    model.prefill(tokens[:, :_PIECE])  # what the first call needs once is no growth
    with as_rnn(model):
        model(tokens[:, :1])
    before = memory_of("VmRSS")
    for context in sorted(contexts):
        while read < context:
            piece = tokens[:, read : min(read + _PIECE, context)]
            _, state = model.prefill(piece, state)
            read += piece.shape[1]
        states[context], held[context] = state, memory_of("VmRSS")
    if before is not None:
        for context, now in held.items():
            row = Row("growth memory", subject, OURS, dtype, context, "MB", [max(now - before, 0) / 1e6])
            rows.append(log_row(row))
    if not agreement.passed:
        problem = refusal(agreement)
        return rows + [
            log_row(Row(job, subject, OURS, dtype, context, "ms per token", agreement=agreement, problem=problem))
            for job in ("growth decode", "growth prefill")
            for context in states
        ]
    piece = tokens[:, :_PIECE]
    for job, sample in (("growth decode", _decode), ("growth prefill", _prefill)):
        entries: dict[str, Callable[[], float]] = {
            str(context): partial(sample, model, piece, state) for context, state in states.items()
        }
        results = interleave(entries, rounds)
        first, _ = results[str(min(states))]
        for context in states:
            samples, other_load = results[str(context)]
            row = Row(job, subject, OURS, dtype, context, "ms per token", samples, other_load, agreement)
            row.shares[f"that at {min(states)}"] = median_share(samples, first)
            rows.append(log_row(row))
    return rows


def _whole_or_in_pieces(model: RWKV_Dual, tokens: torch.Tensor, limit: float) -> Agreement:
    """A text read in pieces has to end where the same text ends that is read at once."""
    half = tokens.shape[1] // 2
    whole, _ = model.prefill(tokens)
    _, state = model.prefill(tokens[:, :half])
    last, _ = model.prefill(tokens[:, half:], state)
    return compare(last.cpu(), whole.cpu(), limit)


def _decode(model: RWKV_Dual, tokens: torch.Tensor, state: RWKVState) -> float:
    def run() -> None:
        now = state
        for _ in range(_STEPS):
            _, now = model(tokens[:, :1], state=now)

    with as_rnn(model):
        return 1e3 * seconds_of(run, model) / _STEPS


def _prefill(model: RWKV_Dual, tokens: torch.Tensor, state: RWKVState) -> float:
    return 1e3 * seconds_of(lambda: model.prefill(tokens, state), model) / tokens.shape[1]
