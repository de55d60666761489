"""The loader under everything that can go wrong: each time a working library, or one sentence that says why not.

Each trial is a process of its own with a cache of its own; a small source stands in for the kernels where it can.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rwkv_lab.resources import kernels_folder
from rwkv_lab.wkv import backends, loader

pytestmark = pytest.mark.skipif("cpu" not in backends(), reason="no C++ compiler")

SMALL = 'extern "C" int answer() { return 42; }\n'
LOAD = "from rwkv_lab.wkv.loader import cpu_library; print(cpu_library('small').answer())"
RUN = "import torch; from rwkv_lab.wkv import wkv7; x = torch.ones(1, 2, 1, 32); print(wkv7(x, -x, x, x, x, x{}))"


@pytest.fixture
def package(tmp_path):
    return small_package(tmp_path, SMALL)


def small_package(folder, content):
    """The loader as an installed package without the rest, whose kernels are one small source.

    In place of torch, whose import takes a second, there is what the loader asks of it.
    """
    root, source = folder / "package", kernels_folder().parent / "rwkv_lab"
    (root / "rwkv_lab" / "kernels" / "cpu").mkdir(parents=True)
    (root / "rwkv_lab" / "wkv").mkdir()
    for name in ("errors.py", "machine.py", "resources.py", "wkv/loader.py"):
        shutil.copy(source / name, root / "rwkv_lab" / name)
    for folder in ("rwkv_lab", "rwkv_lab/wkv"):  # else Python looks for another package of that name first
        (root / folder / "__init__.py").touch()
    (root / "torch.py").write_text("__version__ = '2.99'\n")
    (root / "rwkv_lab" / "kernels" / "cpu" / "small.cpp").write_text(content)
    (root / "rwkv_lab" / "kernels" / "cpu" / "some.h").write_text("#pragma once\n")
    return root


def start(code, package=None, cache=None, **environment):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(package or kernels_folder().parent)}
    env.pop("RWKV_LAB_PORTABLE", None)  # as the tests expect it, whatever the suite runs with
    env |= {"RWKV_LAB_CACHE": str(cache)} if cache else {}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-P", "-c", code], env={**env, **environment}, **pipes)


def finish(process) -> tuple[str, str]:
    try:
        out, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()  # one that hangs must not outlive its test
        process.communicate()
        raise
    return out.strip(), err.strip()


def fake_compiler(folder: Path, body: str) -> str:
    """A g++ that does what `body` says before or instead of what the real one does; its path, for CXX."""
    path = folder / "my-g++"
    real = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec {real} --version\n{body}\nexec {real} "$@"\n')
    path.chmod(0o755)
    return str(path)


def libraries(cache: Path) -> list[Path]:
    return sorted(cache.glob("kernels/*.so"))


def test_several_processes_at_once_compile_once_and_all_run(package, tmp_path):
    log = tmp_path / "compilations"
    compiler = fake_compiler(tmp_path, f"echo x >> {log}; sleep 0.3")
    started = [start(LOAD, package, tmp_path / "cache", CXX=compiler) for _ in range(4)]
    assert [finish(process)[0] for process in started] == ["42"] * 4
    assert log.read_text().split() == ["x"] and len(libraries(tmp_path / "cache")) == 1


@pytest.mark.parametrize("whom", ["the process", "all of them"])
def test_a_build_that_was_killed_blocks_no_other(package, tmp_path, whom):
    mark = tmp_path / "compiling"
    slow = fake_compiler(tmp_path, f"touch {mark}; sleep 3")
    process = start(LOAD, package, tmp_path / "cache", CXX=slow, PYTHONFAULTHANDLER="")
    while not mark.exists():
        assert process.poll() is None, finish(process)
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if whom == "the process":
        assert list((tmp_path / "cache" / "kernels").glob(".cpu-small-*"))  # what it left behind
    Path(slow).unlink()
    before = time.perf_counter()
    assert finish(start(LOAD, package, tmp_path / "cache", CXX=fake_compiler(tmp_path, "")))[0] == "42"
    assert time.perf_counter() - before < 60  # waited for no lock
    assert not list((tmp_path / "cache" / "kernels").glob(".cpu-small-*"))


def test_a_damaged_library_is_made_again(package, tmp_path):
    cache = tmp_path / "cache"
    finish(start(LOAD, package, cache))
    (library,) = libraries(cache)
    whole = library.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:1000] + b"?" + whole[1001:], b""):
        library.unlink()
        library.write_bytes(damaged)
        out, err = finish(start(LOAD, package, cache))
        assert out == "42" and "is damaged and will be compiled again" in err
        assert finish(start(LOAD, package, cache)) == ("42", "")


def test_whatever_it_depends_on_changes_the_key(package, tmp_path):
    cache = tmp_path / "cache"
    source, header = (package / "rwkv_lab" / "kernels" / "cpu" / name for name in ("small.cpp", "some.h"))
    finish(start(LOAD, package, cache))
    source.write_text(SMALL.replace("42", "43"))
    assert finish(start(LOAD, package, cache))[0] == "43"
    header.write_text("#pragma once\n// changed\n")
    finish(start(LOAD, package, cache))
    finish(start(LOAD, package, cache, RWKV_LAB_PORTABLE="1"))
    finish(start(LOAD, package, cache, CXX=fake_compiler(tmp_path, "")))
    assert len(libraries(cache)) == 5


@pytest.mark.parametrize("read_only", ["a folder that may not be written", "a file where a folder should be"])
def test_a_cache_that_cannot_be_written(package, tmp_path, read_only):
    cache = tmp_path / "cache"
    if read_only.startswith("a file"):
        cache.write_text("")
    elif os.geteuid() == 0:  # root may write anywhere but in the kernel's own folders
        cache = Path("/proc/rwkv_lab")
    else:
        cache.mkdir(mode=0o500)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    out, err = finish(start(LOAD, package, cache, TMPDIR=str(temporary)))
    assert out == "42"
    assert "small.cpp is compiled into a temporary folder, for this process alone" in err
    assert list(temporary.iterdir()) == []  # and is gone with it


def test_a_library_in_a_cache_that_may_only_be_read_is_used(package, tmp_path):
    finish(start(LOAD, package, tmp_path / "cache"))
    (tmp_path / "cache" / "kernels").chmod(0o500)
    assert finish(start(LOAD, package, tmp_path / "cache")) == ("42", "")


FAILURES = {
    "no compiler": ({"PATH": "/nowhere", "CXX": ""}, "No C++ compiler (g++, c++ or clang++) is on the PATH"),
    "a compiler that fails": ({"CXX": "fails"}, "cannot compile kernels/cpu/wkv7.cpp: error: out of luck"),
}


@pytest.mark.parametrize("what", FAILURES)
def test_without_a_kernel_torch_computes_and_says_once_why(tmp_path, what):
    environment, why = FAILURES[what]
    if environment.get("CXX"):
        environment = {"CXX": fake_compiler(tmp_path, "echo error: out of luck >&2; exit 1")}
    code = RUN.format("") + "; wkv7(x, -x, x, x, x, x); from rwkv_lab.wkv import backends; print(backends())"
    out, err = finish(start(code, cache=tmp_path / "cache", **environment))
    assert "tensor(" in out and out.endswith("('reference', 'chunked')")
    assert err.count(why) == 1 and "run in plain torch, which is slower" in err
    out, err = finish(start(RUN.format(', backend="cpu"'), cache=tmp_path / "cache", **environment))
    assert out == "" and "KernelError: " in err and why in err


BAD_COMPILERS = {
    "nowhere-g++ -O2": "CXX names nowhere-g++, which is no program that can be found",
    "g++ 'unclosed": "with a quote that is not closed",
    "false": "false --version does not work: it ended with code 1 and no message.",
    "sh -c 'echo none >&2; exit 3'": "does not work: none.",
    "sh -c true": "--version does not work: it prints no version.",
    "true": "true cannot compile kernels/cpu/small.cpp: it wrote no library.",
}


@pytest.mark.parametrize("chosen", BAD_COMPILERS)
def test_a_cxx_that_does_not_work_is_told_in_one_sentence_and_not_replaced(package, tmp_path, chosen):
    out, err = finish(start(LOAD, package, tmp_path / "cache", CXX=chosen))
    said = err.splitlines()[-1]
    assert out == "" and said.startswith("rwkv_lab.errors.KernelError: ") and BAD_COMPILERS[chosen] in said
    assert not any(name in said for name in ("Command", "CalledProcess", "Errno", "exit status"))


def test_a_cxx_that_is_not_there_leaves_the_next_best_backend(tmp_path):
    out, err = finish(start(RUN.format(""), cache=tmp_path / "cache", CXX="nowhere-g++"))
    assert "tensor(" in out and err.count("run in plain torch, which is slower: CXX names nowhere-g++") == 1


def test_arguments_in_cxx_have_the_last_word(package, tmp_path):
    log = tmp_path / "arguments"
    compiler = fake_compiler(tmp_path, f'echo "$@" >> {log}')
    for options in ("", " -O1 -DANSWER='\"a b\"'"):
        assert finish(start(LOAD, package, tmp_path / "cache", CXX=compiler + options))[0] == "42"
    plain, chosen = (line for line in log.read_text().splitlines() if "--version" not in line)
    assert "-O1" not in plain and chosen.rindex("-O1") > chosen.rindex("-O3") and '-DANSWER="a b"' in chosen
    assert len(libraries(tmp_path / "cache")) == 2


def test_missing_sources_and_headers_and_what_is_remembered(package, tmp_path):
    folder = package / "rwkv_lab" / "kernels" / "cpu"
    (folder / "small.cpp").write_text('#include "gone.h"\n' + SMALL)
    attempts = tmp_path / "attempts"
    twice = (
        "from rwkv_lab.errors import KernelError\n"
        "from rwkv_lab.wkv.loader import cpu_library\n"
        "for name in ('small', 'small', 'nowhere'):\n"
        "    try: cpu_library(name)\n"
        "    except KernelError as error: print(error)\n"
    )
    out, _ = finish(start(twice, package, tmp_path / "cache", CXX=fake_compiler(tmp_path, f"echo x >> {attempts}")))
    first, second, third = out.splitlines()
    assert first == second and "gone.h" in first and attempts.read_text().split() == ["x"]
    assert "nowhere.cpp cannot be read: No such file or directory" in third


def test_cuda_needs_an_nvcc_of_torchs_generation(tmp_path, monkeypatch):
    from rwkv_lab.errors import KernelError
    from rwkv_lab.wkv.loader import cuda_build

    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text('#!/bin/sh\necho "Cuda compilation tools, release 11.8, V11.8.89"\n')
    nvcc.chmod(0o755)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(KernelError, match="is of CUDA 11.8, but this torch was built with CUDA 13.0"):
        cuda_build("wkv7", ("80",))
    monkeypatch.setattr(torch.version, "cuda", "11.8")
    with pytest.raises(KernelError, match=r"nowhere.cu cannot be read"):
        cuda_build("nowhere", ("80",))
    if not torch.cuda.is_available():
        with pytest.raises(KernelError, match="no CUDA device"):
            cuda_build("wkv7")
    nvcc.unlink()
    monkeypatch.setenv("PATH", "/nowhere")
    if not Path("/usr/local/cuda/bin/nvcc").exists():
        with pytest.raises(KernelError, match="nvcc is neither in CUDA_HOME nor on the PATH"):
            cuda_build("wkv7", ("80",))


def test_the_portable_build_agrees(tmp_path):
    code = (
        "import torch; from rwkv_lab.wkv import wkv4, wkv6, wkv7; g = torch.Generator().manual_seed(0)\n"
        "x = [torch.randn(1, 20, 2, 64, generator=g, dtype=torch.double) * 0.1 for _ in range(6)]\n"
        "x[1] = -x[1].abs(); u = x[0][0, 0]; flat = [t.flatten(2) for t in x]; log = flat[1][0, 0]\n"
        "def run(dtype, backend):\n"
        "    y = [t.to(dtype).requires_grad_() for t in x]; f = [t.flatten(2) for t in y]\n"
        "    out = wkv7(*y, backend=backend) + wkv6(*y[:4], u.to(dtype), backend=backend)\n"
        "    out += wkv4(log.to(dtype), log.to(dtype), *f[2:4], backend=backend)\n"
        "    return [*out, *torch.autograd.grad(sum(t.sin().sum() for t in out), y[:4])]\n"
        "pairs = zip(run(torch.float32, 'cpu'), run(torch.double, 'reference'))\n"
        "print(max(float((a - b).norm() / b.norm()) for a, b in pairs) < 1e-5)\n"
    )
    out, err = finish(start(code, cache=tmp_path / "cache", RWKV_LAB_PORTABLE="1"))
    assert out == "True", err
    assert len(libraries(tmp_path / "cache")) == 3


def test_the_team_of_threads_survives_a_fork_and_several_callers(tmp_path):
    code = (
        "import os, threading; from rwkv_lab.wkv.loader import cpu_library\n"
        "def run(times, bad):\n"
        "    for i in range(times):\n"
        "        n = 1 + i % 97\n"
        "        if lib.count(n, 1 + i % 4) != n * (n - 1) // 2: bad.append(n)\n"
        "lib, bad = cpu_library('small'), []\n"
        "run(3000, bad)\n"
        "if not (child := os.fork()): run(300, bad); os._exit(len(bad))\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "threads = [threading.Thread(target=run, args=(2000, bad)) for _ in range(4)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "print(bad)\n"
    )
    counting = (
        '#include "parallel.h"\n'
        'extern "C" int count(int n, int threads) {\n'
        "    std::atomic<int> sum{0};\n"
        "    rwkv_lab::parallel_for(n, threads, [&](int i) { sum += i; });\n"
        "    return sum;\n"
        "}\n"
    )
    package = small_package(tmp_path, counting)
    shutil.copy(kernels_folder() / "cpu" / "parallel.h", package / "rwkv_lab" / "kernels" / "cpu")
    assert finish(start(code, package, tmp_path / "cache"))[0] == "[]"


def test_a_worker_that_is_late_takes_no_task_of_the_next_job(tmp_path):
    """Jobs that grow, one right behind the other, with more threads than cores: half of such runs hung before."""
    many = (
        '#include "parallel.h"\n'
        'extern "C" int wrong_sums(int jobs) {\n'
        "    int wrong = 0;\n"
        "    for (int i = 0; i < jobs; i++) {\n"
        "        const int n = 1 + i % 97;\n"
        "        std::atomic<int> sum{0};\n"
        "        rwkv_lab::parallel_for(n, 2 + i % 7, [&](int k) { sum += k; });\n"
        "        wrong += sum != n * (n - 1) / 2;\n"
        "    }\n"
        "    return wrong;\n"
        "}\n"
    )
    package = small_package(tmp_path, many)
    shutil.copy(kernels_folder() / "cpu" / "parallel.h", package / "rwkv_lab" / "kernels" / "cpu")
    code = "from rwkv_lab.wkv.loader import cpu_library; print(cpu_library('small').wrong_sums(2_000_000))"
    assert finish(start(code, package, tmp_path / "cache"))[0] == "0"


def test_without_a_compiler_what_was_built_for_the_same_is_used(package, tmp_path):
    """An image that was built in one stage and runs in another, where there is no compiler."""
    cache, without = tmp_path / "cache", {"PATH": "/nowhere", "CXX": ""}
    compiler = fake_compiler(tmp_path, "")
    assert finish(start(LOAD, package, cache, CXX=compiler))[0] == "42"
    for environment in (without, without | {"CXX": compiler + "-that-stayed-behind"}):
        assert finish(start(LOAD, package, cache, **environment)) == ("42", "")
    # Flags that nothing was built with.
    out, err = finish(start(LOAD, package, cache, **without, RWKV_LAB_PORTABLE="1"))
    assert out == "" and "No C++ compiler" in err and "hold a library for these sources, flags, this processor" in err
    assert "CXX names g++" in finish(start(LOAD, package, cache, **without | {"CXX": "g++ -O1"}))[1]
    (library,) = libraries(cache)
    library.write_bytes(library.read_bytes()[:-1])
    assert "Nor does" in finish(start(LOAD, package, cache, **without))[1]
    finish(start(LOAD, package, cache, CXX=compiler))
    (package / "rwkv_lab" / "kernels" / "cpu" / "small.cpp").write_text(SMALL.replace("42", "43"))
    assert "No C++ compiler" in finish(start(LOAD, package, cache, **without))[1]


def test_variables_with_the_home_folder_in_them(package, tmp_path):
    code = (
        "from rwkv_lab.wkv.loader import cache_folder; from rwkv_lab.resources import folder_of_variable\n"
        "print(cache_folder(), folder_of_variable('CUDA_HOME'))"
    )
    home = {"HOME": str(tmp_path), "CUDA_HOME": "~/cuda"}
    assert finish(start(code, package, **home, RWKV_LAB_CACHE="~/x"))[0] == f"{tmp_path}/x/kernels {tmp_path}/cuda"
    found = finish(start(code, package, **home, RWKV_LAB_CACHE="", XDG_CACHE_HOME="~/y"))[0]
    assert found == f"{tmp_path}/y/rwkv_lab/kernels {tmp_path}/cuda"


def test_all_sources_are_built_and_the_state_of_every_backend_is_printed(tmp_path):
    code = "from rwkv_lab.wkv.__main__ import main; main()"
    out, _ = finish(start(code, RWKV_LAB_CACHE=os.environ.get("RWKV_LAB_CACHE", "")))
    for source in (kernels_folder() / "cpu").glob("*.cpp"):
        assert f"from {source}" in out
    assert "reference  there" in out and "chunked    there" in out
    assert "cpu        wkv5 and wkv6: there" in out and "-march=native" in out
    out, _ = finish(start(code, cache=tmp_path, PATH="/nowhere", CXX=""))
    assert "cpu        wkv7: not there. No C++ compiler" in out


@pytest.mark.parametrize("vendor, without", [("GenuineIntel", True), ("AuthenticAMD", False)])
def test_pairs_of_bfloat16_are_left_out_where_float32_is_faster(vendor, without, monkeypatch):
    monkeypatch.setattr(loader, "cpu_identity", lambda: f"vendor_id: {vendor}\nflags: avx512f avx512_bf16")
    for name in ("CXX", "RWKV_LAB_PORTABLE"):
        monkeypatch.delenv(name, raising=False)
    command = loader.cpu_build("wkv4").command
    assert ("-mno-avx512bf16" in command) is without
    monkeypatch.setenv("CXX", f"{command[0]} -mavx512bf16")
    assert loader.cpu_build("wkv4").command[-1] == "-mavx512bf16"  # the last of both counts
