"""What another busy process costs us: rates alone and beside a busy loop, for both ways in which threads can wait.

How threads wait is read when torch is loaded, so every piece of work has a process of its own for each way; it takes
one sample for each line that it reads.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch

from rwkv_lab.arguments import checked
from rwkv_lab.bench.comparison import Rounds, Row, interleave, log_row, median_share
from rwkv_lab.bench.engines import OURS, Engine, as_rnn, busy_loop, decoder, load_model, seconds_of, tokens_for
from rwkv_lab.bench.machine import child_environment
from rwkv_lab.bench.training import demo_model, pretraining, training_steps
from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.errors import RwkvLabError
from rwkv_lab.paths import to_path
from rwkv_lab.threads import PASSIVE, VARIABLES
from rwkv_lab.wkv import backends, use_backend

ALONE, BESIDE = "alone", "beside a busy loop"
SLEEP, SPIN = "threads sleep", "threads spin"
# torch before rwkv_lab, where its threads are to wait as they do by default.
_CODE = {SLEEP: "{}", SPIN: "import torch\n{}"}
_START = "import sys; from rwkv_lab.bench.busy import _serve; _serve(*sys.argv[1:])"
_PROMPT, _TOKENS = 512, 32  # of prefill, and of the modes' text


@checked
def measure_beside_a_busy_loop(path: str | Path, subject: str, rounds: Rounds, dtype: str = "bf16") -> list[Row]:
    """Tokens per second of pretraining, modes, prefill and decode, alone and beside a busy loop.

    Args:
        path: the model that is read with and decodes; the others are of the demo model's size.
    Returns:
        Rows with the shares "alone" (the same threads without the loop) and "threads spin" (the other way to wait, in
        the same place).
    Raises:
        RwkvLabError: there is no checkpoint that can be opened, or a process ended.
    """
    path = to_path(path, "path")
    open_checkpoint(path).close()  # before processes are started that would all say the same
    with ExitStack() as stack:
        entries = {}
        for work in WORKS:
            for wait in (SLEEP, SPIN):
                take = stack.enter_context(_process(work, path, dtype, wait))
                entries[work, wait, ALONE], entries[work, wait, BESIDE] = take, partial(_beside, take)
        found = interleave({" / ".join(key): take for key, take in entries.items()}, rounds)
    results = {key: found[" / ".join(key)] for key in entries}
    rows = []
    for key, (samples, other_load) in results.items():
        work, wait, where = key
        about, of_dtype = (subject, dtype) if work in ("prefill", "decode") else ("demo model", "fp32")
        row = Row(f"{work} {where}", about, f"{OURS}, {wait},", of_dtype, 1, "tokens/s", samples, other_load)
        for name, other in ((ALONE, (work, wait, ALONE)), (SPIN, (work, SPIN, where))):
            if other != key:
                row.shares[name] = median_share(samples, results[other][0])
        rows.append(log_row(row))
    return rows


def _beside(take: Callable[[], float]) -> float:
    with busy_loop():
        return take()


@contextmanager
def _process(work: str, path: Path, dtype: str, wait: str) -> Iterator[Callable[[], float]]:
    """A process that waits so; yields a function that has it take one sample."""
    environment = {name: value for name, value in child_environment().items() if name not in VARIABLES}
    process = subprocess.Popen(
        [sys.executable, "-c", _CODE[wait].format(_START), work, str(path), dtype],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment | (PASSIVE if wait == SLEEP else {}),
    )
    assert process.stdin and process.stdout
    requests, replies = process.stdin, process.stdout

    def take() -> float:
        try:
            print(file=requests, flush=True)
            return float(replies.readline())
        except (OSError, ValueError) as e:
            raise RwkvLabError(f"the process that measures {work} ended with code {process.wait()}") from e

    try:
        yield take
    finally:
        process.kill()
        process.communicate()


# ---------------------------------------------------------------------- in the child process


def _serve(work: str, path: str, dtype: str) -> None:
    take = WORKS[work](Path(path), dtype)
    for _ in sys.stdin:
        print(take(), flush=True)


def _pretraining(path: Path, dtype: str) -> Callable[[], float]:
    spec, tokens = pretraining()
    return training_steps("auto", tokens, spec)


def _modes(path: Path, dtype: str) -> Callable[[], float]:
    """What comparing modes does: a text in every mode on every backend, and on the reference in float64."""
    narrow, wide = demo_model(), demo_model().double()
    tokens = tokens_for(narrow.layout.vocab_size, 1, _TOKENS)

    def run() -> None:
        for model, names in ((wide, ["reference"]), (narrow, backends())):
            for backend in names:
                with use_backend(backend):
                    model.parallel(tokens)
                    with as_rnn(model):
                        model(tokens)

    runs = 2 * (1 + len(backends()))
    return lambda: runs * _TOKENS / seconds_of(run, narrow)


def _prefill(path: Path, dtype: str) -> Callable[[], float]:
    model = load_model(path, dtype)
    tokens = tokens_for(model.layout.vocab_size, 1, _PROMPT)
    return lambda: _PROMPT / seconds_of(lambda: model.prefill(tokens), model)


def _decode(path: Path, dtype: str) -> Callable[[], float]:
    model = load_model(path, dtype)
    with torch.no_grad():
        return decoder(Engine(OURS, dtype, model), tokens_for(model.layout.vocab_size, 1, _TOKENS))


WORKS: dict[str, Callable[[Path, str], Callable[[], float]]] = {
    "pretraining": _pretraining,
    "modes": _modes,
    "prefill": _prefill,
    "decode": _decode,
}
