"""Exported models through onnxruntime, beside our own step and peers: token by token, and whole prompts."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from rwkv_lab.arguments import checked
from rwkv_lab.bench.comparison import Agreement, Rounds, Row, compare, interleave, log_row, refusal
from rwkv_lab.bench.engines import READ, STEPS, Engine, decoder, expected_answers, open_engines, our_answers
from rwkv_lab.bench.peers import Peer, PeerError
from rwkv_lab.bench.speed import LIMITS, PEER_LIMITS
from rwkv_lab.export import OnnxModel, export_onnx
from rwkv_lab.export.onnx_folder import Weights
from rwkv_lab.paths import to_path

ONNX = "onnxruntime"  # as an engine
WEIGHTS: tuple[Weights, ...] = ("fp32", "int8", "int4")
LENGTHS = (64, 256, 1024)
_SECONDS = 0.5  # of a sample

log = logging.getLogger(__name__)


@checked
@torch.no_grad()
def measure_exported(
    path: str | Path,
    subject: str,
    folder: str | Path,
    rounds: Rounds = 5,
    lengths: Sequence[int] = LENGTHS,
    peers: Sequence[Peer] = (),
    weights: Sequence[Weights] = WEIGHTS,
) -> list[Row]:
    """Decode rates of a checkpoint and of what it is exported to, and how the sequence graph's cost grows.

    Args:
        path: a whole RWKV model.
        subject: what rows call it.
        folder: where it is exported to; that stays there.
        weights: how they are stored: of fp32, int8, int4. The prompts are measured on the first of them.
    Returns:
        Rows of the jobs "decode" and "exported prompt" (size: tokens; `times the first length's` in its facts: time per
        token, 1 where cost is linear). An entry whose answers disagree has no rate.
    Raises:
        RwkvLabError: the checkpoint is no model that is exported.
    """
    path = to_path(path, "path")
    graphs = {stored: _exported(path, to_path(folder, "folder"), stored) for stored in weights}
    expected = expected_answers(path, (), 1)
    tokens = expected.tokens(1, READ + STEPS)
    row = partial(Row, "decode", subject, size=1, unit="tokens/s")
    rows, takes, agreements = [], {}, {}
    with ExitStack() as stack:
        for stored, graph in graphs.items():
            found = compare(_answers(graph, tokens), expected.steps, LIMITS[stored])
            _admit((ONNX, stored), found, partial(_decoder, graph, tokens), row, rows, takes, agreements)
        for engine, problem in open_engines(path, weights, "cpu", peers, stack):
            if problem:
                rows.append(log_row(row(engine=engine.name, dtype=engine.dtype, problem=problem)))
                continue
            key = engine.name, engine.dtype
            try:
                found = _engine_agrees(engine, tokens, expected.steps)
                _admit(key, found, partial(decoder, engine, tokens), row, rows, takes, agreements)
            except PeerError as e:
                rows.append(log_row(row(engine=engine.name, dtype=engine.dtype, problem=str(e))))
        for key, (samples, load) in interleave(takes, rounds).items():
            measured = {"samples": samples, "other_load": load, "agreement": agreements[key]}
            rows.append(log_row(row(engine=key[0], dtype=key[1], **measured)))
    return rows + _prompts(subject, graphs[weights[0]], rounds, lengths)


def _exported(path: Path, folder: Path, weights: Weights) -> OnnxModel:
    out = folder / f"{path.stem}-onnx-{weights}"
    start = time.perf_counter()
    export_onnx(path, out, weights, overwrite=True)
    log.info("exported as %s in %.0f s", weights, time.perf_counter() - start)
    return OnnxModel(out, threads=torch.get_num_threads())


def _admit(
    key: tuple[str, str],
    agreement: Agreement,
    make: Callable[[], Callable[[], float]],
    row: Callable[..., Row],
    rows: list[Row],
    takes: dict,
    agreements: dict,
) -> None:
    """Put an entry among those that are measured, unless its answers disagree."""
    if agreement.passed:
        takes[key], agreements[key] = make(), agreement
    else:
        problem = refusal(agreement)
        rows.append(log_row(row(engine=key[0], dtype=key[1], agreement=agreement, problem=problem)))


def _answers(graph: OnnxModel, tokens: torch.Tensor) -> torch.Tensor:
    """Logits `[1 + STEPS, V]` after a prompt and after each of the tokens that follow it."""
    logits, state = graph.run(tokens[:, :READ].numpy())
    found = [torch.from_numpy(logits[0, -1])]
    for t in range(READ, READ + STEPS):
        logits, state = graph.run(tokens[:, t : t + 1].numpy(), state)
        found.append(torch.from_numpy(logits[0]))
    return torch.stack(found)


def _engine_agrees(engine: Engine, tokens: torch.Tensor, expected: torch.Tensor) -> Agreement:
    if engine.session:
        found = engine.session.answers(tokens[0].tolist(), READ, expected.shape[-1])
        return compare(found, expected, PEER_LIMITS[engine.dtype])
    return compare(our_answers(engine.own_model, tokens), expected, LIMITS[engine.dtype])


def _decoder(graph: OnnxModel, tokens: torch.Tensor) -> Callable[[], float]:
    """A function that takes one sample, in tokens per second."""
    ids = tokens[:, :1].numpy()
    _, read = graph.run(tokens.numpy())

    def seconds(steps: int) -> float:
        state = read
        start = time.perf_counter()
        for _ in range(steps):
            _, state = graph.run(ids, state)
        return time.perf_counter() - start

    seconds(2)
    steps = max(4, round(_SECONDS / (seconds(4) / 4)))
    return lambda: steps / seconds(steps)


def _prompts(subject: str, graph: OnnxModel, rounds: int, lengths: Sequence[int]) -> list[Row]:
    """Prompts of each length at once. The logits of all tokens are computed, as the graph gives them."""
    prompts = {length: torch.randint(graph.vocab_size, (1, length)).numpy() for length in lengths}

    def rate(length: int) -> float:
        start = time.perf_counter()
        graph.run(prompts[length])
        return length / (time.perf_counter() - start)

    takes = {str(length): partial(rate, length) for length in lengths}
    rows = []
    for length, (samples, load) in interleave(takes, rounds).items():
        row = Row("exported prompt", subject, ONNX, graph.weights, int(length), "tokens/s", samples, load)
        first = rows[0].median if rows else row.median
        row.facts = {"times the first length's": first / row.median}
        rows.append(log_row(row))
    return rows
