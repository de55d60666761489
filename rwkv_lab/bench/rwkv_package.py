"""The PyPI package `rwkv` as a process that answers requests: it reads its settings from the environment at import."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rwkv_lab.bench.peer_process import answer_requests


class Model:
    """A model of the package, and the state after what it has read."""

    def __init__(self, model: Any):
        self.model = model
        self.forget()

    def forget(self) -> None:
        self.state = self.last = None

    def read(self, tokens: Sequence[int]) -> None:
        self.last, self.state = self.model.forward(list(tokens), self.state)

    def logits(self) -> np.ndarray:
        assert self.last is not None, "read first"
        return self.last.float().numpy().copy()


def prepare() -> Callable[[dict[str, Any]], Model]:
    """What opens the .pth file that a request names."""
    from rwkv.model import RWKV

    return lambda request: Model(RWKV(model=request["model"], strategy=f"cpu {request['dtype']}"))


if __name__ == "__main__":
    answer_requests(prepare)
