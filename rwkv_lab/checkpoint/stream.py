"""Moves tensors into output files at the speed of a copy, in memory that does not depend on their size.

Where every byte will lie is known beforehand (`file_layout`), so a few threads take one tensor each, in any order. A
tensor passes in blocks that stay in the processor's cache: read, scanned, added to its checksum, written. Meanwhile the
disk already writes what is done. (Letting the kernel copy unchanged bytes, `copy_file_range`, was tried: not faster
than this, and blind.)
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from isal.isal_zlib import crc32

from rwkv_lab.checkpoint.file_layout import FileLayout
from rwkv_lab.checkpoint.gguf_types import BY_NAME as TENSOR_TYPES
from rwkv_lab.checkpoint.numerics import all_finite, round_to
from rwkv_lab.checkpoint.source import BLOCK, WRITE_BLOCK, TensorInfo
from rwkv_lab.errors import NumericsError
from rwkv_lab.lazy_torch import torch
from rwkv_lab.machine import cores
from rwkv_lab.progress import Progress
from rwkv_lab.text import counted

FLUSH_FROM = 1 << 27  # bytes of output from which it pays to write to the disk while still copying
WORKERS = min(2, cores())  # one computes or scans while the other writes


@dataclass(frozen=True)
class OutTensor:
    """A tensor of the output: the bytes of `source` as they are, or the values that `compute` yields.

    `compute()` yields flat tensors, in order, whose values are rounded to `dtype` here, once. `watch(start, values,
    rounded)` is shown every piece of it, flat, before and after rounding; of bytes that are copied both are the same.
    `checksum(crc)` is told the CRC-32 of the bytes that were read, where they are copied.
    Of a quantised tensor (`shape` of its elements, `dtype` uint8) `compute()` yields the bytes of blocks. `gathered` is
    how many bytes of memory computing it takes beyond a few blocks; one of the large ones is computed at a time. Larger
    tensors are written first; `written_as` is the size of the one that this one is computed with, 0 where it is alone.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: TensorInfo | None = None
    compute: Callable[[], Iterable[torch.Tensor]] | None = None
    watch: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None
    checksum: Callable[[int], None] | None = None
    quantised: str = ""  # the type of its blocks, "Q8_0"
    gathered: int = 0
    written_as: int = 0

    @property
    def nbytes(self) -> int:
        n = 1
        for d in self.shape:
            n *= d
        return TENSOR_TYPES[self.quantised].bytes_of(n) if self.quantised else n * self.dtype.itemsize


@dataclass(frozen=True)
class Findings:
    """What is wrong with the values of one tensor of the output."""

    name: str
    nan: int = 0
    inf: int = 0
    overflow: int = 0  # finite before, Inf in the output's dtype

    @property
    def clean(self) -> bool:
        return not (self.nan or self.inf or self.overflow)

    def __str__(self) -> str:
        counts = [f"{n} {what}" for n, what in ((self.nan, "NaN"), (self.inf, "Inf"), (self.overflow, "overflow")) if n]
        return f"{self.name} ({', '.join(counts)})"


@dataclass(frozen=True)
class OutFile:
    fd: int
    layout: FileLayout
    tensors: Sequence[OutTensor]


def computed_together(
    tensors: Sequence[OutTensor], compute: Callable[[], Sequence[torch.Tensor]], gathered: int
) -> list[OutTensor]:
    """Tensors that come from one computation, which is done once: when the first of them is written.

    Args:
        compute: gives all of them, in order.
        gathered: bytes of memory that it takes.
    """
    left: dict[int, torch.Tensor] = {}  # what is computed and not written yet
    lock = threading.Lock()

    def part(i: int) -> list[torch.Tensor]:
        with lock:
            if i not in left:
                left.update(enumerate(compute()))
            return [left.pop(i).flatten()]

    largest = max(one.nbytes for one in tensors)
    return [
        replace(one, compute=partial(part, i), gathered=gathered, written_as=largest) for i, one in enumerate(tensors)
    ]


def stream(files: Sequence[OutFile], scan: Callable[[OutTensor], bool], refuse: bool, label: str) -> list[Findings]:
    """Write every tensor of every file, then the bytes around them.

    Args:
        files: open for writing, with their layouts.
        scan: whether a tensor that is copied as it is gets looked at for NaN and Inf; computed ones always are.
        refuse: raise where something is found; else only report it.
        label: for the progress.
    Returns:
        What was found, only tensors with something wrong.
    Raises:
        NumericsError: NaN, Inf or overflow, and `refuse`.
        CorruptFileError: the bytes of a source do not have the checksum that was saved with them.
    """
    jobs = [(file, i) for file in files for i in range(len(file.tensors))]
    # Largest first, or the last one keeps a thread waiting; what is computed together, one after the other.
    jobs.sort(key=lambda job: -(job[0].tensors[job[1]].written_as or job[0].tensors[job[1]].nbytes))
    crcs = {id(file): [0] * len(file.tensors) for file in files}
    work = _Work()

    def run(file: OutFile, i: int) -> Findings:
        tensor, offset = file.tensors[i], file.layout.offsets[i]
        with work.large.held(max(tensor.gathered, tensor.source.gathered if tensor.source else 0)):
            if tensor.compute is not None:
                crc, findings = _compute(tensor, tensor.compute, file.fd, offset, work)
            else:
                assert tensor.source is not None, f"{tensor.name} has neither a source nor a computation"
                crc, findings = _copy(tensor, tensor.source, file.fd, offset, scan(tensor), work)
        crcs[id(file)][i] = crc
        return findings

    total = sum(f.tensors[i].nbytes for f, i in jobs)
    with one_torch_thread_each(), Progress(label, total) as progress, ThreadPoolExecutor(WORKERS + 1) as pool:
        flushing = None
        # An interrupt may come at any moment, that of a submission as well. Leaving the pool waits for its threads, and
        # the one that flushes ends when it is told to.
        try:
            if total >= FLUSH_FROM:
                flushing = pool.submit(_flush_along, [f.fd for f in files], work)
            futures = [pool.submit(run, file, i) for file, i in jobs]
            pending = set(futures)
            while pending:
                done, pending = wait(pending, timeout=0.1, return_when=FIRST_EXCEPTION)
                progress.advance(work.done - progress.done)
                if any(f.exception() for f in done):
                    break
            findings = [f.result() for f in futures if not f.cancelled() and (f.done() or not pending)]
            progress.advance(work.done - progress.done)
        finally:
            work.end()
            pool.shutdown(cancel_futures=True)
        if flushing is not None:
            flushing.result()  # the kernel reports a failed write to one caller only: it must not get lost here
    found = sorted((f for f in findings if not f.clean), key=lambda f: f.name)
    if found and refuse:
        more = f" and {len(found) - 10} more" if len(found) > 10 else ""
        raise NumericsError(
            f"NaN, Inf or overflow in {counted(len(found), 'tensor')} of the output: "
            f"{', '.join(map(str, found[:10]))}{more}.\n"
            "Nothing was written. Repair the inputs, choose another dtype, or record them with allow_nonfinite=True."
        )
    for file in files:
        for offset, data in file.layout.rest(crcs[id(file)]):
            _write(file.fd, memoryview(data), offset)
    return found


class OneLarge:
    """Lets one thread at a time hold a large tensor in memory."""

    def __init__(self):
        self._lock = threading.Lock()

    @contextmanager
    def held(self, nbytes: int) -> Iterator[None]:
        """For the time of the block: so many bytes beyond a few blocks; small ones do not wait."""
        if nbytes <= 8 * BLOCK:
            yield
            return
        with self._lock:
            yield


class _Work:
    """What the threads share: how far they are, and whether they should stop."""

    def __init__(self):
        self.done = 0
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.large = OneLarge()
        # The file system lets one thread at a time write to a file; the others would spin, not sleep, for their turn.
        self.writing = threading.Lock()

    def write(self, fd: int, data: memoryview, offset: int) -> None:
        with self.writing:
            if self.stop.is_set():
                raise InterruptedError("stopped")
            _write(fd, data, offset)
        with self.lock:
            self.done += len(data)

    def end(self) -> None:
        """Have the threads stop; nothing is written any more on return. The pool does not know a thread, and will not
        wait for it, if an interrupt came while it was started."""
        self.stop.set()
        with self.writing:
            pass


def _copy(t: OutTensor, source: TensorInfo, fd: int, offset: int, look: bool, work: _Work) -> tuple[int, Findings]:
    if not source.plain:
        return _compute(t, source.blocks, fd, offset, work)
    nbytes = t.nbytes
    buffer = memoryview(bytearray(min(BLOCK, nbytes)))
    crc, dirty = 0, False
    for start in range(0, nbytes, BLOCK):
        block = buffer[: min(BLOCK, nbytes - start)]
        source.file.read_into(block, source.offset + start)
        crc = crc32(block, crc)
        if look and not dirty:
            dirty = not all_finite(block, t.dtype)
        if t.watch is not None:
            values = torch.frombuffer(block, dtype=t.dtype)
            t.watch(start // t.dtype.itemsize, values, values)
        work.write(fd, block, offset + start)
    source.check(crc)
    if t.checksum is not None:
        t.checksum(crc)
    return crc, _count(t.name, source.blocks(), t.dtype) if dirty else Findings(t.name)


def _flush_along(fds: Sequence[int], work: _Work) -> None:
    """Have the disk write what has been copied so far, again and again, so that little is left for the end."""
    sync = getattr(os, "fdatasync", os.fsync)  # macOS has only the second
    while not work.stop.wait(0.05):
        for fd in fds:
            sync(fd)


def _compute(
    t: OutTensor, compute: Callable[[], Iterable[torch.Tensor]], fd: int, offset: int, work: _Work
) -> tuple[int, Findings]:
    crc, start, findings = 0, 0, Findings(t.name)
    for values in compute():
        for piece in values.split(BLOCK // t.dtype.itemsize):
            rounded = round_to(piece, t.dtype).contiguous()
            block = rounded.view(torch.uint8).numpy().data
            if t.watch is not None:
                t.watch(start // t.dtype.itemsize, piece, rounded)
            if not all_finite(block, t.dtype):
                findings = _add(findings, _count(t.name, [piece], t.dtype))
            crc = crc32(block, crc)
            work.write(fd, block, offset + start)
            start += len(block)
    if start != t.nbytes:
        raise AssertionError(f"{t.name}: {start} bytes were computed, {t.nbytes} were planned")
    return crc, findings


def _count(name: str, pieces: Iterable[torch.Tensor], dtype: torch.dtype) -> Findings:
    findings = Findings(name)
    for piece in pieces:
        rounded = round_to(piece, dtype)
        if dtype.itemsize == 1:  # torch has no isinf for floats of eight bits
            piece, rounded = piece.float(), rounded.float()
        overflow = int((rounded.isinf() & piece.isfinite()).sum())
        here = Findings(name, int(rounded.isnan().sum()), int(piece.isinf().sum()), overflow)
        findings = _add(findings, here)
    return findings


def _add(a: Findings, b: Findings) -> Findings:
    return Findings(a.name, a.nan + b.nan, a.inf + b.inf, a.overflow + b.overflow)


def _write(fd: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done : done + WRITE_BLOCK], offset + done)


@contextmanager
def one_torch_thread_each() -> Iterator[None]:
    """For threads that call torch: those that torch itself starts from each of them would fight over the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
