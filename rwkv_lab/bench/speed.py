"""How fast models decode and read prompts, beside peers and beside what the machine allows."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from rwkv_lab.bench.contest import OURS, Agreement, Floors, Row, compare, interleave, median_share, refusal, say
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

# How far logits may be from the reference, as relative RMS. In 16 bits rounding alone gives some 2e-2 on deep models.
# int8 and int4 lose agreement for a reason, and how much is reported; the limit only tells a loss from nonsense.
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
    rounds: samples of each contestant.
    """

    dtypes: tuple[str, ...] = ("bf16", "fp32", *QUANTISED)
    lengths: tuple[int, ...] = (512, 2048)
    batches: tuple[int, ...] = (1, 8, 32, 128)
    rounds: int = 5
    device: str = "cpu"
    peers: tuple[Peer, ...] = ()


@torch.no_grad()
def measure_speed(path: Path, subject: str, plan: Plan) -> tuple[list[Row], Floors]:
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
    with ExitStack() as stack:
        match = _Match(subject, plan, expected_answers(path, plan.lengths, max(plan.batches, default=1)))
        for engine, problem in open_engines(path, plan.dtypes, plan.device, plan.peers, stack):
            if problem:
                match.add(_row("decode", match, engine, 1, problem=problem))
            else:
                match.engines.append(engine)
        match.weigh()
        for batch in plan.batches:
            _decode(match, batch)
        for length in plan.lengths:
            _prefill(match, length)
    return match.rows, match.floors


class _Match:
    """One model's engines, what they should answer, what a token costs them, and the rows so far."""

    def __init__(self, subject: str, plan: Plan, expected: Expected):
        self.subject, self.plan, self.expected = subject, plan, expected
        self.engines: list[Engine] = []
        self.rows: list[Row] = []
        self.floors: Floors = {}

    def add(self, row: Row) -> None:
        self.rows.append(say(row))

    def weigh(self) -> None:
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

    def contest(
        self, job: str, size: int, admitted: Mapping, contestants: Mapping, describe: Callable, floors: bool = True
    ) -> None:
        """Measure; `describe(engine, samples, floors of these rounds)` gives a row's shares and facts."""
        problems: dict[str, str] = {}

        def sample(key: str) -> float:
            """A peer may give answers and yet not run this, or no longer: it is not asked again."""
            if key not in problems:
                try:
                    return contestants[key]()
                except PeerError as e:
                    problems[key] = str(e)
            return math.nan

        for key in contestants:  # the warm-up
            sample(key)
        able = {key: partial(sample, key) for key in contestants if key not in problems}
        machine = self._machine() if floors else {}
        results = interleave({**machine, **able}, self.plan.rounds, warm_up=False)
        now = {name: results.pop(name)[0] for name in machine}
        for name, samples in now.items():
            self.floors.setdefault(name, []).extend(samples)
        for key, problem in problems.items():
            engine, agreement = admitted[key]
            self.add(_row(job, self, engine, size, agreement=agreement, problem=problem))
        for key, (samples, foreign) in results.items():
            if key in problems:
                continue
            engine, agreement = admitted[key]
            shares, facts = describe(engine, samples, now)
            measured = {"samples": samples, "foreign": foreign, "shares": shares, "facts": facts}
            self.add(_row(job, self, engine, size, agreement=agreement, **measured))

    def _machine(self) -> dict[str, Callable[[], float]]:
        """Contestants that measure the machine itself; none on a GPU."""
        if parse_device(self.plan.device).type != "cpu":
            return {}
        found = {READ_FLOOR: read_rate, FMA: multiply_add_rate}
        if "bf16" in self.plan.dtypes:
            found[BF16_MATMUL] = partial(matmul_rate, torch.bfloat16)
        return found


def _row(job: str, match: _Match, engine: Engine, size: int, **values) -> Row:
    return Row(job, match.subject, engine.name, engine.dtype, size, "tokens/s", **values)


def _limit(engine: Engine) -> float:
    return (PEER_LIMITS if engine.session else LIMITS)[engine.dtype]


def _decode(match: _Match, batch: int) -> None:
    """Token by token. One sequence: beside the peers, and once more while something else keeps a core busy."""
    tokens = match.expected.tokens(batch, BATCH_STEPS if batch > 1 else READ + STEPS)
    engines = match.engines if batch == 1 else [e for e in match.engines if e.model]
    admitted = match.admit("decode", batch, engines, partial(_decoding_agrees, match, tokens))
    contestants, short = {}, {}
    for key, (engine, agreement) in admitted.items():
        try:
            contestants[key] = decoder(engine, tokens)
            if batch == 1:  # beside a busy loop it may take twenty times as long
                short[key] = decoder(engine, tokens, duration=0.1)
        except PeerError as e:
            match.add(_row("decode", match, engine, batch, agreement=agreement, problem=str(e)))
    match.contest("decode", batch, admitted, contestants, partial(_of_decoding, match, batch))
    if batch == 1 and parse_device(match.plan.device).type == "cpu":
        medians = {row.name: row.median for row in match.rows if row.job == "decode" and row.samples}

        def kept(engine: Engine, samples: Sequence[float], _: Floors):
            return {"its rate alone": statistics.median(samples) / medians[engine.key]}, {}

        beside = {key: partial(_beside_a_busy_loop, take) for key, take in short.items() if key in medians}
        match.contest("decode beside a busy loop", batch, admitted, beside, kept, floors=False)


def _decoding_agrees(match: _Match, tokens: torch.Tensor, engine: Engine) -> Agreement:
    limit = _limit(engine)
    if engine.session:
        found = engine.session.answers(tokens[0].tolist(), READ, match.expected.steps.shape[-1])
        return compare(found, match.expected.steps, limit)
    if len(tokens) == 1:
        return compare(our_answers(engine.model, tokens), match.expected.steps, limit)
    with as_rnn(engine.model):
        logits, _ = engine.model(tokens.to(engine.model.get_device()))  # [B,T,V]
    expected = match.expected.batch[: len(tokens)]
    return compare(logits.flatten(0, 1).cpu(), expected.flatten(0, 1), limit)


def _of_decoding(match: _Match, batch: int, engine: Engine, samples: Sequence[float], floors: Floors):
    """Shares of the floors. A step reads the weights once, and reads and writes each sequence's state."""
    shares, facts = {}, {}
    if engine.key in match.bytes:
        step = match.bytes[engine.key] + batch * match.state_bytes[engine.key]
        facts["bytes per step"] = step
        if READ_FLOOR in floors:
            shares["read floor"] = median_share([rate / batch * step * 1e-9 for rate in samples], floors[READ_FLOOR])
    if match.flops and FMA in floors:
        gflops = [rate * match.flops[True] * 1e-9 for rate in samples]
        name, floor = ("bf16 matmul rate", BF16_MATMUL) if engine.dtype == "bf16" else ("FMA rate", FMA)
        shares[name] = median_share(gflops, floors[floor])
    return shares, facts


def _beside_a_busy_loop(take: Callable[[], float]) -> float:
    with busy_loop():
        return take()


def _prefill(match: _Match, length: int) -> None:
    """A whole prompt at once, and the logits after its last token."""
    tokens = match.expected.tokens(1, length)

    def agrees(engine: Engine) -> Agreement:
        if engine.session:
            found = engine.session.answers(tokens[0].tolist(), length, match.expected.steps.shape[-1])
        else:
            found = engine.model.prefill(tokens.to(engine.model.get_device()))[0].cpu()
        return compare(found, match.expected.prefilled[length], _limit(engine))

    def take(engine: Engine) -> float:
        if engine.session:
            return length / engine.session.seconds("prefill", tokens[0].tolist(), length)
        return length / seconds_of(lambda: engine.model.prefill(tokens), engine.model)

    def describe(engine: Engine, samples: Sequence[float], floors: Floors):
        if not match.flops:
            return {}, {}
        gflops = [rate * match.flops[False] * 1e-9 for rate in samples]
        facts = {"GFLOP/s": statistics.median(gflops), "flops per token": match.flops[False]}
        name, floor = ("bf16 matmul rate", BF16_MATMUL) if engine.dtype == "bf16" else ("FMA rate", FMA)
        return {name: median_share(gflops, floors[floor])} if floor in floors else {}, facts

    admitted = match.admit("prefill", length, match.engines, agrees)
    contestants = {key: partial(take, engine) for key, (engine, _) in admitted.items()}
    match.contest("prefill", length, admitted, contestants, describe)
