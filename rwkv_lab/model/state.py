"""What a model remembers between two calls."""

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from typing import Any
from weakref import ref

import torch

from rwkv_lab.arguments import Size, checked, whole_numbers
from rwkv_lab.checkpoint import Layout
from rwkv_lab.checkpoint.origin import same_weights
from rwkv_lab.dtypes import to_dtype
from rwkv_lab.errors import ParameterError
from rwkv_lab.model.registry import generation_of
from rwkv_lab.model.weights_fingerprint import weights_fingerprint
from rwkv_lab.text import counted
from rwkv_lab.wkv.pointers import is_dense, layout_of, missing_memory


@dataclass(frozen=True)
class RWKVState:
    """State of a batch of sequences after some token. A call of the model returns a new one and leaves the old alone.

    wkv: `[B,L,H,V,K]`, float32 (float64 in a float64 model); row = value index, column = key index.
        RWKV-4 has no matrices: `[B,L,3,A]` = (a, b, p), where a e^p and b e^p are the sums of e^key v and of e^key.
    att_shift, ffn_shift: the last token's input of each layer's time mix and channel mix, after its LayerNorm,
        `[B,L,C]` in the model's dtype.
    version, vocab_size: generation of the model that made it, such as "6.0", and how many tokens it knows; "" and 0
        where that is not known. Shapes do not tell.
    made_by: a weak reference to the model that made it; models with other weights refuse it. None where that is not
        known, or does not matter (`for_other_weights`).
    """

    wkv: torch.Tensor
    att_shift: torch.Tensor
    ffn_shift: torch.Tensor
    version: str = ""
    vocab_size: int = 0
    made_by: ref | None = field(default=None, repr=False, compare=False)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The parts by name; the batch is the first dimension of each."""
        return {part.name: getattr(self, part.name) for part in fields(self)[:3]}

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "RWKVState":
        return replace(self, **{name: change(part) for name, part in self.tensors().items()})

    def __copy__(self) -> "RWKVState":
        return self._map(lambda x: x)

    def __deepcopy__(self, memo: dict) -> "RWKVState":
        return self._map(lambda x: deepcopy(x, memo))

    def __reduce__(self) -> tuple:  # for files, where no model is
        return RWKVState, (*self.tensors().values(), self.version, self.vocab_size)

    @property
    def batch_size(self) -> int:
        return len(self.wkv)

    @property
    def nbytes(self) -> int:
        """Bytes of all its numbers."""
        return sum(part.nbytes for part in self.tensors().values())

    def clone(self) -> "RWKVState":
        """A copy that shares no memory with this one."""
        return self._map(lambda x: x.clone(memory_format=torch.contiguous_format))

    def detach(self) -> "RWKVState":
        """The same numbers, cut off from the graph that computed them."""
        return self._map(torch.Tensor.detach)

    @checked
    def to(self, device: str | torch.device | int | None = None, dtype: torch.dtype | str | None = None) -> "RWKVState":
        """The same state on another device, or for a model of another dtype: of that dtype are the shifts alone."""
        dtype = None if dtype is None else to_dtype(dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        parts = {
            name: part.to(device=device, dtype=None if dtype is None else dtype if name.endswith("shift") else wide)
            for name, part in self.tensors().items()
        }
        return replace(self, **parts)

    @checked
    def expand(self, batch_size: Size) -> "RWKVState":
        """The state of one sequence (B = 1) for `batch_size` sequences, without copying it.

        Raises:
            ParameterError: it is of several sequences already.
        """
        if self.batch_size not in (1, batch_size):
            raise ParameterError(
                f"A state of {counted(self.batch_size, 'sequence')} cannot become one of {batch_size}."
            )
        return self._map(lambda x: x.expand(batch_size, *x.shape[1:]))

    def for_other_weights(self) -> "RWKVState":
        """The same state for any model of the same generation, dimensions and vocabulary, as after a fine-tuning, a
        quantisation, or when the model that made it is no longer there."""
        return replace(self, made_by=None)

    def rows(self, rows: Iterable[int]) -> "RWKVState":
        """The state of some of its sequences, in the order given; a copy.

        Raises:
            ParameterError: no such sequence.
        """
        rows = whole_numbers(rows, "rows")
        if wrong := [row for row in rows if not -self.batch_size <= row < self.batch_size]:
            raise ParameterError(f"There is no sequence {wrong[0]}: the state is of {self.batch_size}, from 0.")
        return self._map(lambda x: x[rows])


def join(states: Sequence[RWKVState]) -> RWKVState:
    """Several states as one batch, in this order.

    Raises:
        ParameterError: the states of models with different weights.
    """
    known = next((state for state in states if state.made_by is not None), states[0])
    model = known.made_by() if known.made_by is not None else None
    if model is not None:
        for state in states:
            refuse_other_weights(state, model)
    parts = [state.tensors() for state in states]
    return replace(known, **{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def state_shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    """Shape of each part of the state of one sequence, without the batch."""
    shift = (layout.n_layer, layout.n_embd)
    return {"wkv": (layout.n_layer, *generation_of(layout).wkv_shape(layout)), "att_shift": shift, "ffn_shift": shift}


def maker(model: Any) -> ref | None:
    """What a state remembers its model by: the same object for every state of a model."""
    return None if torch.compiler.is_compiling() else ref(model)  # torch.compile cannot make one


def check_state(state: RWKVState, model: Any, batch_size: int) -> None:
    """Whether a state can go into a model with tokens of this many sequences.

    Raises:
        ParameterError: it is no RWKVState of dense floating-point tensors, or is of another model, of another number of
            sequences, in another dtype or on another device, or its memory was resized or freed.
    """
    if not isinstance(state, RWKVState):
        raise ParameterError(
            f"A state is an RWKVState, as model.create_state() makes it, not a {type(state).__name__}."
        )
    layout, dtype, device = model.layout, model.emb.weight.dtype, model.get_device()
    if state.version not in ("", layout.version):
        raise ParameterError(f"The state is of RWKV-{state.version}, the model is RWKV-{layout.version}.")
    if state.vocab_size not in (0, layout.vocab_size):
        raise ParameterError(
            f"The state is of a model with {state.vocab_size} tokens, this one has {layout.vocab_size}: it is another."
        )
    for name, shape in state_shapes(layout).items():
        part = getattr(state, name)
        if not isinstance(part, torch.Tensor) or not part.is_floating_point() or not is_dense(part):
            of = f"tensor of {part.dtype}, {layout_of(part)}" if isinstance(part, torch.Tensor) else type(part).__name__
            raise ParameterError(f"The state's {name} is a {of}; it must be a dense floating-point tensor.")
        if part.shape[1:] != shape:
            raise ParameterError(
                f"The state is of another model: its {name} has shape {list(part.shape)}, "
                f"this model's {[batch_size, *shape]}."
            )
        if len(part) != batch_size:
            raise ParameterError(
                f"The state is of {counted(len(part), 'sequence')}, the tokens are of {batch_size}.\n"
                "state.expand(n) gives one sequence's state to n, state.rows([...]) picks some."
            )
        if missing := missing_memory(part):
            raise ParameterError(f"The state's {name} {missing}; take one that is whole.")
        if part.device != device:
            raise ParameterError(f"The state is on {part.device}, the model on {device}: state.to({str(device)!r}).")
    autocast = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    for name in ("att_shift", "ffn_shift"):
        if (found := getattr(state, name).dtype) != dtype and not autocast:
            raise ParameterError(
                f"The state is of a model in {found} (its {name}), this one is in {dtype}: state.to(dtype={dtype})."
            )
    refuse_other_weights(state, model)


def refuse_other_weights(state: RWKVState, model: Any) -> None:
    """Weights are compared only where another model made the state, as one that was loaded from the same file.

    Raises:
        ParameterError: the state was made by a model with other weights, or by one that is no longer there.
    """
    if state.made_by is None or torch.compiler.is_compiling():
        return
    made_by = state.made_by()
    if made_by is model:
        return
    if made_by is None:
        why = "The model that made this state is no longer there, so nothing tells whether it had the same weights."
    elif same_weights(weights_fingerprint(made_by), weights_fingerprint(model)):
        return
    else:
        why = "The state is of a model with other weights, and means nothing to this one."
    raise ParameterError(
        f"{why}\nIf they are the same, or differ only by a fine-tuning or a quantisation: state.for_other_weights()."
    )
