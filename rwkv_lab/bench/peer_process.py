"""A package as a process that answers requests: one JSON object per line comes in, one goes out.

`rwkv_lab.bench.peers` writes the requests and describes their content.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from rwkv_lab.bench.machine import forget_peak
from rwkv_lab.lazy_numpy import np
from rwkv_lab.machine import memory_of


class Reader(Protocol):
    """A model, and the state after what it has read."""

    def forget(self) -> None:
        """Begin a new text."""
        ...

    def read(self, tokens: Sequence[int]) -> None:
        """Returns when logits after the last token are there."""
        ...

    def logits(self) -> np.ndarray:
        """After the last token `[V]`, float32."""
        ...


def answer_requests(prepare: Callable[[], Callable[[dict[str, Any]], Reader]]) -> None:
    """Answer the lines on stdin until it ends.

    Args:
        prepare: imports the package, and gives what opens the model of the first request.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # packages print to stdout, when they are imported, too
    open_model, model = prepare(), None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if model is None:
                model, reply = _opened(open_model, request)
            else:
                reply = _answer(model, request)
        except Exception as e:  # whatever the package raises is an answer too
            reply = {"error": f"{type(e).__name__}: {e}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _opened(open_model: Callable[[dict[str, Any]], Reader], request: dict[str, Any]) -> tuple[Reader, dict[str, Any]]:
    forget_peak()
    before, start = memory_of("VmRSS"), time.perf_counter()
    model = open_model(request)
    reply: dict[str, Any] = {"seconds": time.perf_counter() - start}
    peak = memory_of("VmHWM")
    return model, reply if before is None or peak is None else reply | {"peak": peak - before}


def _answer(model: Reader, request: dict[str, Any]) -> dict[str, Any]:
    tokens, read = request["tokens"], request["read"]
    model.forget()
    if request["task"] == "prefill":
        start = time.perf_counter()
        model.read(tokens)
        return {"seconds": time.perf_counter() - start}
    is_compared, found = request["task"] == "answers", []
    model.read(tokens[:read])
    if is_compared:
        found.append(model.logits())
    start = time.perf_counter()
    for token in tokens[read:]:
        model.read([token])
        if is_compared:
            found.append(model.logits())
    seconds = time.perf_counter() - start
    if is_compared:
        np.save(request["out"], np.stack(found))
    return {"seconds": seconds}
