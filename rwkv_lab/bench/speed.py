"""How fast models decode and read prompts, beside peers and beside what the machine allows."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from rwkv_lab.arguments import checked
from rwkv_lab.bench.comparison import OURS, Agreement, Floors, Row, compare, interleave, log_row, median_share, refusal
from rwkv_lab.bench.engines import (
    BATCH_STEPS,
    QUANTISED,
    READ,
    STEPS,
    Engine,
    Expected,
    as_rnn,
    busy_loop,
    decoder,
    expected_answers,
    flops_per_token,
    open_engines,
    our_answers,
    seconds_of,
    weight_bytes,
)
from rwkv_lab.bench.machine import matmul_rate, multiply_add_rate, read_rate
from rwkv_lab.bench.peers import Peer, PeerError
from rwkv_lab.errors import RwkvLabError
from rwkv_lab.model.device import parse_device
from rwkv_lab.paths import to_path

# How far logits may be from the reference, as relative RMS. In 16 bits rounding alone gives some 2e-2 on deep models.
# int8 and int4 lose agreement for a reason, and how much is reported; the limit only separates a loss from nonsense.
LIMITS = {"fp32": 1e-4, "bf16": 6e-2, "fp16": 1e-2, "int8": 0.1, "int4": 0.5}
# A peer may round to the file's dtype on its way: `rwkv` normalises the embedding of RWKV-4 to 6 before it converts it.
PEER_LIMITS = LIMITS | {"fp32": 1e-2}

READ_FLOOR, FMA, BF16_MATMUL = "read GB/s", "FMA GFLOP/s", "bf16 matmul GFLOP/s"  # names of floors


@dataclass(frozen=True)
class Plan:
    """What is measured on every model.

    dtypes: of bf16, fp32, fp16, int8, int4.
    lengths: prompts, in tokens.
    batches: sequences decoded at once; 1 is decoded beside the peers and beside a busy loop too.
    rounds: samples of each entry.
    """

    dtypes: tuple[str, ...] = ("bf16", "fp32", *QUANTISED)
    lengths: tuple[int, ...] = (512, 2048)
    batches: tuple[int, ...] = (1, 8, 32, 128)
    rounds: int = 5
    device: str = "cpu"
    peers: tuple[Peer, ...] = ()


@checked
@torch.no_grad()
def measure_speed(path: str | Path, subject: str, plan: Plan) -> tuple[list[Row], Floors]:
    """Decode and prefill rates of one checkpoint.

    Args:
        path: a whole model of any generation.
        subject: what rows call it.
    Returns:
        Rows of the jobs "decode", "decode beside a busy loop" (size: sequences) and "prefill" (size: tokens), and the
        floors as they were measured in the same rounds.
    Raises:
        RwkvLabError: the checkpoint is no model that runs here.
    """
    path = to_path(path, "path")
    with ExitStack() as stack:
        comparison = _Comparison(subject, plan, expected_answers(path, plan.lengths, max(plan.batches, default=1)))
        for engine, problem in open_engines(path, plan.dtypes, plan.device, plan.peers, stack):
            if problem:
                comparison.add(_row("decode", comparison, engine, 1, problem=problem))
            else:
                comparison.engines.append(engine)
        comparison.count_costs()
        for batch in plan.batches:
            _decode(comparison, batch)
        for length in plan.lengths:
            _prefill(comparison, length)
    return comparison.rows, comparison.floors


class _Comparison:
    """One model's engines, what they should answer, what a token costs them, and the rows so far."""

    def __init__(self, subject: str, plan: Plan, expected: Expected):
        self.subject, self.plan, self.expected = subject, plan, expected
        self.engines: list[Engine] = []
        self.rows: list[Row] = []
        self.floors: Floors = {}

    def add(self, row: Row) -> None:
        self.rows.append(log_row(row))

    def count_costs(self) -> None:
        """Bytes and operations of one token. A peer has to read what our engine reads in the same dtype."""
        self.bytes, self.state_bytes, self.flops = {}, {}, {}
        plain = next((e.model for e in self.engines if e.model and e.dtype not in QUANTISED), None)
        if plain:
            self.flops = {head: flops_per_token(plain, head) for head in (True, False)}
        for engine in sorted(self.engines, key=lambda e: e.model is None):
            if engine.model:
                self.bytes[engine.key] = weight_bytes(engine.model)
                self.state_bytes[engine.key] = 2 * engine.model.create_state(1).nbytes
            elif f"{OURS} {engine.dtype}" in self.bytes:
                for costs in (self.bytes, self.state_bytes):
                    costs[engine.key] = costs[f"{OURS} {engine.dtype}"]

    def admit(self, job: str, size: int, engines: Sequence[Engine], answers: Callable[[Engine], Agreement]):
        """Those whose answers agree, with their agreement; each of the others gets a row without a rate."""
        admitted = {}
        for engine in engines:
            try:
                agreement = answers(engine)
            except RwkvLabError as e:
                self.add(_row(job, self, engine, size, problem=str(e).splitlines()[0]))
                continue
            if agreement.passed:
                admitted[engine.key] = (engine, agreement)
            else:
                self.add(_row(job, self, engine, size, agreement=agreement, problem=refusal(agreement)))
        return admitted

    def measure(
        self, job: str, size: int, admitted: Mapping, entries: Mapping, describe: Callable, floors: bool = True
    ) -> None:
        """Measure; `describe(engine, samples, floors of these rounds)` gives a row's shares and facts."""
        problems: dict[str, str] = {}

        def sample(key: str) -> float:
            """A peer may give answers and yet not run this, or no longer: it is not tried again."""
            if key not in problems:
                try:
                    return entries[key]()
                except PeerError as e:
                    problems[key] = str(e)
            return math.nan

        for key in entries:  # the warm-up
            sample(key)
        able = {key: partial(sample, key) for key in entries if key not in problems}
        machine = self._machine() if floors else {}
        results = interleave({**machine, **able}, self.plan.rounds, warm_up=False)
        now = {name: results.pop(name)[0] for name in machine}
        for name, samples in now.items():
            self.floors.setdefault(name, []).extend(samples)
        for key, problem in problems.items():
            engine, agreement = admitted[key]
            self.add(_row(job, self, engine, size, agreement=agreement, problem=problem))
        for key, (samples, other_load) in results.items():
            if key in problems:
                continue
            engine, agreement = admitted[key]
            shares, facts = describe(engine, samples, now)
            measured = {"samples": samples, "other_load": other_load, "shares": shares, "facts": facts}
            self.add(_row(job, self, engine, size, agreement=agreement, **measured))

    def _machine(self) -> dict[str, Callable[[], float]]:
        """Entries that measure the machine itself; none on a GPU."""
        if parse_device(self.plan.device).type != "cpu":
            return {}
        found = {READ_FLOOR: read_rate, FMA: multiply_add_rate}
        if "bf16" in self.plan.dtypes:
            found[BF16_MATMUL] = partial(matmul_rate, torch.bfloat16)
        return found


def _row(job: str, comparison: _Comparison, engine: Engine, size: int, **values) -> Row:
    return Row(job, comparison.subject, engine.name, engine.dtype, size, "tokens/s", **values)


def _limit(engine: Engine) -> float:
    return (PEER_LIMITS if engine.session else LIMITS)[engine.dtype]


def _decode(comparison: _Comparison, batch: int) -> None:
    """Token by token. One sequence: beside the peers, and once more while something else keeps a core busy."""
    tokens = comparison.expected.tokens(batch, BATCH_STEPS if batch > 1 else READ + STEPS)
    engines = comparison.engines if batch == 1 else [e for e in comparison.engines if e.model]
    admitted = comparison.admit("decode", batch, engines, partial(_decoding_agrees, comparison, tokens))
    entries, short = {}, {}
    for key, (engine, agreement) in admitted.items():
        try:
            entries[key] = decoder(engine, tokens)
            if batch == 1:  # beside a busy loop it may take twenty times as long
                short[key] = decoder(engine, tokens, duration=0.1)
        except PeerError as e:
            comparison.add(_row("decode", comparison, engine, batch, agreement=agreement, problem=str(e)))
    comparison.measure("decode", batch, admitted, entries, partial(_of_decoding, comparison, batch))
    if batch == 1 and parse_device(comparison.plan.device).type == "cpu":
        medians = {row.name: row.median for row in comparison.rows if row.job == "decode" and row.samples}

        def kept(engine: Engine, samples: Sequence[float], _: Floors):
            return {"its rate alone": statistics.median(samples) / medians[engine.key]}, {}

        beside = {key: partial(_beside_a_busy_loop, take) for key, take in short.items() if key in medians}
        comparison.measure("decode beside a busy loop", batch, admitted, beside, kept, floors=False)


def _decoding_agrees(comparison: _Comparison, tokens: torch.Tensor, engine: Engine) -> Agreement:
    limit = _limit(engine)
    if engine.session:
        found = engine.session.answers(tokens[0].tolist(), READ, comparison.expected.steps.shape[-1])
        return compare(found, comparison.expected.steps, limit)
    if len(tokens) == 1:
        return compare(our_answers(engine.own_model, tokens), comparison.expected.steps, limit)
    model = engine.own_model
    with as_rnn(model):
        logits, _ = model(tokens.to(model.get_device()))  # [B,T,V]
    expected = comparison.expected.batch[: len(tokens)]
    return compare(logits.flatten(0, 1).cpu(), expected.flatten(0, 1), limit)


def _of_decoding(comparison: _Comparison, batch: int, engine: Engine, samples: Sequence[float], floors: Floors):
    """Shares of the floors. A step reads the weights once, and reads and writes each sequence's state."""
    shares, facts = {}, {}
    if engine.key in comparison.bytes:
        step = comparison.bytes[engine.key] + batch * comparison.state_bytes[engine.key]
        facts["bytes per step"] = step
        if READ_FLOOR in floors:
            shares["read floor"] = median_share([rate / batch * step * 1e-9 for rate in samples], floors[READ_FLOOR])
    if comparison.flops and FMA in floors:
        gflops = [rate * comparison.flops[True] * 1e-9 for rate in samples]
        name, floor = ("bf16 matmul rate", BF16_MATMUL) if engine.dtype == "bf16" else ("FMA rate", FMA)
        shares[name] = median_share(gflops, floors[floor])
    return shares, facts


def _beside_a_busy_loop(take: Callable[[], float]) -> float:
    with busy_loop():
        return take()


def _prefill(comparison: _Comparison, length: int) -> None:
    """A whole prompt at once, and the logits after its last token."""
    tokens = comparison.expected.tokens(1, length)

    def agrees(engine: Engine) -> Agreement:
        if engine.session:
            found = engine.session.answers(tokens[0].tolist(), length, comparison.expected.steps.shape[-1])
        else:
            found = engine.own_model.prefill(tokens.to(engine.own_model.get_device()))[0].cpu()
        return compare(found, comparison.expected.prefilled[length], _limit(engine))

    def take(engine: Engine) -> float:
        if engine.session:
            return length / engine.session.seconds("prefill", tokens[0].tolist(), length)
        model = engine.own_model
        return length / seconds_of(lambda: model.prefill(tokens), model)

    def describe(engine: Engine, samples: Sequence[float], floors: Floors):
        if not comparison.flops:
            return {}, {}
        gflops = [rate * comparison.flops[False] * 1e-9 for rate in samples]
        facts = {"GFLOP/s": statistics.median(gflops), "flops per token": comparison.flops[False]}
        name, floor = ("bf16 matmul rate", BF16_MATMUL) if engine.dtype == "bf16" else ("FMA rate", FMA)
        return {name: median_share(gflops, floors[floor])} if floor in floors else {}, facts

    admitted = comparison.admit("prefill", length, comparison.engines, agrees)
    entries = {key: partial(take, engine) for key, (engine, _) in admitted.items()}
    comparison.measure("prefill", length, admitted, entries, describe)
