"""llama.cpp through the PyPI package `llama-cpp-python`, as a process that answers requests.

The C functions are called as the package has them, without what its class `Llama` adds for each token.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

from rwkv_lab.bench.peer_process import answer_requests
from rwkv_lab.lazy_numpy import np

GGUF_TYPES = {"bf16": "BF16", "fp32": "F32", "fp16": "F16", "int8": "Q8_0", "int4": "Q4_0"}  # by our names of dtypes
_AT_ONCE = 512  # tokens of one call


class Model:
    """A model of the package, and the state after what it has read."""

    def __init__(self, library: Any, llama: Any):
        self.library, self.llama = library, llama
        self.context, self.vocab_size = llama.ctx, llama.n_vocab()

    def forget(self) -> None:
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)

    def read(self, tokens: Sequence[int]) -> None:
        for at in range(0, len(tokens), _AT_ONCE):
            some = tokens[at : at + _AT_ONCE]
            ids = (self.library.llama_token * len(some))(*some)
            if code := self.library.llama_decode(self.context, self.library.llama_batch_get_one(ids, len(some))):
                raise RuntimeError(f"llama_decode gave {code}")
        self.library.llama_synchronize(self.context)

    def logits(self) -> np.ndarray:
        at = self.library.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(ctypes.cast(at, ctypes.POINTER(ctypes.c_float)), (self.vocab_size,)).copy()


def prepare() -> Callable[[dict[str, Any]], Model]:
    """What opens the GGUF file that a request names."""
    import llama_cpp

    def opened(request: dict[str, Any]) -> Model:
        threads = {"n_threads": request["threads"], "n_threads_batch": request["threads"]}
        sizes = {"n_ctx": 4 * _AT_ONCE, "n_batch": _AT_ONCE, "n_ubatch": _AT_ONCE}
        return Model(llama_cpp, llama_cpp.Llama(request["model"], **sizes, **threads, verbose=False))

    return opened


if __name__ == "__main__":
    answer_requests(prepare)
