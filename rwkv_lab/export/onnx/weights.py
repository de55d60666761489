"""A model's weights for its graphs: read from the checkpoint, or taken from the model, when they are written."""

from collections.abc import Callable
from functools import partial
from typing import Any

import onnx_ir as ir
import torch


class WeightTensors:
    """The parameters of a model. Graphs of one export get the same object for the same weight.

    Args:
        values: of a parameter by its name, float32, in the shape that the model has.
    """

    def __init__(self, values: Callable[[str], torch.Tensor]):
        self._values = values
        self._made: dict[tuple[str, bool], ir.LazyTensor] = {}

    def tensor(self, name: str, shape: Any, transposed: bool) -> ir.LazyTensor:
        """A weight of this shape, after it was transposed. Its values are read each time that they are asked for."""
        if (name, transposed) not in self._made:
            self._made[name, transposed] = ir.LazyTensor(
                partial(self._read, name, transposed), dtype=ir.DataType.FLOAT, shape=ir.Shape(shape), name=name
            )
        return self._made[name, transposed]

    def _read(self, name: str, transposed: bool) -> Any:
        array = self._values(name).numpy()
        return ir.tensor(array.T if transposed else array, name=name)
