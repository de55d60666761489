"""The jobs of `scaling` carried out on models of three sizes, beside what their formulas say.

Every job runs in a process of its own (`file_jobs`), and right after it, in the same process, the work that its time is
counted in: a copy of as many bytes, a product of matrices, reading memory. The ratio of the two processor times hardly
depends on what else the machine does; the seconds do. A job that does not fit into memory is not run, and says so.
"""

import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rwkv_lab.bench.file_jobs import in_a_process, measured
from rwkv_lab.bench.machine import describe_machine, matmul_rate, read_rate
from rwkv_lab.bench.models import SHAPES, check_sizes, random_lora, random_model, random_state
from rwkv_lab.bench.scaling import ALL, JOBS, RANK, TOKENS, Job, Rates, parameters, training_spec
from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.checkpoint.source import WRITE_BLOCK
from rwkv_lab.checkpoint.statistics import statistics as statistics_of
from rwkv_lab.machine import anonymous_memory, disk_free, memory_free
from rwkv_lab.progress import human_bytes, human_seconds

SIZES = ("v7-0.1b", "v7-0.4b", "v7-1.5b")
_BESIDE = 1_500_000_000  # bytes that stay free for the processes themselves
_SQUARE = 1024  # of the product of matrices
_NUMBERS = 1 << 26  # float32, read from memory


def measure_scaling(folder: Path, work: Path, sizes: Sequence[str] = SIZES, jobs: Sequence[str] | None = None) -> dict:
    """Run every job on a model of each size, and put what it took beside its formula.

    Args:
        folder: with the models as `<size>.pth`, and what is tuned of them; those that are missing are made there.
        work: outputs go there, and are removed.
        jobs: by name; all of `RUNS` unless some are given.
    Returns:
        {"machine", "rates", "results": [{"job", "size", "parameters", "memory", "measured_memory", "disk",
        "measured_disk", "seconds", "processor", "ratio", "factor", "problem"}]}
    Raises:
        ParameterError: a size that there is not.
    """
    check_sizes(sizes)
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for size in sizes:
        inputs = _inputs(folder, size)
        for name in jobs or RUNS:
            results.append(_result(JOBS[name], size, inputs, work))
            print(" ".join(_cells(results[-1])).strip(), flush=True)
        work.with_name("tuned.pth").unlink(missing_ok=True)
    return {"machine": describe_machine(), "rates": vars(_rates(folder, sizes, work)), "results": results}


def _inputs(folder: Path, size: str) -> dict[str, Path]:
    paths = {name: folder / f"{size}{end}.pth" for name, end in (("base", ""), ("state", "-state"), ("lora", "-lora"))}
    layout = SHAPES[size]
    makers: dict[str, Callable[[Path], None]] = {
        "base": lambda path: random_model(path, layout),
        "state": lambda path: random_state(path, layout),
        "lora": lambda path: random_lora(path, layout, RANK),
    }
    for name, path in paths.items():
        if not path.exists():
            makers[name](path)
    return paths


def _result(job: Job, size: str, inputs: Mapping[str, Path], work: Path) -> dict:
    """What a job took of a model, and what its formulas say."""
    layout = SHAPES[size]
    memory, disk = job.memory(layout), job.disk(layout)
    row = {"job": job.name, "size": size, "parameters": parameters(layout), "memory": memory, "disk": disk}
    row |= {"factor": job.factor, "problem": ""}
    if memory + _BESIDE > memory_free():
        return row | {"problem": f"{human_bytes(memory)} of memory are needed, {human_bytes(memory_free())} are free"}
    if 2 * disk > disk_free(work):
        return row | {"problem": f"{human_bytes(2 * disk)} of disk are needed, {human_bytes(disk_free(work))} are free"}
    words = [str(inputs[name]) for name in ("base", "state", "lora")]
    got = in_a_process("rwkv_lab.bench.scaling_runs", job.name, size, *words, str(work / "out"))
    return row | {
        "measured_memory": got["anon_bytes"],
        "measured_disk": got["written"],
        "seconds": got["seconds"],
        "processor": got["processor"],
        "ratio": got["processor"] / got["of_work"],
    }


def _rates(folder: Path, sizes: Sequence[str], work: Path) -> Rates:
    """Of this machine, now."""
    source = folder / f"{sizes[0]}.pth"
    start = time.perf_counter()
    _copy(source, work / "copy", source.stat().st_size)
    seconds = time.perf_counter() - start
    (work / "copy").unlink()
    return Rates(source.stat().st_size / seconds, matmul_rate(torch.float32) * 1e9, read_rate() * 1e9)


# ---------------------------------------------------------------------- in the child process


def _merge(inputs: Mapping[str, Path], out: Path, tuned: str, **given: object) -> Callable[[], object]:
    from rwkv_lab.merge import merge

    return lambda: merge(inputs["base"], inputs[tuned], out.with_suffix(".pth"), **given)  # type: ignore[arg-type]


def _mix(inputs: Mapping[str, Path], out: Path) -> Callable[[], object]:
    from rwkv_lab.merge import merge

    tuned = out.parent.with_name("tuned.pth")  # beside the folder of outputs; equal numbers take as long as others
    if not tuned.exists():
        shutil.copyfile(inputs["base"], tuned)
    return lambda: merge(inputs["base"], tuned, out.with_suffix(".pth"), method="linear", weights=[0.5, 0.5])


def _convert(inputs: Mapping[str, Path], out: Path) -> Callable[[], object]:
    from rwkv_lab.convert import to_safetensors

    return lambda: to_safetensors(inputs["base"], out.with_suffix(".safetensors"))


def _inspect(inputs: Mapping[str, Path], out: Path) -> Callable[[], object]:
    def look() -> None:
        with open_checkpoint(inputs["base"]) as ck:
            statistics_of(ck)

    return look


def _export(inputs: Mapping[str, Path], out: Path) -> Callable[[], object]:
    from rwkv_lab.export import export_onnx

    return lambda: export_onnx(inputs["base"], out)


def _load(dtype: str, **given: Any) -> Callable[[Mapping[str, Path], Path], Callable[[], object]]:
    def prepared(inputs: Mapping[str, Path], out: Path) -> Callable[[], object]:
        from rwkv_lab.model import RWKV_Dual

        return lambda: RWKV_Dual.from_pretrained(inputs["base"], dtype=dtype, **given)

    return prepared


def _read(count: int) -> Callable[[Mapping[str, Path], Path], Callable[[], object]]:
    """Tokens at once, or one after the other where there is one."""

    def prepared(inputs: Mapping[str, Path], out: Path) -> Callable[[], object]:
        from rwkv_lab.model import RWKV_Dual

        model = RWKV_Dual.from_pretrained(inputs["base"]).requires_grad_(False).eval()
        tokens = torch.arange(count)[None] % model.layout.vocab_size
        model(tokens[:, :2], state=model.create_state(batch_size=1))  # compiles what is compiled on first use
        state = model.create_state(batch_size=1)
        return lambda: model(tokens, state=state)

    return prepared


def _train(kind: str) -> Callable[[Mapping[str, Path], Path], Callable[[], object]]:
    def prepared(inputs: Mapping[str, Path], out: Path) -> Callable[[], object]:
        from rwkv_lab.train.models import make_model, trained_parameters
        from rwkv_lab.train.optimiser import make_optimiser, schedule

        spec = training_spec(kind, inputs["base"])
        model = make_model(spec)
        optimiser = make_optimiser(trained_parameters(model), schedule(spec))
        tokens = torch.arange(TOKENS + 1)[None] % model.layout.vocab_size

        def step() -> None:
            logits, _ = model.parallel(tokens[:, :-1])
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
            optimiser.step()

        return step

    return prepared


RUNS: dict[str, Callable[[Mapping[str, Path], Path], Callable[[], object]]] = {
    "merge a state": lambda inputs, out: _merge(inputs, out, "state"),
    "merge a LoRA": lambda inputs, out: _merge(inputs, out, "lora", alpha=RANK),
    "mix two models": _mix,
    "convert": _convert,
    "inspect values": _inspect,
    "load in float32": _load("fp32"),
    "load in bfloat16": _load("bf16"),
    "pack to int8": _load("bf16", weights="int8"),
    f"read {TOKENS} tokens": _read(TOKENS),
    "write one token": _read(1),
    "train a state, a step": _train("state"),
    "train a LoRA, a step": _train("lora"),
    "train all weights, a step": _train("full"),
    "export to ONNX, float32": _export,
}


def _measured(name: str, size: str, base: str, state: str, lora: str, out: str) -> dict:
    """In the child process: a job, its memory from before a model is loaded, its processor time from when it is."""
    inputs = {"base": Path(base), "state": Path(state), "lora": Path(lora)}
    target = Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)

    def whole() -> dict[str, float]:
        run = RUNS[name](inputs, target)
        before, start = _processor(), time.perf_counter()
        run()
        return {"processor": _processor() - before, "seconds": time.perf_counter() - start}

    there = {path.name for path in target.parent.iterdir()}
    found = measured(whole, anonymous_memory)
    made = [path for path in target.parent.iterdir() if path.name not in there]
    job = JOBS[name]
    found |= {"written": sum(map(_size, made)), "of_work": _processor_of(job, job.work(SHAPES[size]), inputs, target)}
    for path in made:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return found


def _processor() -> float:
    """Seconds that this process and those that it has waited for computed."""
    uses = [resource.getrusage(which) for which in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)


def _size(path: Path) -> int:
    """Bytes of a file, or of those in a folder; a further name of a file that was there counts nothing."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(one.stat().st_size for one in files if one.is_file() and one.stat().st_nlink == 1)


def _processor_of(job: Job, work: float, inputs: Mapping[str, Path], out: Path) -> float:
    """Processor seconds of the work that a job's time is counted in, from a part of it."""
    before = _processor()
    if job.unit == "copy":
        copy = out.with_name("copy")
        done = _copy(inputs["base"], copy, min(round(work), 1 << 29))
        copy.unlink()
    elif job.unit == "multiply":
        a, b = torch.randn(2, _SQUARE, _SQUARE)
        a @ b
        before, times = _processor(), 8
        for _ in range(times):
            a @ b
        done = times * 2 * _SQUARE**3
    else:
        values = torch.ones(_NUMBERS)
        before, times = _processor(), 4
        for _ in range(times):
            values.sum()
        done = times * values.nbytes
    return (_processor() - before) * work / done


def _copy(source: Path, target: Path, most: int) -> int:
    """Copy the beginning of a file; how many bytes."""
    done, buffer = 0, bytearray(WRITE_BLOCK)  # as cp
    with source.open("rb", 0) as reader, target.open("wb", 0) as writer:
        while done < most and (count := reader.readinto(buffer)):
            writer.write(memoryview(buffer)[:count])
            done += count
        os.fsync(writer.fileno())
    return done


# ---------------------------------------------------------------------- tables


def _cells(row: dict) -> list[str]:
    """Job, size, memory, disk, time of one result."""
    if row["problem"]:
        return [row["job"], row["size"], row["problem"], "", "", ""]
    disk = human_bytes(row["measured_disk"]) if row["measured_disk"] else "–"
    return [
        row["job"],
        row["size"],
        f"{human_bytes(row['memory'])} / {human_bytes(row['measured_memory'])}",
        f"{human_bytes(row['disk']) if row['measured_disk'] else '–'} / {disk}",
        f"{row['factor']:g} / {row['ratio']:.2g}",
        f"{row['processor']:.1f}",
    ]


def table(report: dict) -> str:
    """Two tables in Markdown: what was measured beside its formula, and what the formulas say for other sizes."""
    head = ("job", "model", "memory: formula / measured", "disk", "factor", "processor seconds")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [f"| {' | '.join(_cells(row))} |" for row in report["results"]]
    rates = Rates(**report["rates"])
    lines += ["", f"| job | memory; disk; work | {' | '.join(ALL)} |", "|---" * (len(ALL) + 2) + "|"]
    for job in JOBS.values():
        cells = [f"{human_bytes(job.memory(x))}, {_seconds(job.seconds(x, rates))}" for x in ALL.values()]
        lines.append(f"| {job.name} | {'; '.join(job.in_words)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else human_seconds(seconds)


if __name__ == "__main__":
    print(json.dumps(_measured(*sys.argv[1:])))
