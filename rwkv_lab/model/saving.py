"""A model to a folder that `from_pretrained` reads, with what the model's own file said of where it comes from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from rwkv_lab.checkpoint import Checkpoint, write_checkpoint
from rwkv_lab.checkpoint.contents import kept_notes
from rwkv_lab.checkpoint.origin import same_weights
from rwkv_lab.errors import OutputError, ParameterError
from rwkv_lab.model.loading import model_file
from rwkv_lab.model.packed_file import tensors_of_file
from rwkv_lab.model.standard_modules import replaced_module
from rwkv_lab.model.weight_only import PackedEmbedding, PackedLinear
from rwkv_lab.model.weights_fingerprint import weights_fingerprint

_JOB = "save_pretrained"


@dataclass(frozen=True)
class Loaded:
    """What a file's metadata say, for the file that the model is saved to: with its weights as they were, or changed
    since."""

    unchanged: Mapping[str, str]
    changed: Mapping[str, str]
    weights: Mapping[str, str]  # as of `weights_fingerprint`


def loaded_from(model: nn.Module, ck: Checkpoint, is_changed: bool) -> Loaded | None:
    """Of a model that was just filled from a checkpoint, or changed on the way; None where its metadata say nothing."""
    unchanged, changed = (kept_notes(ck, _JOB, is_changed=changes) for changes in (False, True))
    if not unchanged:
        return None
    return Loaded(changed if is_changed else unchanged, changed, weights_fingerprint(model))


def save(model: nn.Module, folder: str | Path, loaded: Loaded | None) -> Path:
    """As `RWKV_Dual.save_pretrained`."""
    if found := replaced_module(model, besides=(PackedLinear, PackedEmbedding)):
        raise ParameterError(
            f"This model has {found}, which no checkpoint holds.\n"
            "Adapters are saved by `save_adapter` and merged by `merge`."
        )
    notes: Mapping[str, str] = {}
    if loaded:
        is_same = same_weights(loaded.weights, weights_fingerprint(model))
        notes = loaded.unchanged if is_same else loaded.changed
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OutputError(f"the folder {folder} cannot be made: {e.strerror or e}") from e
    tensors, of_codes = tensors_of_file(model)
    write_checkpoint(model_file(folder), tensors, metadata={**notes, **of_codes})
    return model_file(folder)
