"""rwkv_lab: a workbench for people who own RWKV language models.

Names are imported on first use: opening and merging need no model, and exported models run without torch.
"""

from typing import TYPE_CHECKING

from rwkv_lab.lazy_names import found_on_use
from rwkv_lab.threads import settle
from rwkv_lab.version import __version__

settle()  # before anything imports torch

if TYPE_CHECKING:
    from rwkv_lab.checkpoint import open_checkpoint
    from rwkv_lab.merge import merge
    from rwkv_lab.model import RWKV_Dual, RWKVMode, init_state_with_past

__all__ = ["RWKVMode", "RWKV_Dual", "__version__", "init_state_with_past", "merge", "open_checkpoint"]

found_on_use(
    __name__,
    {
        "RWKV_Dual": "rwkv_lab.model",
        "RWKVMode": "rwkv_lab.model",
        "init_state_with_past": "rwkv_lab.model",
        "merge": "rwkv_lab.merge",
        "open_checkpoint": "rwkv_lab.checkpoint",
    },
)
