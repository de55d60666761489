"""Checkpoints with random damage: open, inspect, merge and convert give an error of ours or a right answer, quickly."""

import contextlib
import io
import json
import multiprocessing
import os
import pickle
import random
import shutil
import struct
import time
import zipfile
from collections import Counter
from pathlib import Path

import torch
from models import random_lora, random_model, random_state
from safetensors.torch import save_file

from rwkv_lab import merge, open_checkpoint
from rwkv_lab.bench.machine import forget_peak
from rwkv_lab.checkpoint import write_checkpoint
from rwkv_lab.checkpoint.statistics import statistics
from rwkv_lab.convert import convert
from rwkv_lab.errors import RwkvLabError
from rwkv_lab.machine import memory_of
from rwkv_lab.names import split_block

LONGEST = 2.0  # seconds of processor time
STUCK = 60.0  # seconds of wall time after which a case is a hang, however busy the machine is
MOST = 500 * 2**20  # bytes that a case may take beyond what the process had
context = multiprocessing.get_context("fork")


def sources(folder: Path) -> list[Path]:
    """A good file of every kind; none is above some hundred kB."""
    from random_models import make_layout, write_model

    folder.mkdir(parents=True)
    torch.save(random_model(), folder / "model.pth")
    save_file(random_model(), folder / "model.safetensors")
    torch.save(random_state(), folder / "state.pth")
    torch.save(random_lora(), folder / "lora.pth")
    write_checkpoint(folder / "shards", random_model(), max_shard_size=4096)
    large = write_model(folder / "for_gguf.pth", make_layout("7.0", head_size=32, n_head=2, vocab_size=256))
    convert(large, "gguf", folder / "model.gguf")
    large.unlink()
    convert(folder / "model.pth", "fla", folder / "fla")
    return sorted(folder.iterdir())


class Hostile:
    """Unpickled by Python, it would make a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def mutate(path: Path, rng: random.Random, marker: Path) -> str:
    """Damage a file, or one of the files of a folder; what was done."""
    if path.is_dir():
        path = rng.choice(sorted(path.iterdir()))
    data = bytearray(path.read_bytes())
    way = rng.choice(["bits", "cut", "zeros", "length", "number", "text", "moved", "zip", "pickle", "longer"])
    at = rng.randrange(max(len(data), 1))
    head = rng.randrange(min(max(len(data) - 8, 1), 4096))  # where headers lie
    if way == "bits":
        for _ in range(rng.choice([1, 3, 30])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif way == "cut":
        del data[at:]
    elif way == "zeros":
        end = min(at + rng.choice([1, 64, 4096]), len(data))
        data[at:end] = bytes(end - at)
    elif way == "length":
        data[head : head + 8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**40, 2**63 - 1, 2**64 - 1]))
    elif way == "number":
        digits = [i for i, b in enumerate(data[:65536]) if 48 <= b < 58]
        for i in rng.sample(digits, min(len(digits), rng.choice([1, 5]))):
            data[i] = rng.choice(b"0123456789-e.")
    elif way == "text":
        data[head : head + 4] = rng.choice([b"\xff\xfe", b"{}[]", b'""""', b"null", b"\n\n\n\n", b"1e99"])
    elif way == "moved":
        size = rng.choice([16, 256, 4096])
        data[at : at + size] = data[head : head + size]
    elif way == "longer":
        data += rng.randbytes(rng.choice([1, 100, 70_000]))
    elif zipfile.is_zipfile(io.BytesIO(data)):
        data = bytearray(_zipped_again(bytes(data), rng, Hostile(marker) if way == "pickle" else None))
    else:
        data[:0] = pickle.dumps(Hostile(marker)) if way == "pickle" else b"PK\x03\x04"
    path.write_bytes(bytes(data))
    return way


def _zipped_again(data: bytes, rng: random.Random, hostile: Hostile | None) -> bytes:
    """A zip file of the same records, one of which is another, lost, twice, packed or renamed."""
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        records = [(info.filename, old.read(info)) for info in old.infolist()]
    i = rng.randrange(len(records))
    name, content = records[i]
    if hostile is not None:
        i = next(n for n, (name, _) in enumerate(records) if name.endswith("data.pkl"))
        records[i] = records[i][0], pickle.dumps({"emb.weight": hostile})
    else:
        change = rng.choice(["lost", "twice", "renamed", "shorter", "other"])
        if change == "lost":
            del records[i]
        elif change == "twice":
            records.append((name, content[::-1]))
        else:
            other = {"renamed": ("x/../../" + name, content), "shorter": (name, content[: len(content) // 2])}
            records[i] = other.get(change, (name, rng.randbytes(len(content))))
    made = io.BytesIO()
    with contextlib.suppress(UserWarning), zipfile.ZipFile(made, "w", rng.choice([0, 0, zipfile.ZIP_DEFLATED])) as new:
        for name, content in records:
            new.writestr(name, content)
    return made.getvalue()


def jobs(path: Path, good: Path, out: Path) -> dict:
    """What is done with a damaged file."""

    def inspect():
        with open_checkpoint(path) as ck:
            return ck.kind, str(ck.layout), statistics(ck), [split_block(name) for name in ck]

    return {
        "inspect": inspect,
        "merge as base": lambda: merge(path, good / "state.pth", out / "a.pth"),
        "merge as tuned": lambda: merge(good / "model.pth", path, out / "b.pth"),
        "convert": lambda: convert(path, "safetensors", out / "c.safetensors"),
    }


def one_case(number: int, good: Path, work: Path) -> list[tuple[str, str, str]]:
    """[(job, outcome, what was wrong about it)] of a damaged file; the last is "" where all is as it should be."""
    rng = random.Random(number)
    source = rng.choice(sorted(good.iterdir()))
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    path, marker, found = work / source.name, work / "marker", []
    shutil.copytree(source, path) if source.is_dir() else shutil.copyfile(source, path)
    way = mutate(path, rng, marker)
    for name, job in jobs(path, good, work).items():
        forget_peak()
        there = {*os.listdir(work)}
        before, start, wrong = memory_of("RssAnon") or 0, time.process_time(), ""
        try:
            job()
            outcome = "an answer"
        except RwkvLabError as e:
            outcome = type(e).__name__
        except Exception as e:
            outcome, wrong = type(e).__name__, f"{way}: {e}"
        seconds, more = time.process_time() - start, (memory_of("VmHWM") or 0) - before
        if seconds > LONGEST:
            wrong = f"{way}: {seconds:.1f} s"
        if more > MOST:
            wrong = f"{way}: {more / 2**20:.0f} MiB"
        if marker.exists():
            wrong = f"{way}: code in the file was run"
        if outcome != "an answer" and (left := {*os.listdir(work)} - there):
            wrong = f"{way}: {', '.join(sorted(left))} is left"
        found.append((name, outcome, wrong))
    return found


def _work(first: int, last: int, good: Path, work: Path, pipe) -> None:
    torch.set_num_threads(1)
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        for number in range(first, last):
            pipe.send((number, None))
            pipe.send((number, one_case(number, good, work)))
    pipe.send((last, None))


def run(count: int, folder: Path, seed: int = 0) -> tuple[str, list[str]]:
    """(what was done, what was found) of `count` damaged files."""
    good, outcomes, wrong = folder / "good", Counter(), []
    sources(good)
    number, last = seed, seed + count
    while number < last:
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(number, last, good, folder / "work", there))
        process.start()
        there.close()
        with contextlib.suppress(EOFError):
            while number < last:
                if not here.poll(STUCK):
                    wrong.append(f"case {number}: no answer in {STUCK:.0f} s")
                    process.kill()
                    break
                number, found = here.recv()
                for job, outcome, fault in found or ():
                    outcomes[outcome] += 1
                    wrong += [f"case {number}, {job}: {outcome}: {fault}"] if fault else []
        process.join()
        if process.exitcode and not (wrong and f"case {number}: " in wrong[-1]):
            wrong.append(f"case {number}: the process ended with {process.exitcode}")
        number += 1 if number < last else 0
    shutil.rmtree(folder / "work", ignore_errors=True)
    return f"{count} damaged files: {json.dumps(dict(outcomes.most_common()))}", wrong
