"""llama.cpp through the PyPI package `llama-cpp-python`, as a process that answers requests.

One JSON object per line comes in, one goes out; `rwkv_lab.bench.peers` writes them and describes their content. The C
functions are called as the package has them, without what its class `Llama` adds for each token.
"""

import ctypes
import json
import os
import sys
import time
from collections.abc import Sequence

import numpy as np

GGUF_TYPES = {"bf16": "BF16", "fp32": "F32", "fp16": "F16", "int8": "Q8_0", "int4": "Q4_0"}  # by our names of dtypes
_AT_ONCE = 512  # tokens of one call


class Model:
    """A GGUF file, and the state after what it has read."""

    def __init__(self, path: str, threads: int):
        import llama_cpp

        self.library = llama_cpp
        self.llama = llama_cpp.Llama(
            path,
            n_ctx=4 * _AT_ONCE,
            n_batch=_AT_ONCE,
            n_ubatch=_AT_ONCE,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
        self.context, self.vocab_size = self.llama.ctx, self.llama.n_vocab()

    def forget(self) -> None:
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)

    def read(self, tokens: Sequence[int]) -> None:
        """Returns when logits after the last token are there."""
        for at in range(0, len(tokens), _AT_ONCE):
            some = tokens[at : at + _AT_ONCE]
            ids = (self.library.llama_token * len(some))(*some)
            if code := self.library.llama_decode(self.context, self.library.llama_batch_get_one(ids, len(some))):
                raise RuntimeError(f"llama_decode gave {code}")
        self.library.llama_synchronize(self.context)

    def logits(self) -> np.ndarray:
        """After the last token `[V]`, float32."""
        at = self.library.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(ctypes.cast(at, ctypes.POINTER(ctypes.c_float)), (self.vocab_size,)).copy()


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the library may print to stdout
    model = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if model is None:
                start = time.perf_counter()
                model = Model(request["model"], request["threads"])
                reply = {"seconds": time.perf_counter() - start}
            else:
                reply = _answer(model, request)
        except Exception as e:  # whatever the package raises is an answer too
            reply = {"error": f"{type(e).__name__}: {e}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _answer(model: Model, request: dict) -> dict:
    tokens, read, found = request["tokens"], request["read"], []
    model.forget()
    if request["task"] == "prefill":
        start = time.perf_counter()
        model.read(tokens)
        return {"seconds": time.perf_counter() - start}
    model.read(tokens[:read])
    if request["task"] == "answers":
        found.append(model.logits())
    start = time.perf_counter()
    for token in tokens[read:]:
        model.read([token])
        if request["task"] == "answers":
            found.append(model.logits())
    seconds = time.perf_counter() - start
    if request["task"] == "answers":
        np.save(request["out"], np.stack(found))
    return {"seconds": seconds}


if __name__ == "__main__":
    main()
