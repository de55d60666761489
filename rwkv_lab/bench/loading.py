"""What loading a checkpoint takes: seconds, and the peak of memory above what the imports have taken."""

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rwkv_lab.arguments import checked
from rwkv_lab.bench.comparison import OURS, Rounds, Row, interleave, log_row
from rwkv_lab.bench.engines import load_model
from rwkv_lab.bench.machine import child_environment, forget_peak
from rwkv_lab.bench.peers import Peer, PeerError, open_peer
from rwkv_lab.errors import ParameterError, RwkvLabError
from rwkv_lab.machine import memory_of
from rwkv_lab.paths import to_path, what_is_there


@checked
def measure_loading(
    path: str | Path, subject: str, dtypes: Sequence[str], rounds: Rounds, peers: Sequence[Peer] = ()
) -> list[Row]:
    """Jobs "load" in seconds and "load memory" in MB, each load in a process of its own; the file is in the page cache.

    Memory is the peak of resident memory while loading, less what was resident before, and its share is of the size
    that the model has in memory.

    Raises:
        ParameterError: there is no such file. What cannot be loaded is a row that says why.
    """
    path = to_path(path, "path")
    if not path.exists():
        raise ParameterError(f"There is no file {path}{what_is_there(path)}")
    loads: dict[tuple[str, str], Callable[[], dict]] = {(OURS, dtype): partial(_load, path, dtype) for dtype in dtypes}
    for peer in peers:
        if not peer.command:  # a command loads once per request and reports nothing about it
            loads |= {(peer.name, d): partial(_load_peer, peer, path, d) for d in dtypes if peer.runs(d)}
    replies: dict[tuple[str, str], list[dict]] = {key: [] for key in loads}
    problems: dict[tuple[str, str], str] = {}

    def take(key: tuple[str, str]) -> float:
        try:
            replies[key].append(loads[key]())
        except RwkvLabError as e:
            problems[key] = str(e).splitlines()[0]
            return math.nan
        return replies[key][-1]["seconds"]

    results = interleave({" ".join(key): partial(take, key) for key in loads}, rounds, warm_up=False)
    rows = []
    for key in loads:
        engine, dtype = key
        samples, other_load = results[" ".join(key)]
        if key in problems:
            rows.append(log_row(Row("load", subject, engine, dtype, 1, "s", problem=problems[key])))
            continue
        rows.append(log_row(Row("load", subject, engine, dtype, 1, "s", samples, other_load)))
        peaks = [reply["peak"] for reply in replies[key] if "peak" in reply]
        if peaks:
            row = Row("load memory", subject, engine, dtype, 1, "MB", [peak / 1e6 for peak in peaks])
            ours = replies.get((OURS, dtype))  # a peer holds what our model holds in the same dtype
            if ours:
                row.facts["model MB"] = ours[0]["bytes"] / 1e6
                row.shares["the model's size"] = row.median / row.facts["model MB"]
            rows.append(log_row(row))
    return rows


def _load(path: Path, dtype: str) -> dict:
    """In a process of its own: "seconds", "bytes" of the model, and "peak" where the system reports it."""
    command = [sys.executable, "-m", "rwkv_lab.bench.loading", str(path), dtype]
    done = subprocess.run(command, capture_output=True, text=True, env=child_environment())
    if done.returncode:
        raise RwkvLabError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "loading ended")
    return json.loads(done.stdout.splitlines()[-1])


def _load_peer(peer: Peer, path: Path, dtype: str) -> dict:
    with open_peer(peer, path, dtype) as session:
        if "seconds" not in session.loaded:
            raise PeerError("it does not report how long loading takes")
        return session.loaded


def _measured(path: str, dtype: str) -> dict:
    """In the child process: load, and sample nothing; the system keeps the peak."""
    forget_peak()
    before, start = memory_of("VmRSS"), time.perf_counter()
    model = load_model(Path(path), dtype)
    seconds = time.perf_counter() - start
    tensors = [*model.parameters(), *model.buffers()]
    reply = {"seconds": seconds, "bytes": sum(t.nbytes for t in tensors)}
    peak = memory_of("VmHWM")
    return reply if before is None or peak is None else reply | {"peak": peak - before}


if __name__ == "__main__":
    print(json.dumps(_measured(*sys.argv[1:])))
