"""What works on this machine, and what to do about the rest; one line for each. Nothing is compiled or written."""

import importlib.metadata
import os
import platform
import re
import shutil
import sys
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rwkv_lab import machine, threads
from rwkv_lab.progress import human_bytes
from rwkv_lab.resources import checkout_folder, folder_of_variable, reports_folder, user_cache_folder
from rwkv_lab.text import counted
from rwkv_lab.version import __version__

_LITTLE_MEMORY, _LITTLE_DISK = 2_000_000_000, 5_000_000_000  # bytes
_OLDEST_PYTHON = (3, 11)

# What is said of it, the job of `bench.scaling`, and what to do about a larger model.
_JOBS = (
    ("merge", "merge a LoRA", "Write to a larger disk: out=, report=."),
    ("run float32", "load in float32", "dtype='bfloat16' takes half of it."),
    ("run bfloat16", "load in bfloat16", "Weights in int8 that were saved are mapped, and take half of it."),
    ("run int8", "pack to int8", "Pack it on a larger machine and save it: opening takes a third of it."),
    (
        "train all",
        "train all weights, a step",
        "kind='lora' or 'state' takes a third of it.",
    ),
    ("train LoRA", "train a LoRA, a step", "dtype='bfloat16', or quant='nf4', take less."),
    ("train state", "train a state, a step", "dtype='bfloat16', or quant='nf4', take less."),
    ("export", "export to ONNX, float32", "Export a smaller model, or convert to GGUF, which takes blocks."),
)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    state: "ok"; "note" where something slower or smaller is used instead; "FAIL" where something does not work.
    advice: what to do; "" where there is nothing to do.
    """

    state: str
    what: str
    found: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.state:<5} {self.what:<13} {self.found}{f'. {self.advice}' if self.advice else ''}"


def examine() -> list[Finding]:
    """Look at Python, packages, torch, threads, compiler, backends, GPU, notebooks, memory, disk, and sizes."""
    parts = (_python, _packages, _torch, _threads, _kernels, _gpu, _notebooks, _load, _space, _sizes)
    return [finding for part in parts for finding in part()]


def _python() -> Iterator[Finding]:
    where = f"{platform.python_version()} at {sys.executable}, {platform.platform(terse=True)}"
    old = sys.version_info < _OLDEST_PYTHON
    yield Finding("FAIL" if old else "ok", "python", where, "Install Python 3.11 or newer." if old else "")
    yield Finding("ok", "rwkv_lab", f"{__version__} at {Path(__file__).parent}")


def _packages() -> Iterator[Finding]:
    """The extras, and what of each is not installed or too old."""
    for extra, lines in requirements().items():
        wrong = [line for line in lines if not _is_installed(line)]
        name = f"[{extra}]" if extra else "packages"
        if not wrong:
            yield Finding("ok", name, f"all {len(lines)} are there" if len(lines) > 1 else "is there")
            continue
        wanted = f"rwkv_lab[{extra}]" if extra else "rwkv_lab"
        state = "note" if extra else "FAIL"
        yield Finding(state, name, f"not there, or too old: {', '.join(wrong)}", f"pip install '{wanted}'")


def requirements() -> dict[str, list[str]]:
    """Packages with their lowest versions by extra, "" for those that are always needed; as pyproject.toml has them.

    Without references of one extra to another.
    """
    root = checkout_folder()
    if root is not None:
        project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
        found = {"": project["dependencies"], **project["optional-dependencies"]}
    else:
        found = {"": []}
        for line in importlib.metadata.requires("rwkv_lab") or []:
            package, _, condition = line.partition(";")
            extra = re.search(r"""extra\s*==\s*['"]([^'"]+)""", condition)
            found.setdefault(extra[1] if extra else "", []).append(package.strip())
    kept = {extra: [line for line in lines if not line.startswith("rwkv_lab")] for extra, lines in found.items()}
    return {extra: lines for extra, lines in kept.items() if lines}


def _is_installed(line: str) -> bool:
    """Whether a package is there in the version that `name>=1.2` asks for, or a later one."""
    name, _, wanted = line.partition(">=")
    try:
        there = importlib.metadata.version(re.split(r"[\[<>=!~ ]", name)[0])
    except importlib.metadata.PackageNotFoundError:
        return False
    return _numbers(there) >= _numbers(wanted)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version.partition("+")[0])[:3])


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as e:  # OSError: one of its libraries cannot be loaded
        yield Finding("FAIL", "torch", f"cannot be imported: {str(e).splitlines()[0]}", "pip install torch")
        return
    yield Finding("ok", "torch", f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")


def _threads() -> Iterator[Finding]:
    import torch

    there, used = machine.cores(), torch.get_num_threads()
    advice = f"Unset OMP_NUM_THREADS, or set it to {there}." if used != there else ""
    processor = machine.cpu_name() or "processor"
    yield Finding("note" if advice else "ok", "threads", f"{used} on {counted(there, 'core')} of {processor}", advice)
    policy = threads.policy_in_force()
    passive = "PASSIVE" in policy.upper() or "GOMP_SPINCOUNT=0" in policy or "KMP_BLOCKTIME=0" in policy
    advice = "" if passive else "Beside other busy processes OMP_WAIT_POLICY=PASSIVE is several times faster."
    yield Finding("ok" if passive else "note", "waiting", policy or "as OpenMP does by default", advice)


def _kernels() -> Iterator[Finding]:
    from rwkv_lab.errors import KernelError
    from rwkv_lab.wkv import backends
    from rwkv_lab.wkv.loader import cache_folder, cpu_build, sources

    try:
        builds = [cpu_build(name) for name in sources("cpu")]
    except KernelError as e:
        wrong, _, remedy = str(e).splitlines()[0].rstrip(".").partition("; ")
        yield Finding("note", "compiler", wrong, f"{remedy[0].upper()}{remedy[1:]}." if remedy else "")
    else:
        built = sum(build.library.exists() for build in builds)
        compiler = next((build.compiler for build in builds), "")
        yield Finding("ok", "compiler", compiler.splitlines()[0] if compiler else "libraries that were built before")
        advice = "" if built == len(builds) else "The rest is compiled on first use, or now: python -m rwkv_lab.wkv"
        yield Finding("ok", "kernels", f"{built} of {len(builds)} are in {cache_folder()}", advice)
    slow = "cpu" not in backends()
    advice = "Without compiled kernels all is several times slower." if slow else ""
    yield Finding("note" if slow else "ok", "backends", ", ".join(backends()), advice)


def _gpu() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
        files = "There is one: install torch for CUDA, and NVIDIA's driver." if _has_nvidia() and not hidden else ""
        yield Finding("note", "gpu", "none that torch can use: everything runs on the processor", files)
        return
    for i in range(torch.cuda.device_count()):
        free, whole = torch.cuda.mem_get_info(i)
        name = torch.cuda.get_device_name(i)
        yield Finding("ok", "gpu", f"{name}, {human_bytes(free)} of {human_bytes(whole)} free")
    nvcc = shutil.which("nvcc") or next((p for p in _nvcc_places() if Path(p).is_file()), None)
    advice = "" if nvcc else f"Install the CUDA toolkit {torch.version.cuda}, or set CUDA_HOME; else torch computes."
    yield Finding("ok" if nvcc else "note", "nvcc", nvcc or "not found: no kernels for the GPU", advice)


def _has_nvidia() -> bool:
    return machine.proc("driver", "nvidia", "version").exists() or shutil.which("nvidia-smi") is not None


def _nvcc_places() -> Iterator[str]:
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    yield from (f"{home}/bin/nvcc" for home in homes if home)


def _notebooks() -> Iterator[Finding]:
    """Whether notebooks would run in this Python."""
    try:
        from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel
    except ImportError:
        yield Finding("FAIL", "notebooks", "Jupyter is not installed", "pip install 'rwkv_lab[workbench]'")
        return
    try:
        argv = KernelSpecManager().get_kernel_spec("python3").argv
    except NoSuchKernel:
        yield Finding("FAIL", "notebooks", "there is no kernel python3", "pip install ipykernel")
        return
    any_python = argv[0] in (
        "python",
        "python3",
        f"python3.{sys.version_info.minor}",
    )  # Jupyter takes its own for these
    program = sys.executable if any_python else argv[0]
    own = Path(program).absolute() == Path(sys.executable).absolute()
    advice = "" if own else f"It is not this Python: {sys.executable} -m ipykernel install --sys-prefix --name python3"
    yield Finding("ok" if own else "FAIL", "notebooks", f"their kernel is {program}", advice)


def _load() -> Iterator[Finding]:
    if not hasattr(os, "getloadavg"):
        return
    load, cores = os.getloadavg()[0], machine.cores()
    advice = "Others are at work here: all takes longer, and measured speeds cannot be trusted." if load > cores else ""
    yield Finding(
        "note" if advice else "ok", "load", f"{load:.1f} processes at work on {counted(cores, 'core')}", advice
    )


def _space() -> Iterator[Finding]:
    free = machine.memory_free()
    advice = "A model in float32 needs 4 bytes for each weight: end other programs." if free < _LITTLE_MEMORY else ""
    yield Finding("note" if advice else "ok", "memory", f"{human_bytes(free)} free", advice)
    yield _place("reports", reports_folder(), "FAIL", "Work in a folder of your own.", "work on another disk")
    # Without it kernels are compiled into a temporary folder.
    cache, other = folder_of_variable("RWKV_LAB_CACHE") or user_cache_folder(), "set RWKV_LAB_CACHE to another folder"
    yield _place("cache", cache, "note", f"Every process compiles its own kernels: {other}.", other)


def _sizes() -> Iterator[Finding]:
    """How large a model each job can take here, by the formulas of `bench.scaling`."""
    try:
        from rwkv_lab.bench.scaling import reach
    except (ImportError, OSError):  # torch cannot be imported, which has a line of its own
        return
    there = next(parent for parent in _upward(reports_folder().absolute()) if parent.is_dir())
    memory, disk = machine.memory_free(), machine.disk_free(there)
    for what, job, advice in _JOBS:
        found = reach(job, memory, disk)
        takes = f"{human_bytes(found.memory)} of memory"
        takes += f", {human_bytes(found.disk)} of disk" if found.disk else ""
        upto = f"up to {found.largest}, {takes}" if found.largest else "no model of a released shape"
        words = f"{upto}; {found.beyond}" if found.beyond else upto
        yield Finding("ok" if found.largest else "note", what, words, advice if found.beyond else "")


def _place(what: str, folder: Path, state: str, remedy: str, elsewhere: str) -> Finding:
    """A folder that is written to, or the one that it would be made in.

    Args:
        state, remedy: what it means that it cannot be written to, and what to do then.
        elsewhere: what to do where the disk is nearly full, beside making space.
    """
    there = next(parent for parent in _upward(folder.absolute()) if parent.exists())
    # Root may write anywhere; /proc and the like have no space at all.
    if not os.access(there, os.W_OK) or not there.is_dir() or shutil.disk_usage(there).total == 0:
        return Finding(state, what, f"{folder} cannot be written to", remedy)
    free = machine.disk_free(there)
    advice = f"Make space, or {elsewhere}." if free < _LITTLE_DISK else ""
    return Finding("note" if advice else "ok", what, f"{folder}, {human_bytes(free)} free on that disk", advice)


def _upward(folder: Path) -> Iterable[Path]:
    return (folder, *folder.parents)
