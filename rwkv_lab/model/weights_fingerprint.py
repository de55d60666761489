"""What the weights of a model in memory are known again by."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from rwkv_lab.checkpoint.origin import hashes_of
from rwkv_lab.errors import ParameterError
from rwkv_lab.wkv.pointers import missing_memory

_PER_TENSOR = 256  # values of each tensor that its fingerprint takes


@torch.no_grad()
def weights_fingerprint(model: Any) -> dict[str, str]:
    """Hashes of values spread over all weights, once per dtype that they are rounded to.

    Two models of one file agree in one of them at least, whatever dtype each was loaded in. Initial states
    (`time_state`) are left out: what follows them can be continued by a model without.

    Raises:
        ParameterError: a weight has no values to read.
    """
    tensors: Mapping[str, torch.Tensor] = model.state_dict()
    for name, tensor in tensors.items():
        if missing := "has no values" if tensor.is_meta else missing_memory(tensor):
            raise ParameterError(f"{name} {missing}; load it again.")
    hashes = hashes_of((name, tensor.shape, partial(_spread, tensor)) for name, tensor in tensors.items())
    return {f"weights {name}": one for name, one in hashes.items()}


def _spread(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, len(flat) // _PER_TENSOR)][: 2 * _PER_TENSOR].cpu().contiguous()
