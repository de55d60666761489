"""What a merge costs, beside `cp` of the base and beside the script that people use today.

Every way runs in a process of its own, in turn, several rounds; the clock stops when the disk has everything (`sync`).
Memory is the peak of RssAnon above what the process had after its imports: pages of mapped files do not count, since
the system can drop them. Answers are compared before a figure is reported.
"""

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from rwkv_lab.bench.machine import describe_machine, memory_of
from rwkv_lab.bench.models import SHAPES, random_lora, random_model, random_state
from rwkv_lab.errors import NumericsError
from rwkv_lab.progress import human_bytes

LORA_ALPHA = 32.0
WAYS = ("cp", "state, scan=changed", "state, scan=all", "lora, scan=all", "naive state", "naive lora")


def benchmark_merge(folder: Path, sizes: list[str], rounds: int, lora_rank: int) -> dict:
    """Time every way at every size.

    Args:
        folder: where inputs and outputs go; needs free space for about three times the largest model.
        sizes: names from `SHAPES`.
        rounds: how often each way runs; the order turns by one each round.
        lora_rank: r of the LoRA.
    Returns:
        {"machine": …, "results": [{"size", "base_bytes", "way", "seconds": […], "anon_bytes": […]}]}
    Raises:
        NumericsError: two ways disagree about the merged file.
    """
    results = []
    for size in sizes:
        inputs = _inputs(folder, size, lora_rank)
        _check_agreement(folder, inputs)
        runs: dict[str, list[dict]] = {way: [] for way in WAYS}
        for r in range(rounds):
            for way in WAYS[r % len(WAYS) :] + WAYS[: r % len(WAYS)]:
                runs[way].append(_run(way, inputs, folder / "out.pth"))
                print(f"{size} round {r + 1}/{rounds}  {way:20s} {runs[way][-1]['seconds']:6.2f} s", flush=True)
        for way, each in runs.items():
            seconds, anon = [x["seconds"] for x in each], [x["anon_bytes"] for x in each]
            results.append(
                {
                    "size": size,
                    "base_bytes": inputs["base"].stat().st_size,
                    "way": way,
                    "seconds": seconds,
                    "anon_bytes": anon,
                }
            )
    return {"machine": describe_machine(), "rounds": rounds, "lora_rank": lora_rank, "results": results}


def table(report: dict) -> str:
    """Markdown: medians, ratio to `cp` of the same round, spread, memory."""
    lines = [
        "| base | way | seconds, median (min–max) | × cp, median of rounds | anonymous memory, peak |",
        "|---|---|---|---|---|",
    ]
    for row in report["results"]:
        copy = next(r for r in report["results"] if r["size"] == row["size"] and r["way"] == "cp")
        ratio = statistics.median(a / b for a, b in zip(row["seconds"], copy["seconds"], strict=True))
        s = row["seconds"]
        memory = human_bytes(max(row["anon_bytes"])) if any(row["anon_bytes"]) else "–"
        lines.append(
            f"| {row['size']}, {human_bytes(row['base_bytes'])} | {row['way']} | {statistics.median(s):.2f} "
            f"({min(s):.2f}–{max(s):.2f}) | {ratio:.2f} | {memory} |"
        )
    return "\n".join(lines)


def _inputs(folder: Path, size: str, rank: int) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = {k: folder / f"{size}-{k}.pth" for k in ("base", "state", f"lora{rank}")}
    makers: list[Callable[[Path], None]] = [
        lambda p: random_model(p, SHAPES[size]),
        lambda p: random_state(p, SHAPES[size]),
        lambda p: random_lora(p, SHAPES[size], rank),
    ]
    for path, make in zip(paths.values(), makers, strict=True):
        if not path.exists():
            make(path)
    return {"base": paths["base"], "state": paths["state"], "lora": paths[f"lora{rank}"]}


def _check_agreement(folder: Path, inputs: dict[str, Path]) -> None:
    """Our output against the naive script's, tensor by tensor."""
    for tuned, naive, ours in (("state", "naive state", "state, scan=all"), ("lora", "naive lora", "lora, scan=all")):
        outputs = folder / "naive.pth", folder / "out.pth"
        for way, out in zip((naive, ours), outputs, strict=True):
            _run(way, inputs, out)
        expected, got = (torch.load(p, mmap=True, weights_only=True) for p in outputs)
        if list(expected) != list(got):
            raise NumericsError(f"{tuned}: the two outputs do not have the same tensors")
        # The naive script adds B A in bfloat16, with two roundings more than ours: 3 units in the last place.
        limit = 0.0 if tuned == "state" else 3 * torch.finfo(torch.bfloat16).eps
        for name in expected:
            a, b = expected[name], got[name]
            if not torch.equal(a, b) and float((a.float() - b.float()).abs().max()) > limit * float(a.abs().max()):
                raise NumericsError(f"{tuned}: {name} differs from the naive script's; no figures are reported")
        outputs[0].unlink()


def _run(way: str, inputs: dict[str, Path], out: Path) -> dict:
    out.unlink(missing_ok=True)
    out.with_name(out.name + ".json").unlink(missing_ok=True)
    os.sync()
    if way == "cp":
        start = time.perf_counter()
        subprocess.run(["cp", inputs["base"], out], check=True)
        os.sync()
        return {"seconds": time.perf_counter() - start, "anon_bytes": 0}
    tuned = inputs["lora" if "lora" in way else "state"]
    command = [sys.executable, "-m", "rwkv_lab.bench.merging", way, inputs["base"], tuned, out]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def _naive_state(base: str, tuned: str, out: str) -> None:
    weights = torch.load(base, map_location="cpu", weights_only=True)
    for name, value in torch.load(tuned, map_location="cpu", weights_only=True).items():
        weights[name] = value.clone()
    torch.save(weights, out)


def _naive_lora(base: str, tuned: str, out: str) -> None:
    weights = torch.load(base, map_location="cpu", weights_only=True)
    adapter = torch.load(tuned, map_location="cpu", weights_only=True)
    for name in adapter:
        if name.endswith(".lora_A"):
            stem, a = name.removesuffix(".lora_A"), adapter[name]
            weights[f"{stem}.weight"] += adapter[f"{stem}.lora_B"] @ a * (LORA_ALPHA / a.shape[0])
    torch.save(weights, out)


def _measured(way: str, base: str, tuned: str, out: str) -> dict:
    """In the child process: run one way, sample its memory."""
    from rwkv_lab.merge import merge

    def ours() -> None:
        scan = way.split("scan=")[1]
        merge(base, tuned, out, alpha=LORA_ALPHA if "lora" in way else None, scan=scan)

    job = {"naive state": lambda: _naive_state(base, tuned, out), "naive lora": lambda: _naive_lora(base, tuned, out)}
    peak, stop = [0], threading.Event()

    def sample() -> None:
        while not stop.wait(0.002):
            peak[0] = max(peak[0], memory_of("RssAnon") or 0)

    before = memory_of("RssAnon") or 0  # 0 where the system does not report it
    watcher = threading.Thread(target=sample)
    watcher.start()
    start = time.perf_counter()
    job.get(way, ours)()
    os.sync()
    seconds = time.perf_counter() - start
    stop.set()
    watcher.join()
    return {"seconds": seconds, "anon_bytes": max(peak[0] - before, 0)}


if __name__ == "__main__":
    print(json.dumps(_measured(*sys.argv[1:])))
