"""Compiles the sources in `kernels/` on first use and loads what comes out, as plain C functions through ctypes.

A library lies in a cache folder under a name made of everything that it depends on: first torch's version, flags, the
machine's CPU or the GPU architectures, and the sources; behind that the compiler. Where there is no compiler, as in an
image that was built in one stage and runs in another, a library whose name begins the same is used. Nothing there is
ever changed: a library appears whole, by a rename, or not at all, so that processes may race for it and may be killed
at any moment.
"""

import atexit
import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from rwkv_lab.errors import KernelError
from rwkv_lab.machine import cpu_identity
from rwkv_lab.resources import cache_of, folder_of_variable, kernels_folder

log = logging.getLogger(__name__)

_COMMON = ("-std=c++20", "-O3", "-ffp-contract=fast", "-fPIC", "-shared")
_NATIVE = ("-march=native",)
_PORTABLE = ("-march=x86-64-v2",)  # what every x86 of the last fifteen years can run
_PATIENCE = 600  # seconds until a compiler is stopped
_SEAL = b"rwkv_lab:"  # at the end of a library, before the SHA-256 of what comes before: a damaged one is not loaded

_guard = threading.RLock()
_results: dict[tuple, ctypes.CDLL | KernelError] = {}
_private: list[Path] = []  # this process's own folder, once the cache turned out to be read-only


@dataclass(frozen=True)
class Build:
    """One library: its source, the command that makes it (without `-o` and the source), and where it is kept.

    Without a compiler here there is no command, and the library is one that was built before.
    """

    source: Path
    command: tuple[str, ...]
    compiler: str  # with its version
    library: Path


def cpu_library(name: str) -> ctypes.CDLL:
    """The functions of `kernels/cpu/<name>.cpp`, compiled now if they are not in the cache.

    Built for the machine this runs on, or for any x86-64-v2 when `RWKV_LAB_PORTABLE=1`.

    Raises:
        KernelError: no compiler, a compile error, sources missing. It is remembered: the next call raises at once.
    """
    return _remembered(("cpu", name, _portable()), lambda: cpu_build(name))


def cuda_library(name: str, architectures: tuple[str, ...] | None = None) -> ctypes.CDLL:
    """The functions of `kernels/cuda/<name>.cu`, compiled now if they are not in the cache.

    Args:
        architectures: such as `("80", "90a")`; None for that of the current device.

    Raises:
        KernelError: no nvcc, one of another CUDA than torch's, no device to build for, a compile error, sources
            missing. It is remembered: the next call raises at once.
    """
    return _remembered(("cuda", name, architectures), lambda: cuda_build(name, architectures))


def failed(kind: str, name: str) -> bool:
    """Whether an attempt of this process to get `kernels/<kind>/<name>` went wrong."""
    return any(isinstance(found, KernelError) and key[:2] == (kind, name) for key, found in _results.items())


def sources(kind: str) -> list[str]:
    """The names that `cpu_library` takes, for "cpu": every source in `kernels/<kind>` that is a library."""
    return sorted(path.stem for path in (kernels_folder() / kind).glob({"cpu": "*.cpp", "cuda": "*.cu"}[kind]))


def cache_folder() -> Path:
    """Where libraries are kept: `$RWKV_LAB_CACHE`, else `rwkv_lab/` in the user's cache folder; then `kernels/`."""
    return cache_of("kernels")


def cpu_build(name: str) -> Build:
    """How `cpu_library(name)` is made; compiles nothing.

    Raises:
        KernelError: no compiler, nor a library that was built before for the same; sources missing.
    """
    portable = _portable()
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    flags = (_PORTABLE if x86 else ()) if portable else _native()
    program, *words = _words_of_cxx()
    # Options in CXX are repeated at the end, where they override ours; a wrapper's own words are not repeated.
    chosen = [word for word in words if word.startswith(("-O", "-f", "-m", "-std="))]
    machine = platform.machine() if portable and not chosen else cpu_identity()
    options = (*words, *_COMMON, *flags, "-pthread", *chosen)
    source, prefix = _named(f"cpu/{name}.cpp", options, machine)
    try:
        compiler, version = _cpp_compiler()
    except KernelError as error:
        before = _built_before(prefix)
        if before is None and program:
            raise
        if before is None:
            raise KernelError(
                f"{error}\nNor does {prefix.parent} hold a library for these sources, flags, this processor and torch."
            ) from None
        return Build(source, (), "a compiler that is not here", before)
    return Build(source, (compiler, *options), version, _library(prefix, version, compiler))


def cuda_build(name: str, architectures: tuple[str, ...] | None = None) -> Build:
    """How `cuda_library(name, architectures)` is made; compiles nothing.

    Raises:
        KernelError: no nvcc, one of another CUDA than torch's, no device to build for, sources missing.
    """
    nvcc, version = _nvcc()
    if architectures is None:
        if not torch.cuda.is_available():
            raise KernelError("torch finds no CUDA device, so there is no GPU architecture to compile for.")
        architectures = ("{}{}".format(*torch.cuda.get_device_capability()),)
    targets = [f"-gencode=arch=compute_{x},code=sm_{x}" for x in architectures]
    command = (nvcc, "-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", *targets)
    source, prefix = _named(f"cuda/{name}.cu", command[1:], platform.machine())
    return Build(source, command, version, _library(prefix, version, nvcc))


def _remembered(key: tuple, plan) -> ctypes.CDLL:
    found = _results.get(key)
    if found is None:
        with _guard:  # one compiler at a time is enough for one process
            found = _results.get(key)
            if found is None:
                try:
                    found = _load_or_compile(plan())
                except KernelError as error:
                    found = error
                _results[key] = found
    if isinstance(found, KernelError):
        raise KernelError(str(found))
    return found


def _native() -> tuple[str, ...]:
    """Options for the processor here: of Intel's without pairs of bfloat16, for which their cores take longer than for
    float32 (kernels/README.md); bfloat16 models are multiplied in float32 then, in both modes."""
    identity = cpu_identity()
    slow_pairs = "GenuineIntel" in identity and "avx512_bf16" in identity
    return (*_NATIVE, "-mno-avx512bf16") if slow_pairs else _NATIVE


def _portable() -> bool:
    return os.environ.get("RWKV_LAB_PORTABLE", "") not in ("", "0")


def _words_of_cxx() -> list[str]:
    """The program and the arguments in `$CXX`; the program is "" where it names none."""
    chosen = os.environ.get("CXX")
    try:
        program, *arguments = shlex.split(chosen or "") or [""]
    except ValueError:
        raise KernelError(f"CXX is {chosen!r}, with a quote that is not closed; correct or unset it.") from None
    return [os.path.expanduser(program), *arguments]


def _cpp_compiler() -> tuple[str, str]:
    """Path and version of the C++ compiler: the one in `$CXX`, without it the first there is."""
    return _cpp_compiler_of(tuple(_words_of_cxx()), os.environ.get("PATH"))


@functools.cache
def _cpp_compiler_of(words: tuple[str, ...], path: str | None) -> tuple[str, str]:
    for command in words[:1] if words[0] else ("g++", "c++", "clang++"):
        if found := shutil.which(command):
            return found, f"{found} {_version_line((found, *words[1:]))}"
    if words[0]:
        raise KernelError(f"CXX names {words[0]}, which is no program that can be found; correct or unset it.")
    raise KernelError("No C++ compiler (g++, c++ or clang++) is on the PATH; install g++, or name one in CXX.")


def _nvcc() -> tuple[str, str]:
    """Path and version of nvcc, which must be of the CUDA generation that torch was built with."""
    homes = [folder_of_variable(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [str(home / "bin") for home in homes if home] + [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(places))
    if nvcc is None:
        raise KernelError("nvcc is neither in CUDA_HOME nor on the PATH; install the CUDA toolkit, or set CUDA_HOME.")
    version = _version_line((nvcc,), r"release ([0-9.]+)")
    expected = torch.version.cuda
    if expected and version.split(".")[0] != expected.split(".")[0]:
        raise KernelError(
            f"{nvcc} is of CUDA {version}, but this torch was built with CUDA {expected}.\n"
            "Set CUDA_HOME to a toolkit of the same generation."
        )
    return nvcc, f"{nvcc} {version}"


def _version_line(command: tuple[str, ...], pattern: str = r"(.+)") -> str:
    command = (*command, "--version")
    failure = f"{shlex.join(command)} does not work"
    done = _run(command, failure)
    if done.returncode:
        raise KernelError(f"{failure}: {_first_error(done.stderr, done.returncode)}.")
    if (found := re.search(pattern, done.stdout)) is None:
        raise KernelError(f"{failure}: it prints no version.")
    return found[1]


def _run(command: Sequence[str], failure: str) -> subprocess.CompletedProcess:
    """A command's end, with whatever code; KernelError with `failure` if it did not get there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        why = f"it is not done after {_PATIENCE} s"
    except OSError as error:
        why = error.strerror
    raise KernelError(f"{failure}: {why}.")


def _named(source: str, options: Sequence[str], machine: str) -> tuple[Path, Path]:
    """The source, and the path with which names of libraries made from it begin: all that can be known without a
    compiler."""
    path = kernels_folder() / source
    headers = sorted(p for p in path.parent.glob("*.*") if p.suffix in (".h", ".cuh"))
    digest = hashlib.sha256()
    for part in (torch.__version__, *options, machine):
        digest.update(part.encode() + b"\0")
    try:
        for file in (path, *headers):
            digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    except OSError as error:
        raise KernelError(f"The kernel source {path} cannot be read: {error.strerror}.") from error
    return path, cache_folder() / f"{path.parent.name}-{path.stem}-{digest.hexdigest()[:24]}"


def _library(prefix: Path, version: str, compiler: str) -> Path:
    digest = hashlib.sha256(f"{compiler}\0{version}".encode()).hexdigest()
    return prefix.with_name(f"{prefix.name}-{digest[:8]}.so")


def _built_before(prefix: Path) -> Path | None:
    """The newest library of that name, whatever compiler made it; None where there is none that is whole."""
    try:
        found = sorted(prefix.parent.glob(f"{prefix.name}-*.so"), key=lambda path: path.stat().st_mtime)
    except OSError:
        return None
    return next((path for path in reversed(found) if _is_whole(path)), None)


def _load_or_compile(build: Build) -> ctypes.CDLL:
    library = build.library
    if found := _load(library):
        return found
    if not build.command:
        raise KernelError(f"{library} was built before, but does not load here, and there is no C++ compiler.")
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with _alone(library):
            if found := _load(library):  # another process has made it while this one waited
                return found
            return _compile(build, library)
    except OSError as error:
        if not _private:
            _private.append(Path(tempfile.mkdtemp(prefix="rwkv_lab-")))
            atexit.register(shutil.rmtree, _private[0], ignore_errors=True)
        log.warning(
            "Kernels cannot be kept in %s (%s); %s is compiled into a temporary folder, for this process alone.",
            *(library.parent, error.strerror, build.source.name),
        )
    try:
        return _compile(build, _private[0] / library.name)
    except OSError as error:
        raise KernelError(f"No folder for kernels can be written, not even {_private[0]}: {error}.") from error


@contextmanager
def _alone(library: Path) -> Iterator[None]:
    """Let one process at a time make a library. The lock goes when its process does, however that ends."""
    import fcntl

    with open(library.with_suffix(".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass  # some network file systems have no locks: then both compile, and the last rename stands
        yield


def _compile(build: Build, library: Path) -> ctypes.CDLL:
    for leftover in library.parent.glob(f".{library.stem}-*"):  # of builds that were killed
        shutil.rmtree(leftover, ignore_errors=True)
    # A folder of its own: should this process be killed, the compiler that outlives it cannot write into a later build.
    with tempfile.TemporaryDirectory(prefix=f".{library.stem}-", dir=library.parent) as folder:
        out = Path(folder) / "library.so"
        where = f"kernels/{build.source.parent.name}/{build.source.name}"
        log.warning("Compiling %s for this machine, once.", where)
        start = time.perf_counter()
        command = [*build.command, "-o", str(out), str(build.source)]
        failure = f"{build.command[0]} cannot compile {where}"
        done = _run(command, failure)
        if done.returncode or not out.exists():
            raise KernelError(f"{failure}: {_first_error(done.stderr + done.stdout, done.returncode)}.")
        content = out.read_bytes()
        with open(out, "ab") as file:
            file.write(_SEAL + hashlib.sha256(content).digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(out, library)
    log.info("%s is ready after %.1f s: %s", where, time.perf_counter() - start, library)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise KernelError(f"{library} was compiled, but does not load: {_one_line(error)}.") from error


def _load(library: Path) -> ctypes.CDLL | None:
    """The library, or None if it is not there or not what was once written."""
    # Looked at before it is mapped: a shortened library would end the process with SIGBUS.
    whole = _is_whole(library)
    if not whole:
        if whole is not None:
            log.warning("%s is damaged and will be compiled again.", library)
        return None
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        log.warning("%s does not load (%s) and will be compiled again.", library, _one_line(error))
        return None


def _is_whole(library: Path) -> bool | None:
    """Whether a library is what was once written; None where it cannot be read."""
    try:
        content = library.read_bytes()
    except OSError:
        return None
    end = len(content) - len(_SEAL) - 32
    return end >= 0 and content[end:] == _SEAL + hashlib.sha256(memoryview(content)[:end]).digest()


def _first_error(output: str, code: int) -> str:
    lines = output.strip().splitlines()
    errors = [line for line in lines if "error" in line.lower()] or lines[-1:]
    if errors:
        return errors[0].strip()[:300].rstrip(".")
    return f"it ended with code {code} and no message" if code else "it wrote no library"


def _one_line(error) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")
