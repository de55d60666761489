"""The two ways to run through a text."""

from enum import Enum

from rwkv_lab.errors import ParameterError


class RWKVMode(Enum):
    """How a call runs through its tokens; both give the same logits and the same state up to rounding."""

    TRANSFORMER = "transformer"  # all tokens at once, layer by layer
    RNN = "rnn"  # one token after the other


def to_mode(mode: RWKVMode | str) -> RWKVMode:
    """Raises:
    ParameterError: no such mode.
    """
    try:
        return RWKVMode(mode)
    except ValueError as e:
        raise ParameterError(f"There is no mode {mode!r}: RWKVMode.TRANSFORMER or RWKVMode.RNN.") from e
