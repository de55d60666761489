"""Jobs that write files, beside `cp`: seconds and memory of each, in a process of its own.

Jobs take turns, several rounds; the clock stops when the disk has everything (`sync`). Memory is the peak of RssAnon
above what the process had after its imports: pages of mapped files do not count, since the system can drop them.
"""

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rwkv_lab.bench.machine import child_environment
from rwkv_lab.machine import memory_of
from rwkv_lab.progress import human_bytes

CP = "cp"


def in_turn(size: str, ways: Sequence[str], rounds: int, run: Callable[[str], dict]) -> dict[str, list[dict]]:
    """Samples of every way; the order turns by one each round."""
    runs: dict[str, list[dict]] = {way: [] for way in ways}
    for r in range(rounds):
        turn = r % len(ways)
        for way in (*ways[turn:], *ways[:turn]):
            runs[way].append(run(way))
            print(f"{size} round {r + 1}/{rounds}  {way:32s} {runs[way][-1]['seconds']:6.2f} s", flush=True)
    return runs


def result(size: str, base_bytes: int, way: str, samples: Sequence[dict]) -> dict:
    """The entry of a way in a report: lists of what each sample has."""
    return {"size": size, "base_bytes": base_bytes, "way": way} | {k: [s[k] for s in samples] for k in samples[0]}


def copied(source: Path, out: Path) -> dict:
    """A sample of `cp`."""
    os.sync()
    start = time.perf_counter()
    subprocess.run(["cp", source, out], check=True)
    os.sync()
    return {"seconds": time.perf_counter() - start, "anon_bytes": 0}


def in_a_process(module: str, *words: str | Path) -> dict:
    """What a module prints in its last line, as JSON, when it is run with these words."""
    os.sync()
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=child_environment())
    return json.loads(done.stdout.splitlines()[-1])


def _own() -> int | None:
    return memory_of("RssAnon")


def measured(job: Callable[[], dict[str, float] | None], memory: Callable[[], int | None] = _own) -> dict:
    """A sample of a job in this process, with what the job returns.

    Args:
        memory: bytes of anonymous memory now; None where the system does not report it.
    """
    peak, stop = [0], threading.Event()

    def sample() -> None:
        while not stop.wait(0.002):
            peak[0] = max(peak[0], memory() or 0)

    before = memory() or 0  # 0 where the system does not report it
    watcher = threading.Thread(target=sample)
    watcher.start()
    start = time.perf_counter()
    more = job() or {}
    os.sync()
    seconds = time.perf_counter() - start
    stop.set()
    watcher.join()
    return {"seconds": seconds, "anon_bytes": max(peak[0] - before, 0)} | more


HEAD = ("seconds, median (min–max)", "× cp, median of rounds", "anonymous memory, peak")


def table(rows: Sequence[dict], subject: str, more: dict[str, Callable[[dict], str]] | None = None) -> str:
    """Markdown of `result`s: medians, ratio to `cp` of the same round, spread, memory.

    Args:
        subject: what the first column is called.
        more: further columns, by name.
    """
    names = (subject, "way", *HEAD, *(more or {}))
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        cells = [f"{row['size']}, {human_bytes(row['base_bytes'])}", row["way"], *_figures(row, rows)]
        cells += [column(row) for column in (more or {}).values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _figures(row: dict, rows: Sequence[dict]) -> tuple[str, str, str]:
    if row.get("problem"):
        return row["problem"], "–", "–"
    copy = next(r for r in rows if r["size"] == row["size"] and r["way"] == CP)
    s = row["seconds"]
    ratio = statistics.median(a / b for a, b in zip(s, copy["seconds"], strict=True))
    memory = human_bytes(max(row["anon_bytes"])) if any(row["anon_bytes"]) else "–"
    return f"{statistics.median(s):.2f} ({min(s):.2f}–{max(s):.2f})", f"{ratio:.2f}", memory
