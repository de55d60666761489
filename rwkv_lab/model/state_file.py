"""States on disk, with what they belong to: generation, dimensions, vocabulary, and which weights."""

import logging
from pathlib import Path

from rwkv_lab.arguments import checked
from rwkv_lab.checkpoint import Checkpoint, Layout, open_checkpoint, write_checkpoint
from rwkv_lab.errors import LayoutError, NumericsError, ParameterError
from rwkv_lab.model.protocol import Model
from rwkv_lab.model.state import RWKVState, check_state, state_shapes
from rwkv_lab.model.weights_fingerprint import weights_fingerprint

log = logging.getLogger("rwkv_lab")

_MARK = "rwkv_lab state 1"


@checked
def save_state(path: str | Path, state: RWKVState, model: Model, overwrite: bool = False) -> None:
    """Write a state to a `.safetensors`, with what it belongs to: the model's generation, dimensions, vocabulary and a
    fingerprint of its weights.

    Raises:
        OutputError: the file is there already (unless `overwrite`), or cannot be written.
        ParameterError: a state of another model, or another suffix.
        NumericsError: NaN or infinity in it.
    """
    check_state(state, model, state.batch_size)
    if Path(path).suffix != ".safetensors":
        raise ParameterError(f"{path}: a state is written to a .safetensors.")
    _refuse_nan(path, state)
    metadata = {"format": _MARK, **_owner(model.layout), **weights_fingerprint(model)}
    write_checkpoint(path, state.tensors(), metadata, overwrite)


@checked
def load_state(path: str | Path, model: Model, other_weights: bool = False) -> RWKVState:
    """The state in a file that `save_state` wrote, in the model's dtype and on its device.

    Args:
        other_weights: take the state of a model of the same generation, dimensions and vocabulary whose weights differ,
            as before and after a fine-tuning.

    Raises:
        LayoutError: no state, or the state of a model of another generation, other dimensions or other weights.
        NumericsError: NaN or infinity in it.
        CorruptFileError: see `open_checkpoint`.
    """
    with open_checkpoint(path) as ck:
        if ck.metadata.get("format") != _MARK:
            raise LayoutError(
                f"{path} is no state that save_state wrote ({ck.kind}).\n"
                "A tuned initial state (time_state) goes into create_state(tuned=...) or load_state_file."
            )
        _check_owner(path, ck, model, other_weights)
        shapes = state_shapes(model.layout)
        for name, shape in shapes.items():
            if name not in ck or tuple(ck.info[name].shape[1:]) != shape:
                found = list(ck.info[name].shape) if name in ck else "missing"
                raise LayoutError(f"{path}: {name} is {found}; the model needs {['B', *shape]}.")
        batches = {name: ck.info[name].shape[0] for name in shapes}
        if len({*batches.values()}) > 1 or 0 in batches.values():
            raise LayoutError(f"{path}: its tensors are of {batches} sequences; all must be of as many, one at least.")
        odd = next((name for name in ck.info if name not in shapes or not ck.info[name].dtype.is_floating_point), None)
        if odd:
            raise LayoutError(f"{path}: {odd} ({ck.info[odd].dtype}) is no part of a state that save_state wrote.")
        parts = [ck[name] for name in shapes]
    state = RWKVState(*parts, version=model.layout.version, vocab_size=model.layout.vocab_size)
    _refuse_nan(path, state)
    return state.to(model.get_device(), model.emb.weight.dtype)


def _refuse_nan(path: str | Path, state: RWKVState) -> None:
    bad = next((name for name, part in state.tensors().items() if not bool(part.isfinite().all())), None)
    if bad:
        raise NumericsError(f"{path}: {bad} of the state holds NaN or infinity; nothing can be continued from it.")


def _owner(layout: Layout) -> dict[str, str]:
    """What a state belongs to, as it is written into its file."""
    names = ("version", "n_layer", "n_embd", "dim_att", "n_head", "head_size", "vocab_size")
    return {name: str(getattr(layout, name)) for name in names}


def _check_owner(path: str | Path, ck: Checkpoint, model: Model, other_weights: bool) -> None:
    """Refuse a state of another model; files of older versions do not say what vocabulary and weights they are of."""
    found = weights_fingerprint(model)
    states_weights = any(name in ck.metadata for name in found)
    for name, expected in _owner(model.layout).items():
        if ck.metadata.get(name) != expected and (name != "vocab_size" or name in ck.metadata):
            raise LayoutError(
                f"{path} is a state of another model: its {name} is {ck.metadata.get(name)}, here {expected}."
            )
    if not states_weights:
        log.warning("%s does not say which weights it belongs to: it was written by an older version.", path)
    elif not other_weights and not any(ck.metadata.get(name) == value for name, value in found.items()):
        raise LayoutError(
            f"{path} is a state of a model with other weights, and means nothing to this one.\n"
            "If they differ only by a fine-tuning or a quantisation, pass other_weights=True."
        )
