"""Entries measured in turn (A B C, B C A, …), and the rows that come out: medians, spread, load of other processes."""

from __future__ import annotations

import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from annotated_types import Ge, Le

from rwkv_lab.bench.machine import watched
from rwkv_lab.lazy_torch import torch

log = logging.getLogger(__name__)

OURS = "rwkv_lab"  # our engine's name in rows
QUIET = 0.1  # CPUs that other processes may use during a sample; above that it is taken again
_AGAIN = 2  # times at most; then the quietest counts and the row is marked
_LONG = 3.0  # seconds: a sample that took longer is not taken again
_ENOUGH = 20.0  # seconds: an entry whose samples took longer is not sampled again once it has _AT_LEAST of them
_AT_LEAST = 3
_PAUSE = 0.05  # seconds between two samples, for the last one's spinning threads to fall asleep


Floors = dict[str, list[float]]  # what the machine can do at most, as measured in the rounds of a comparison


@dataclass(frozen=True)
class Agreement:
    """An entry's answers beside the reference's. No rate is reported of one that did not pass."""

    error: float  # relative RMS of the difference
    limit: float
    kl: float = math.nan  # mean Kullback-Leibler divergence from the reference's next-token distribution, nats
    top1: float = math.nan  # share of positions where the likeliest token is the reference's
    positions: int = 0

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # NaN does not pass


@dataclass
class Row:
    """One entry in one kind of measurement. Without samples it has no rate, and `problem` is the reason."""

    job: str  # "decode", "prefill", …
    subject: str  # model or operator
    engine: str  # "rwkv_lab", a peer, or a backend of the WKV operator
    dtype: str
    size: int  # sequences, or tokens, as the job has it
    unit: str  # of the samples
    samples: list[float] = field(default_factory=list)
    other_load: float = 0.0  # CPUs that other processes used during the worst sample
    agreement: Agreement | None = None
    shares: dict[str, float] = field(default_factory=dict)  # of a floor measured in the same rounds
    facts: dict[str, Any] = field(default_factory=dict)
    problem: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.samples) if self.samples else math.nan

    @property
    def name(self) -> str:
        return f"{self.engine} {self.dtype}".strip()

    @property
    def disagrees(self) -> bool:
        return self.agreement is not None and not self.agreement.passed

    @property
    def disturbed(self) -> bool:
        return self.other_load > QUIET

    def as_dict(self) -> dict:
        """For JSON: what was measured, and median, min and max of it."""
        spread = {"min": min(self.samples), "median": self.median, "max": max(self.samples)} if self.samples else {}
        found = asdict(self) | spread | {"disturbed": self.disturbed}
        if self.agreement:
            found["agreement"] = asdict(self.agreement) | {"passed": self.agreement.passed}
        return found


Rounds = Annotated[int, Ge(1), Le(100_000)]


def interleave(
    entries: Mapping[str, Callable[[], float]], rounds: int, warm_up: bool = True
) -> dict[str, tuple[list[float], float]]:
    """Call every entry once per round, each round beginning with another one.

    Args:
        entries: name -> a function that takes one sample and returns it, in any unit.
        warm_up: one round more, first, which does not count.
    Returns:
        Name -> (samples in order of rounds, CPUs that other processes used during the worst of them). A sample that
        others disturbed is taken again, twice at most, and the quietest counts. An entry whose samples took more than
        20 seconds together is not sampled again once it has three.
    """
    names = list(entries)
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in names}
    spent = dict.fromkeys(names, 0.0)
    for r in range(-1 if warm_up else 0, rounds):
        first = max(r, 0) % max(len(names), 1)
        for name in names[first:] + names[:first]:
            if r < 0:
                entries[name]()
                continue
            if spent[name] > _ENOUGH and r >= _AT_LEAST:
                continue
            began = time.perf_counter()
            value, other_load = _sample(entries[name])
            spent[name] += time.perf_counter() - began
            found[name][0].append(value)
            found[name][1].append(other_load)
    return {name: (samples, max(other_load)) for name, (samples, other_load) in found.items()}


def _sample(take: Callable[[], float]) -> tuple[float, float]:
    """One sample, and the CPUs that others used."""
    tries = []
    for _ in range(1 + _AGAIN):
        time.sleep(_PAUSE)
        with watched() as load:
            value = take()
        tries.append((load.other_load, value))
        if load.other_load <= QUIET or load.seconds > _LONG:
            break
    other_load, value = min(tries)
    return value, other_load


def compare(found: torch.Tensor, expected: torch.Tensor, limit: float) -> Agreement:
    """Logits `[P,V]` beside the reference's, at the same positions."""
    found, expected = found.double(), expected.double()
    theirs = expected.log_softmax(-1)
    kl = (theirs.exp() * (theirs - found.log_softmax(-1))).sum(-1).mean()
    top1 = (found.argmax(-1) == expected.argmax(-1)).double().mean()
    return Agreement(relative_rms(found, expected), limit, float(kl), float(top1), len(found))


def relative_rms(found: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS of the difference over RMS of what is expected."""
    error = (found.double() - expected.double()).square().mean().sqrt()
    return float(error / expected.double().square().mean().sqrt().clamp_min(1e-300))


def refusal(agreement: Agreement) -> str:
    """Why there is no rate, in words."""
    return f"answers disagree with the reference: error {agreement.error:.2g}, limit {agreement.limit:.2g}"


def median_share(numerator: Sequence[float], floor: Sequence[float]) -> float:
    """Median over rounds of a rate's share of the floor measured in the same round; a slow entry has fewer rounds."""
    return statistics.median(a / b for a, b in zip(numerator, floor, strict=False))


def log_row(row: Row) -> Row:
    """Log a row as one line; returns the row."""
    where = f"{row.job} {row.subject} {row.size:>5} {row.name:24s}"
    if not row.samples:
        log.info("%s no rate: %s", where, row.problem)
        return row
    parts = [f"{row.median:10.4g} {row.unit} ({min(row.samples):.4g} to {max(row.samples):.4g})"]
    parts += [f"{share:.2f} of {floor}" for floor, share in row.shares.items()]
    parts += [_other_load(row)] if row.disturbed else []
    log.info("%s %s", where, ", ".join(parts))
    return row


def as_json(machine: Mapping, floors: Mapping[str, Sequence[float]], rows: Sequence[Row]) -> str:
    """The content of `<job>.json`."""
    spread = {
        name: {"min": min(x), "median": statistics.median(x), "max": max(x), "samples": list(x)}
        for name, x in floors.items()
    }
    content = {"schema": 1, "machine": machine, "floors": spread, "rows": [row.as_dict() for row in rows]}
    return json.dumps(_finite(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


COLUMNS = ("what", "subject", "size", "engine", "median", "min–max", "unit", "share of floors", "agreement", "note")


def table(rows: Sequence[Row]) -> str:
    """Markdown, a line for each row."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    return "\n".join(lines + [f"| {' | '.join(cells(row))} |" for row in rows])


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, one piece per column of `table`."""
    shares = ", ".join(f"{share:.2f} {floor}" for floor, share in row.shares.items())
    fact = ", ".join(f"{name} {_short(value)}" for name, value in row.facts.items())
    note = "; ".join(x for x in (row.problem, _other_load(row), fact) if x)
    return (
        row.job,
        row.subject,
        str(row.size),
        row.name,
        f"{row.median:.4g}" if row.samples else "–",
        f"{min(row.samples):.4g}–{max(row.samples):.4g}" if row.samples else "–",
        row.unit,
        shares or "–",
        _agreement(row.agreement),
        note or "–",
    )


def _other_load(row: Row) -> str:
    return f"others used {row.other_load:.2f} CPU" if row.disturbed else ""


def _agreement(agreement: Agreement | None) -> str:
    if agreement is None:
        return "–"
    text = f"{agreement.error:.1e} {'≤' if agreement.passed else '>'} {agreement.limit:.0e}"
    if not math.isnan(agreement.kl):
        text += f", KL {agreement.kl:.2g}, top-1 {agreement.top1:.0%}"
    return text


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _finite(value: object) -> object:
    """JSON knows no NaN: null."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
