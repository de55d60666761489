"""What is trained and how: the kinds of training, and what each takes where it is not told otherwise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from rwkv_lab.errors import ParameterError
from rwkv_lab.model.device import parse_device

ADAPTER_KINDS = ("lora", "pissa", "miss")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
AUTOCASTS = {"": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Recipe:
    """How one kind trains; the numbers suit the demo model and one to two minutes on two CPU cores.

    steps: updates, each of `accumulate` batches of `batch_size` sequences of `ctx_len` tokens.
    lr: the highest learning rate. It rises over `warmup` steps and falls on a cosine to `final_lr` times itself.
    weight_decay: of large matrices.
    rank: of adapters.
    """

    data: str
    steps: int
    batch_size: int
    ctx_len: int
    lr: float
    final_lr: float
    weight_decay: float = 0.0
    warmup: int | None = None  # None: a twentieth of the steps
    accumulate: int = 1
    rank: int = 8

    @property
    def warmup_steps(self) -> int:
        return max(1, round(0.05 * self.steps)) if self.warmup is None else self.warmup


RECIPES = {
    "pretrain": Recipe("english", steps=800, batch_size=4, ctx_len=256, lr=3e-3, final_lr=0.02, weight_decay=0.1),
    "full": Recipe("python", steps=200, batch_size=8, ctx_len=128, lr=1e-3, final_lr=0.02, weight_decay=0.1),
    # A tuned state counts most near the start of a text, so its windows are shorter. RWKV-LM: from 1 down to 0.01.
    "state": Recipe("python", steps=400, batch_size=8, ctx_len=128, lr=1.0, final_lr=0.01),
    "lora": Recipe("python", steps=200, batch_size=8, ctx_len=128, lr=1e-2, final_lr=0.02),
    "pissa": Recipe("python", steps=200, batch_size=8, ctx_len=128, lr=1e-2, final_lr=0.02),
    "miss": Recipe("python", steps=200, batch_size=8, ctx_len=128, lr=1e-2, final_lr=0.02),
}


def choose_recipe(kind: str, **given) -> Recipe:
    """`RECIPES[kind]` with the given fields (None: not given) in place of its own.

    Raises:
        ParameterError: no such kind, or numbers out of range.
    """
    if kind not in RECIPES:
        raise ParameterError(f"There is no kind {kind!r} of training; there are: {', '.join(RECIPES)}.")
    if given.get("rank") is not None and kind not in ADAPTER_KINDS:
        raise ParameterError(f"rank={given['rank']} goes with the kinds {', '.join(ADAPTER_KINDS)}, not with {kind!r}.")
    recipe = replace(RECIPES[kind], **{name: value for name, value in given.items() if value is not None})
    for name in ("steps", "batch_size", "ctx_len", "accumulate", "rank"):
        if getattr(recipe, name) < 1:
            raise ParameterError(f"{name}={getattr(recipe, name)} must be at least 1.")
    if not 0 < recipe.lr < math.inf:
        raise ParameterError(f"lr={recipe.lr} must be above 0 and finite.")
    if not 0 <= recipe.warmup_steps <= recipe.steps:
        raise ParameterError(f"warmup={recipe.warmup} must be from 0 to the {recipe.steps} steps that there are.")
    return recipe


@dataclass(frozen=True)
class Tuning:
    """What is trained in which model, beside the recipe: checked as a whole by `check`."""

    kind: str
    dtype: str = "float32"
    autocast: str = ""
    device: str = "cpu"
    quant: str = "none"
    rank: int = 8
    alpha: float | None = None
    targets: Sequence[str] | None = None
    train_parts: Sequence[str] = ()
    seed: int = 0

    def check(self, base) -> None:
        """Refuse what does not go together; `base` is the path of the base model or None.

        Raises:
            ParameterError: says what.
        """
        kind = self.kind
        if kind != "pretrain" and not base:
            raise ParameterError(f"kind={kind!r} tunes a model: pass that model as base=.")
        if self.dtype not in DTYPES:
            raise ParameterError(f"There is no dtype {self.dtype!r}; there are: {', '.join(DTYPES)}.")
        if self.autocast not in AUTOCASTS:
            raise ParameterError(f"There is no autocast {self.autocast!r}; there are: bfloat16, float16, '' for none.")
        if self.autocast and self.dtype != "float32":
            raise ParameterError(f"autocast computes below float32: say dtype='float32' with it, not {self.dtype!r}.")
        device = parse_device(self.device).type
        if device not in ("cpu", "cuda"):
            raise ParameterError(f"device={self.device!r}: training runs on 'cpu', 'cuda', 'cuda:1' and the like.")
        if device == "cuda" and not torch.cuda.is_available():
            raise ParameterError(f"device={self.device!r}, but torch finds no CUDA device here; use device='cpu'.")
        if not -(2**63) <= self.seed < 2**63:
            raise ParameterError(f"seed={self.seed}: it must fit into 64 bits.")
        if self.autocast == "float16" and device != "cuda":
            raise ParameterError("autocast='float16' is for CUDA devices; on a CPU say 'bfloat16'.")
        if self.quant != "none" and kind in ("pretrain", "full"):
            raise ParameterError(f"quant={self.quant!r} stores frozen matrices; kind={kind!r} freezes none.")
        if self.alpha is not None and kind != "lora":
            raise ParameterError(f"alpha={self.alpha} scales a LoRA; kind={kind!r} has none.")
        if kind not in ADAPTER_KINDS:
            for name, value in (("targets", self.targets), ("train_parts", self.train_parts)):
                if value:
                    raise ParameterError(f"{name} goes with the kinds {', '.join(ADAPTER_KINDS)}, not with {kind!r}.")
