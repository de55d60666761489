"""What a family of models brings, so that the pipeline can export it. A family is one module in `families/`."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import nn

from rwkv_lab.checkpoint import TensorInfo
from rwkv_lab.checks import Check, NotApplicable
from rwkv_lab.errors import FormatExportError
from rwkv_lab.export.checkpoint_detector import CheckpointInfo
from rwkv_lab.export.configuration import ExportConfiguration
from rwkv_lab.export.onnx_folder import Weights
from rwkv_lab.export.onnx_model import OnnxModel

ONNX_WEIGHTS: dict[str, Weights] = {"none": "fp32", "fp16": "fp16", "int8": "int8", "int4": "int4"}


@dataclass(frozen=True)
class WholeModel:
    """A model with its adapters merged in, in a file.

    checks: what the merge was compared by.
    choice: how single matrices are stored, by name, whatever the level says.
    """

    path: Path
    bytes: int
    checks: list[Check | NotApplicable] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    choice: dict[str, Weights] = field(default_factory=dict)


@dataclass(frozen=True)
class Text:
    """What is read from the first state on: pieces int64 `[B,T]`, one after the other.

    states, logits: whether those of each piece are wanted.
    """

    pieces: Sequence[np.ndarray]
    states: bool
    logits: bool = True


# Of each text and each of its pieces in turn: logits float32 `[B,T,V]`, and the state as `Reference.arrays` gives it;
# each is empty where it is not wanted. A text is taken to its end before the next one.
Read = Iterator[Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]]


class Reference(Protocol):
    """The model that the exported one is compared with, in float32."""

    vocab_size: int
    context: int | None  # tokens that a text may have; None for any number

    def run(self, tokens: np.ndarray, state: Any | None = None) -> tuple[np.ndarray, Any]:
        """int64 `[B,T]` and a state -> logits float32 `[B,T,V]`, and the state."""
        ...

    def arrays(self, state: Any) -> dict[str, np.ndarray]:
        """A state as the ONNX graphs have it, by name."""
        ...

    def read(self, texts: Sequence[Text]) -> Read:
        """Logits and states along texts."""
        ...

    def seconds(self, pieces: Sequence[np.ndarray]) -> list[float]:
        """What each piece takes to compute, where it follows the one before."""
        ...

    def tokens_of(self, text: str) -> list[int] | None:
        """Tokens of a text; None where the model has no tokenizer."""
        ...

    def own_checks(self, graph: OnnxModel, limit: float | None) -> list[Check]:
        """What models of this family alone are compared by; `limit` is of relative errors, None where they do not
        count."""
        ...


def read_in_turn(reference: Reference, texts: Sequence[Text]) -> Read:
    """`Reference.read` of a model that is in memory."""

    def pieces(text: Text) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        state = None
        for tokens in text.pieces:
            logits, state = reference.run(tokens, state)
            yield logits, reference.arrays(state) if text.states else {}

    yield from map(pieces, texts)


def seconds_in_turn(reference: Reference, pieces: Sequence[np.ndarray]) -> list[float]:
    """`Reference.seconds` of a model that is in memory."""
    state, found = None, []
    for tokens in pieces:
        start = time.perf_counter()
        _, state = reference.run(tokens, state)
        found.append(time.perf_counter() - start)
    return found


def refuse_options(configuration: ExportConfiguration, refused: Mapping[str, str], owner: str, other: str) -> None:
    """Refuse values that are not the default.

    Args:
        refused: option -> why models of `other` do not have it.
        owner: whose models have it.

    Raises:
        FormatExportError: names the first and says why.
    """
    for name, why in refused.items():
        value = getattr(configuration, name)
        if value != type(configuration).model_fields[name].default:
            raise FormatExportError(f"{name}={value!r} is for models of {owner}, not for {other}: {why}.")


Encode = Callable[[bytes], Sequence[int]]


class Family(Protocol):
    """How models of one family are merged, written, and run for comparison."""

    name: str
    varies: tuple[str, ...]  # options that change how `write_onnx` works, for recovery after an error

    def recognises(self, configuration: ExportConfiguration, checkpoint: CheckpointInfo) -> bool:
        """Whether a checkpoint, or the base that it goes with, is of this family."""
        ...

    def check_options(self, configuration: ExportConfiguration) -> None:
        """Refuse options that models of this family do not have, before any work.

        Raises:
            FormatExportError: names the first and says why.
        """
        ...

    def merge(self, configuration: ExportConfiguration, checkpoint: CheckpointInfo, folder: Path) -> WholeModel:
        """The whole model, in `folder` where it has to be made.

        Raises:
            ModelMergeError: there is no base, it is another's, or the merge does not stand its checks.
        """
        ...

    def pytorch_name(self, configuration: ExportConfiguration, name: str) -> str:
        """What `write_pytorch` writes is called, for a model of that name."""
        ...

    def pytorch_bytes(self, configuration: ExportConfiguration, tensors: Mapping[str, TensorInfo]) -> int:
        """About the size of what `write_pytorch` writes of a model's tensors."""
        ...

    def write_pytorch(self, configuration: ExportConfiguration, model: WholeModel, out: Path) -> list[str]:
        """Write the model for PyTorch at `out`, and say what should be known of it.

        Raises:
            FormatExportError: it cannot be written.
        """
        ...

    def write_onnx(self, configuration: ExportConfiguration, model: WholeModel, folder: Path) -> list[Check]:
        """Write the folder that `OnnxModel` runs, and say what was checked by `rwkv_lab.export.onnx.check`.

        Raises:
            ONNXExportError: it cannot be written.
        """
        ...

    def reference(self, configuration: ExportConfiguration, model: WholeModel) -> Reference:
        """The model itself, run by torch."""
        ...

    def in_memory(self, configuration: ExportConfiguration, model: WholeModel) -> tuple[nn.Module, Encode | None]:
        """The model in torch, float32, whatever its size; and what makes tokens of texts, None where nothing does."""
        ...
