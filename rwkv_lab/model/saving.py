"""A model to a folder that `from_pretrained` reads."""

from pathlib import Path

from torch import nn

from rwkv_lab.checkpoint import write_checkpoint
from rwkv_lab.errors import OutputError, ParameterError
from rwkv_lab.model.loading import model_file
from rwkv_lab.model.standard_modules import replaced_module


def save(model: nn.Module, folder: str | Path) -> Path:
    """As `RWKV_Dual.save_pretrained`."""
    if found := replaced_module(model):
        raise ParameterError(
            f"This model has {found}, which no checkpoint holds.\n"
            "Adapters are saved by `save_adapter` and merged by `merge`; rounded weights are made anew each time."
        )
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OutputError(f"the folder {folder} cannot be made: {e.strerror or e}") from e
    write_checkpoint(model_file(folder), model.state_dict())
    return model_file(folder)
