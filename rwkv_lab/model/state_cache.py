"""States after texts that were read before, so that a text that begins like one of them is not read again."""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import Annotated
from weakref import ref

import torch
from annotated_types import Ge

from rwkv_lab.arguments import check, checked, whole_numbers
from rwkv_lab.errors import ParameterError
from rwkv_lab.model.protocol import Model
from rwkv_lab.model.state import RWKVState, refuse_other_weights

_ID_BYTES = array("I").itemsize


class StateCache:
    """Remembers states by the tokens that led to them; forgets those that were used longest ago.

    It serves one model, the first that it is used with, and texts that begin with that model's `create_state()`. Call
    `clear` after changing the model's weights.

    Args:
        max_bytes: of states, logits and tokens together; a state that is larger alone is not kept.
    """

    @checked
    def __init__(self, max_bytes: Annotated[int, Ge(1)]):
        self.max_bytes, self.nbytes = max_bytes, 0
        self._entries: OrderedDict[bytes, tuple[RWKVState, torch.Tensor]] = OrderedDict()  # last used last
        self._model = None

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forget everything, the model too."""
        self._entries.clear()
        self.nbytes, self._model = 0, None

    def put(self, model: Model, tokens: Sequence[int], state: RWKVState, logits: torch.Tensor) -> None:
        """Remember the state of one sequence (B = 1) after these tokens, and the logits `[V]` that follow them.

        Both are copied. Raises ParameterError for another model than the first, or the state of another one.
        """
        check("StateCache.put", "state", state, RWKVState)
        check("StateCache.put", "logits", logits, torch.Tensor)
        self._serve(model)
        refuse_other_weights(state, model)
        key = _key(tokens)
        size = state.nbytes + logits.nbytes + len(key)
        if size > self.max_bytes:
            return
        self._drop(key)
        while self.nbytes + size > self.max_bytes:
            self._drop(next(iter(self._entries)))
        self._entries[key] = state.detach().clone(), logits.detach().clone()
        self.nbytes += size

    def longest_prefix(self, model: Model, tokens: Sequence[int]) -> tuple[int, RWKVState, torch.Tensor] | None:
        """The longest beginning of `tokens` that is remembered: its length, a copy of the state (B = 1), logits `[V]`.

        None where nothing fits. Raises ParameterError for another model than the first.
        """
        self._serve(model)
        key = _key(tokens)
        for length in sorted({len(k) for k in self._entries if len(k) <= len(key)}, reverse=True):
            found = self._entries.get(key[:length])
            if found is not None:
                self._entries.move_to_end(key[:length])
                state, logits = found
                return length // _ID_BYTES, state.clone(), logits.clone()
        return None

    def _drop(self, key: bytes) -> None:
        if key in self._entries:
            state, logits = self._entries.pop(key)
            self.nbytes -= state.nbytes + logits.nbytes + len(key)

    def _serve(self, model: Model) -> None:
        if self._model is None:
            check("StateCache", "model", model, Model)
            self._model = ref(model)
        elif self._model() is not model:
            raise ParameterError("This state cache holds states of another model; use one cache per model.")


def _key(tokens: Sequence[int]) -> bytes:
    try:
        return array("I", whole_numbers(tokens, "tokens")).tobytes()
    except OverflowError as e:
        raise ParameterError("tokens holds a number that is no token of any vocabulary.") from e
