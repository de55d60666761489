"""What the functions of this package use of a model: `RWKV_Dual`, as its own modules can name it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch

from rwkv_lab.checkpoint import Layout
from rwkv_lab.model.state import RWKVState

Tokens = torch.Tensor | list[list[int]]  # [B,T]


class Model(Protocol):
    """See `RWKV_Dual`; Any stands for torch's modules, whose attributes have no types."""

    layout: Layout
    ctx_len: int
    emb: Any
    blocks: Any
    ln_out: Any
    head: Any

    @property
    def tokenizer(self) -> Any: ...

    @property
    def has_time_state(self) -> bool: ...

    @property
    def state_dtype(self) -> torch.dtype: ...

    def state_dict(self) -> dict[str, Any]: ...

    def get_device(self) -> torch.device: ...

    def create_state(self, batch_size: int = 1, tuned: str | Path | None = None) -> RWKVState: ...

    def parallel(self, tokens: Tokens, state: RWKVState | None = None) -> tuple[torch.Tensor, RWKVState]: ...

    def prefill(
        self, tokens: Tokens, state: RWKVState | None = None, lengths: Iterable[int] | None = None
    ) -> tuple[torch.Tensor, RWKVState]: ...
