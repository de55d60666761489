"""Jobs that are killed, or whose disk is full, at random moments: the output is the older one or the new one, whole."""

import contextlib
import hashlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from rwkv_lab import merge
from rwkv_lab.convert import convert
from rwkv_lab.errors import RwkvLabError
from rwkv_lab.train import train

context = multiprocessing.get_context("fork")


def _bytes_of(path: Path) -> str:
    """A hash of a file, or of the files in a folder, without logs; "" where there is none."""
    if not path.exists():
        return ""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    kept = [p for p in files if p.name not in ("export.log", "result.json")]
    return hashlib.sha256(b"".join(p.name.encode() + p.read_bytes() for p in kept)).hexdigest()


def prepare(folder: Path) -> dict[str, tuple[Callable[[Path], object], str]]:
    """Job -> (what it does, given its output, and the output's name)."""
    from random_models import make_layout, write_model
    from tuned_files import write_state

    folder.mkdir(parents=True)
    base = write_model(folder / "base.pth", make_layout("7.0", head_size=32, n_head=4, n_layer=6, vocab_size=256))
    state = write_state(folder / "state.pth", base)
    brief = {"steps": 6, "batch_size": 2, "ctx_len": 32, "seed": 1}
    return {
        "merge": (lambda out: merge(base, state, out, overwrite=True), "out.pth"),
        "convert to a folder": (lambda out: convert(base, "fla", out, overwrite=True), "out"),
        "convert to GGUF": (lambda out: convert(base, "gguf", out, overwrite=True), "out.gguf"),
        "train": (lambda out: train("state", out, base=base, overwrite=True, **brief), "out.pth"),
        **_export(base),
    }


def _export(base: Path) -> dict:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        return {}
    from rwkv_lab.export import export_onnx

    return {"export": (lambda out: export_onnx(base, out, overwrite=True), "onnx")}


def _child(job: Callable[[Path], object], out: Path, limit: int | None, pipe) -> None:
    os.setsid()
    torch.set_num_threads(1)
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        try:
            job(out)
            pipe.send("done")
        except RwkvLabError as e:
            pipe.send(type(e).__name__)
        except BaseException as e:
            pipe.send(f"other: {type(e).__name__}: {e}")


def _start(job, out: Path, limit: int | None = None):
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(job, out, limit, there))
    process.start()
    there.close()
    return process, here


def _result(process, pipe) -> str:
    with contextlib.suppress(EOFError):
        said = pipe.recv()
        process.join()
        return said
    process.join()
    return "killed"


def _write_older(out: Path, called: str) -> None:
    """An older output: a file, or a folder of a kind that may be replaced."""
    if "." in called:
        out.write_bytes(b"an older output")
    else:
        out.mkdir()
        (out / "config.json").write_text("{}")


def _run(count: int, folder: Path, seed: int, end: Callable, what: str) -> tuple[str, list[str]]:
    """Do each job `count` times over the jobs, ended by `end(process, rng, seconds)`, or run under `end`'s limit."""
    jobs, rng, ends, wrong = prepare(folder / "inputs"), random.Random(seed), Counter(), []
    for number in range(count):
        name = [*jobs][number % len(jobs)]
        job, called = jobs[name]
        place = folder / name.replace(" ", "-")
        out = place / called
        if not place.exists():
            place.mkdir()
        start = time.monotonic()
        if (said := _result(*_start(job, out))) != "done":
            wrong.append(f"{number}, {name}: without any trouble: {said}")
            continue
        seconds, good, there = time.monotonic() - start, _bytes_of(out), sorted(p.name for p in place.iterdir())
        shutil.rmtree(out) if out.is_dir() else out.unlink()
        if rng.random() < 0.5:
            _write_older(out, called)
        before = _bytes_of(out)
        said = end(job, out, rng, seconds)
        now = _bytes_of(out)
        ends[f"{said}, {'the older one' if now == before else 'the new one'}"] += 1
        if now not in (before, good):
            wrong.append(f"{number}, {name} ({said}): the output is neither the older one nor the new one")
        if said == "done" and now != good or said.startswith("other"):
            wrong.append(f"{number}, {name}: {said}")
        if (said := _result(*_start(job, out))) != "done" or _bytes_of(out) != good:
            wrong.append(f"{number}, {name}: the next run: {said}, {'another' if said == 'done' else 'no'} output")
        if (left := sorted(p.name for p in place.iterdir())) != there:
            wrong.append(f"{number}, {name}: left beside the output: {set(left) ^ set(there)}")
    listed = ", ".join(f"{n} {end}" for end, n in ends.most_common())
    return f"{count} {what} of {', '.join(jobs)}: {listed}", wrong


def run_kills(count: int, folder: Path, seed: int = 0) -> tuple[str, list[str]]:
    """SIGKILL at a random moment of a job."""

    def end(job, out: Path, rng: random.Random, seconds: float) -> str:
        process, pipe = _start(job, out)
        process.join(rng.uniform(0, seconds))
        process.kill()
        return _result(process, pipe)

    return _run(count, folder, seed, end, "kills")


def run_full_disks(count: int, folder: Path, seed: int = 0) -> tuple[str, list[str]]:
    """No file may grow beyond a random size: what a write gets then is what it gets from a full disk."""

    def end(job, out: Path, rng: random.Random, seconds: float) -> str:
        return _result(*_start(job, out, limit=rng.randrange(1, 2_000_000)))

    return _run(count, folder, seed, end, "full disks")
