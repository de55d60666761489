"""What a conversion costs, beside `cp` of the source and beside the converters of other projects.

How every way is measured: `file_jobs.py`. Ours are taken as a user calls them, with the output compared with its
source; "written" is what they take until the output is whole and on the disk, without that comparison. Outputs are
compared with each other before a figure is reported.
"""

import contextlib
import importlib
import json
import os
import runpy
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from rwkv_lab.arguments import checked
from rwkv_lab.bench import file_jobs
from rwkv_lab.bench.comparison import Rounds
from rwkv_lab.bench.file_jobs import CP, copied, in_a_process, in_turn, measured, result
from rwkv_lab.bench.machine import describe_machine
from rwkv_lab.bench.models import SHAPES, check_sizes, random_model
from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.checkpoint.gguf_types import BY_NAME
from rwkv_lab.convert import convert
from rwkv_lab.convert.quantised import quantised_values
from rwkv_lab.errors import NumericsError, OutputError
from rwkv_lab.machine import disk_free
from rwkv_lab.paths import to_path
from rwkv_lab.progress import human_bytes

# Way -> (target, dtype, what ends the name of the output).
OURS = {
    "to fla": ("fla", None, ""),
    "to transformers": ("transformers", None, ""),
    "to gguf, BF16": ("gguf", "BF16", ".gguf"),
    "to gguf, Q8_0": ("gguf", "Q8_0", ".gguf"),
    "to gguf, Q4_0": ("gguf", "Q4_0", ".gguf"),
    "fla to pth": ("pth", None, ".pth"),
}
RWKV7_HF, LLAMA = "rwkv7-hf convert", "llama.cpp's script"
# Way -> (what it has to equal, what ends the name of the output).
PEERS = {
    RWKV7_HF: ("to fla", ""),
    f"{RWKV7_HF} --low-memory": ("to fla", ""),
    f"{LLAMA}, BF16": ("to gguf, BF16", ".gguf"),
    f"{LLAMA}, Q8_0": ("to gguf, Q8_0", ".gguf"),
}
_SCRIPT = "convert_hf_to_gguf.py"
_UNUSED = "blk.0.time_mix_v"  # nothing reads them: we write zeros, llama.cpp's script copies of others


@checked
def benchmark_convert(folder: str | Path, sizes: list[str], rounds: Rounds, llama_cpp: str | Path | None) -> dict:
    """Time every way at every size.

    Args:
        folder: where inputs and outputs go; needs free space for about five times the largest model.
        sizes: names from `SHAPES`, of RWKV-7.
        rounds: how often each way runs; the order turns by one each round.
        llama_cpp: folder of llama.cpp's sources, where they are at hand.
    Returns:
        {"machine": …, "rates": …, "results": [{"size", "base_bytes", "way", "seconds": […], "anon_bytes": […],
        "written": […]}]}; "problem" instead of figures of a peer that is not there.
    Raises:
        ParameterError: a size that there is not.
        NumericsError: two ways disagree about the output, or one of ours does not pass its own checks.
        OutputError: the disk has not enough space.
    """
    folder = to_path(folder, "folder")
    llama_cpp = None if llama_cpp is None else to_path(llama_cpp, "llama_cpp")
    check_sizes(sizes)
    results = []
    absent = _absent(llama_cpp)
    for size in sizes:
        base = folder / f"{size}.pth"
        if not base.exists():
            random_model(base, SHAPES[size])
        _check_space(folder, 4 * base.stat().st_size)
        inputs = {"base": base, "fla": folder / f"{size}-fla"}
        if not inputs["fla"].exists():
            convert(base, "fla", inputs["fla"])
        try:
            _check_agreement(folder, inputs, absent, llama_cpp)
            ways = (CP, *OURS, *(way for way in PEERS if way not in absent))
            runs = in_turn(size, ways, rounds, lambda way, inputs=inputs: _run(way, inputs, folder, llama_cpp))
        finally:
            shutil.rmtree(inputs["fla"])
            _remove(folder)
        size_on_disk = base.stat().st_size
        results += [result(size, size_on_disk, way, samples) for way, samples in runs.items()]
        results += [{"size": size, "base_bytes": size_on_disk, "way": w, "problem": p} for w, p in absent.items()]
    return {"machine": describe_machine(), "rounds": rounds, "rates": quantising_rates(), "results": results}


def table(report: dict) -> str:
    """Markdown: as `file_jobs.table`, with a column "written", and under it what quantising does per second."""

    def written(row: dict) -> str:
        return f"{statistics.median(row['written']):.2f}" if any(row.get("written", ())) else "–"

    rows = file_jobs.table(report["results"], "source", {"written, seconds": written})
    rates = [f"| {what} | {rate:.2f} |" for what, rate in report["rates"].items()]
    return "\n".join([rows, "", "| one thread, values in memory | GB/s of the source |", "|---|---|", *rates])


def quantising_rates() -> dict[str, float]:
    """GB/s of bfloat16 values on one thread: a copy of them, our quantiser, and that of the package gguf."""
    import gguf

    values = torch.randn(1 << 24).bfloat16()
    some, there = values[: 1 << 20], torch.empty_like(values)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rates = {"copy": _rate(lambda: there.copy_(values), values)}
        for kind in ("Q8_0", "Q4_0"):
            blocks, number = BY_NAME[kind], gguf.GGMLQuantizationType(BY_NAME[kind].number)
            ours = partial(quantised_values, "values", [values], blocks)
            rates[f"{kind}"] = _rate(lambda ours=ours: list(ours()), values)
            rates[f"{kind}, package gguf"] = _rate(lambda n=number: gguf.quantize(some.float().numpy(), n), some)
        return rates
    finally:
        torch.set_num_threads(threads)


def _rate(job: Callable[[], object], values: torch.Tensor) -> float:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        job()
        seconds.append(time.perf_counter() - start)
    return values.nbytes / min(seconds) * 1e-9


def _absent(llama_cpp: Path | None) -> dict[str, str]:
    """Peers that cannot be measured, and why."""
    found = {}
    if find_spec("rwkv7_hf") is None:
        found |= {way: "absent: pip install rwkv7-hf" for way in PEERS if way.startswith(RWKV7_HF)}
    if llama_cpp is None or not (llama_cpp / _SCRIPT).is_file():
        found |= {way: f"absent: --llama-cpp names no folder with {_SCRIPT}" for way in PEERS if way.startswith(LLAMA)}
    return found


def _check_space(folder: Path, needed: int) -> None:
    if disk_free(folder) < needed:
        raise OutputError(f"{folder} has {human_bytes(disk_free(folder))} free; this takes {human_bytes(needed)}")


def _out(folder: Path, way: str) -> Path:
    end = OURS[way][2] if way in OURS else PEERS[way][1] if way in PEERS else ".pth"
    return folder / f"out-{(CP, *OURS, *PEERS).index(way)}{end}"


def _remove(folder: Path) -> None:
    for path in folder.glob("out-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _run(way: str, inputs: Mapping[str, Path], folder: Path, llama_cpp: Path | None) -> dict:
    _remove(folder)
    return _made(way, inputs, _out(folder, way), llama_cpp)


def _made(way: str, inputs: Mapping[str, Path], out: Path, llama_cpp: Path | None) -> dict:
    if way == CP:
        return copied(inputs["base"], out) | {"written": 0.0}
    source = inputs["fla" if way == "fla to pth" or way.startswith(LLAMA) else "base"]
    words = [source, out] if llama_cpp is None else [source, out, llama_cpp]
    return in_a_process("rwkv_lab.bench.converting", way, *words)


def _check_agreement(folder: Path, inputs: Mapping[str, Path], absent: Mapping[str, str], llama: Path | None) -> None:
    """Peers' outputs against ours, tensor by tensor; the way back against the source."""
    for way in OURS:
        _remove(folder)
        outputs = {way: _out(folder, way)}
        _made(way, inputs, outputs[way], llama)
        if way == "fla to pth":
            _compare(way, *(torch.load(p, mmap=True, weights_only=True) for p in (inputs["base"], outputs[way])))
        for peer in (p for p, (same, _) in PEERS.items() if same == way and p not in absent):
            theirs = _out(folder, peer)
            _made(peer, inputs, theirs, llama)
            _compare(peer, *(map(_tensors, (outputs[way], theirs))))
            shutil.rmtree(theirs) if theirs.is_dir() else theirs.unlink()


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """By name: values of a folder under BlinkDL's names; of a GGUF file the bytes of those that are read, by type."""
    if path.is_dir():
        with open_checkpoint(path) as ck:
            return {name: ck[name] for name in ck}
    import gguf

    tensors = gguf.GGUFReader(path).tensors
    return {t.name: torch.from_numpy(t.data) for t in tensors if not t.name.startswith(_UNUSED)}


def _compare(way: str, expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> None:
    """Refuse other names or values. Of a tensor that the other side keeps in another type only the name counts."""
    if set(expected) != set(found):
        odd = sorted(set(expected) ^ set(found))
        raise NumericsError(
            f"{way}: {len(odd)} tensors are in one output only, first {odd[0]}; no figures are reported"
        )
    for name, a in expected.items():
        b = found[name]
        if a.dtype == b.dtype and not torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)):
            raise NumericsError(f"{way}: {name} differs from what we write; no figures are reported")


def _measured(way: str, source: str, out: str, llama_cpp: str = "") -> dict:
    """In the child process: run one way."""
    if way in OURS:
        return measured(lambda: _ours(way, source, out))
    with contextlib.redirect_stdout(sys.stderr):
        job = _rwkv7_hf(way, source, out) if way.startswith(RWKV7_HF) else _llama(way, source, out, llama_cpp)
        return measured(job)


def _ours(way: str, source: str, out: str) -> dict[str, float]:
    to, dtype, _ = OURS[way]
    done = convert(source, to, out, dtype=dtype)
    failed = [check for check in done.checks if not check.passed]
    if failed:
        raise NumericsError(f"{way}: {failed[0]}")
    return {"written": done.seconds["plan"] + done.seconds["write"]}


def _rwkv7_hf(way: str, source: str, out: str) -> Callable[[], dict[str, float]]:
    """Its command, without the time of its imports."""
    converter = importlib.import_module("rwkv7_hf.converter")
    words = ["--input", source, "--output", out, "--precision", "bf16", *way.removeprefix(RWKV7_HF).split()]

    def job() -> dict[str, float]:
        converter.main(words)
        return {"written": 0.0}

    return job


def _llama(way: str, source: str, out: str, llama_cpp: str) -> Callable[[], dict[str, float]]:
    """Its script, without the time of its large imports."""
    sys.path[:0] = [os.path.join(llama_cpp, "gguf-py"), llama_cpp]  # where it looks for its own modules
    for name in ("gguf", "transformers", "safetensors"):
        importlib.import_module(name)
    kind = way.rpartition(", ")[2].lower()

    def job() -> dict[str, float]:
        sys.argv = [_SCRIPT, source, "--outfile", out, "--outtype", kind]
        runpy.run_path(os.path.join(llama_cpp, _SCRIPT), run_name="__main__")
        return {"written": 0.0}

    return job


if __name__ == "__main__":
    print(json.dumps(_measured(*sys.argv[1:])))
