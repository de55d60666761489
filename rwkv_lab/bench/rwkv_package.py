"""The PyPI package `rwkv` as a process that answers requests: it reads its settings from the environment at import.

One JSON object per line comes in, one goes out; `rwkv_lab.bench.peers` writes them and describes their content.
"""

import json
import os
import sys
import time

import numpy as np

from rwkv_lab.bench.machine import forget_peak
from rwkv_lab.machine import memory_of


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the package prints to stdout
    from rwkv.model import RWKV

    model = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if model is None:
                forget_peak()
                before, start = memory_of("VmRSS"), time.perf_counter()
                model = RWKV(model=request["model"], strategy=f"cpu {request['dtype']}")
                reply = {"seconds": time.perf_counter() - start}
                peak = memory_of("VmHWM")
                if before is not None and peak is not None:
                    reply["peak"] = peak - before
            else:
                reply = _answer(model, request)
        except Exception as e:  # whatever the package raises is an answer too
            reply = {"error": f"{type(e).__name__}: {e}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _answer(model, request: dict) -> dict:
    tokens, read = request["tokens"], request["read"]
    if request["task"] == "prefill":
        start = time.perf_counter()
        model.forward(tokens, None)
        return {"seconds": time.perf_counter() - start}
    logits, state = model.forward(tokens[:read], None)
    found = [logits.float().numpy().copy()]
    start = time.perf_counter()
    for token in tokens[read:]:
        logits, state = model.forward([token], state)
        if request["task"] == "answers":
            found.append(logits.float().numpy().copy())
    seconds = time.perf_counter() - start
    if request["task"] == "answers":
        np.save(request["out"], np.stack(found))
    return {"seconds": seconds}


if __name__ == "__main__":
    main()
