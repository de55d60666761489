"""What loading a checkpoint takes: seconds, and the peak of memory above what the imports have taken."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rwkv_lab.bench.contest import Row, interleave, say
from rwkv_lab.bench.engines import OURS, load_model
from rwkv_lab.bench.machine import forget_peak, memory_of
from rwkv_lab.bench.peers import Peer, PeerError, child_environment, open_peer
from rwkv_lab.errors import RwkvLabError


def measure_loading(
    path: Path, subject: str, dtypes: Sequence[str], rounds: int, peers: Sequence[Peer] = ()
) -> list[Row]:
    """Jobs "load" in seconds and "load memory" in MB, each load in a process of its own; the file is in the page cache.

    Memory is the peak of resident memory while loading, less what was resident before, and its share is of the size
    that the model has in memory.
    """
    rows, contestants, found = [], {}, {}
    for dtype in dtypes:
        contestants[OURS, dtype] = lambda dtype=dtype: _load(path, dtype)
    for peer in peers:
        if not peer.command:  # a command loads once per request, and says nothing about it
            for dtype in dtypes:
                if peer.runs(dtype):
                    contestants[peer.name, dtype] = lambda peer=peer, dtype=dtype: _load_peer(peer, path, dtype)

    def sampler(who: tuple[str, str], load: Callable[[], dict]) -> Callable[[], float]:
        def take() -> float:
            reply = load()
            found.setdefault(who, []).append(reply)
            return reply["seconds"]

        return take

    able = {}
    for (engine, dtype), load in contestants.items():
        try:
            load()
            able[f"{engine} {dtype}"] = sampler((engine, dtype), load)
        except RwkvLabError as e:
            problem = str(e).splitlines()[0]
            rows.append(say(Row("load", subject, engine, dtype, 1, "s", problem=problem)))
    results = interleave(able, rounds, warm_up=False)
    for (engine, dtype), replies in found.items():
        samples, foreign = results[f"{engine} {dtype}"]
        rows.append(say(Row("load", subject, engine, dtype, 1, "s", samples, foreign)))
        peaks = [reply["peak"] for reply in replies if reply.get("peak")][-rounds:]
        if peaks:
            # A peer holds what our model holds in the same dtype.
            size = next((r["bytes"] for r in found.get((OURS, dtype), replies) if "bytes" in r), None)
            row = Row("load memory", subject, engine, dtype, 1, "MB", [peak / 1e6 for peak in peaks])
            if size:
                row.shares["the model's size"] = row.median * 1e6 / size
                row.facts["model MB"] = size / 1e6
            rows.append(say(row))
    return rows


def _load(path: Path, dtype: str) -> dict:
    command = [sys.executable, "-m", "rwkv_lab.bench.loading", str(path), dtype]
    done = subprocess.run(command, capture_output=True, text=True, env=child_environment())
    if done.returncode:
        raise RwkvLabError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "loading ended")
    return json.loads(done.stdout.splitlines()[-1])


def _load_peer(peer: Peer, path: Path, dtype: str) -> dict:
    with open_peer(peer, path, dtype) as session:
        if "seconds" not in session.loaded:
            raise PeerError("it does not tell how long loading takes")
        return session.loaded


def _measured(path: str, dtype: str) -> dict:
    """In the child process: load, and sample nothing; the system keeps the peak."""
    forget_peak()
    before, start = memory_of("VmRSS"), time.perf_counter()
    model = load_model(Path(path), dtype)
    seconds = time.perf_counter() - start
    tensors = [*model.parameters(), *model.buffers()]
    reply = {"seconds": seconds, "bytes": sum(t.nbytes for t in tensors)}
    return reply if before is None else reply | {"peak": memory_of("VmHWM") - before}


if __name__ == "__main__":
    print(json.dumps(_measured(*sys.argv[1:])))
