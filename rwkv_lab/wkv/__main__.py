"""`python -m rwkv_lab.wkv`: builds all kernels; which backends are there, how they were built, why others are not."""

import time

import torch

from rwkv_lab.errors import KernelError
from rwkv_lab.wkv import cuda
from rwkv_lab.wkv.cpu import SOURCES
from rwkv_lab.wkv.loader import cache_folder, cpu_build, cpu_library, cuda_build, sources


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"compiled kernels are kept in {cache_folder()}")
    print("reference  there: plain torch, token by token, any device and dtype")
    print("chunked    there: plain torch, all tokens at once, any device and dtype")
    for source in dict.fromkeys(SOURCES.values()):
        operators = " and ".join(name for name, of in SOURCES.items() if of == source)
        for backend in ("cpu", "cuda"):
            for line in state(backend, source):
                print(f"{backend:<10} {operators}: {line}")
    for source in (name for name in sources("cpu") if name not in SOURCES.values()):
        for line in state("cpu", source):
            print(f"cpu        {source}: {line}")


def state(backend: str, source: str) -> list[str]:
    """Whether the library of a source in `kernels/<backend>` is there, and how it was made; compiles it if need be."""
    try:
        build = cuda_build(source, cuda.architectures()) if backend == "cuda" else cpu_build(source)
        known, start = build.library.exists(), time.perf_counter()
        cuda.library(source) if backend == "cuda" else cpu_library(source)
    except KernelError as error:
        return [f"not there. {line}" if i == 0 else line for i, line in enumerate(str(error).splitlines())]
    seconds = time.perf_counter() - start
    return [
        f"there, {'found in the cache' if known else f'compiled now in {seconds:.1f} s'}: {build.library}",
        f"  from {build.source}",
        f"  by {build.compiler}{': ' * bool(build.command)}{' '.join(build.command[1:])}",
    ]


if __name__ == "__main__":
    main()
