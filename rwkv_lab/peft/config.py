"""How a model is adapted: the settings, and what a kind of adapter is.

A kind (`AdapterKind`) is one object, registered by its module in `rwkv_lab.peft.kinds`: how its settings are checked,
its layer made and read out of a model, and its parts named, read and written in both file layouts. Nothing else in
`rwkv_lab.peft` knows the kinds by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rwkv_lab.arguments import checked
from rwkv_lab.checkpoint import Checkpoint, TensorInfo
from rwkv_lab.errors import ParameterError
from rwkv_lab.lazy_torch import torch
from rwkv_lab.peft.adapter import Adapter, Target, Values
from rwkv_lab.peft.options import AdapterOptions
from rwkv_lab.peft.settings import check_dropout, check_quant
from rwkv_lab.suggestions import did_you_mean

if TYPE_CHECKING:
    from rwkv_lab.peft.linear import AdaptedLinear

Layers = Mapping[str, Mapping[str, TensorInfo]]  # of a file: the parts of each layer's adapter, by name


@dataclass(frozen=True)
class LoraConfig:
    """How a model is adapted.

    Args:
        method: "lora", "pissa" or "miss".
        lora_target_modules: patterns of layers, as `rwkv_lab.patterns` reads them: "att.key", "blocks.3.ffn.value",
            "blocks.[0-3]". None for all matrices of the blocks.
        lora_r: rank.
        lora_alpha: of LoRA: its change is scaled by lora_alpha / lora_r. PiSSA's scale is 1, MiSS has none.
        lora_dropout: of LoRA, and of MiSS but for its bats.
        use_rslora: scale LoRA by lora_alpha / sqrt(lora_r).
        svd_niter: of PiSSA: power iterations of the randomised SVD; None for the exact one.
        miss_variant: "default", "mini", "bat-hf" or "bat-rwkv-peft"; `rwkv_lab.peft.miss` has the formulas.
        mini_r: of MiSS "mini": columns of its block.
        quant: "none", "int8", "nf4", "fp4" or "bnb-int8": how the frozen matrices of the blocks are stored, adapted
            and others.
        train_parts: what is trained besides: "emb", "head", "ln" (every norm), "time" (the vectors and low-rank pairs
            of att and ffn), "time_state" (made where the model has none), or patterns of parameter names.
        adapter_dtype: of the adapters' parameters; None for the model's dtype.

    Raises:
        ParameterError: a value that there is not, or settings that contradict each other.
    """

    method: str = "lora"
    lora_target_modules: Sequence[str] | None = None
    lora_r: int = 8
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    svd_niter: int | None = 4
    miss_variant: str = "default"
    mini_r: int = 1
    quant: str = "none"
    train_parts: Sequence[str] = ()
    adapter_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.method not in ADAPTER_KINDS:
            hint = did_you_mean(self.method, ADAPTER_KINDS)
            raise ParameterError(
                f"There is no method {self.method!r}; there are: {', '.join(ADAPTER_KINDS)}{hint or '.'}"
            )
        for what, names in (("lora_target_modules", self.lora_target_modules), ("train_parts", self.train_parts)):
            if names is not None and (isinstance(names, str) or not all(isinstance(n, str) for n in names)):
                raise ParameterError(f"{what}={names!r}: it must be a list of names or patterns.")
        if self.lora_target_modules is not None and not list(self.lora_target_modules):
            raise ParameterError("lora_target_modules is empty: nothing would be adapted. None stands for all layers.")
        if not is_whole(self.lora_r) or self.lora_r < 1:
            raise ParameterError(f"lora_r={self.lora_r!r}: it must be a whole number of at least 1.")
        check_quant(self.quant)
        check_dropout(self.lora_dropout)
        if self.svd_niter is not None and not (is_whole(self.svd_niter) and self.svd_niter >= 0):
            raise ParameterError(
                f"svd_niter={self.svd_niter!r}: it must be a whole number of at least 0, or None for the exact SVD."
            )
        if not is_whole(self.mini_r) or self.mini_r < 1:
            raise ParameterError(f"mini_r={self.mini_r!r}: it must be a whole number of at least 1.")
        dtype = self.adapter_dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ParameterError(f"adapter_dtype={dtype!r}: it must be a floating dtype, such as torch.float32.")
        ADAPTER_KINDS[self.method].check(self)


class AdapterKind(ABC):
    """One kind of adapter.

    Attributes:
        method: its name.
        described: what it is called in a sentence, "a LoRA".
        layer_type: the layer in a model.
        takes_alpha: whether `LoraConfig.lora_alpha` means anything.
        peft_types: `peft_type` of its folders of Hugging Face's peft.
        stems: how the names of its parts begin in such folders.
        folder_settings: what is read there of `adapter_config.json`.
        idle_settings: what has no effect there on what a trained adapter does.
    """

    method: str
    described: str
    layer_type: type[AdaptedLinear] | Any
    takes_alpha: bool = False
    peft_types: tuple[str, ...] = ()
    stems: tuple[str, ...] = ()
    folder_settings: frozenset[str] = frozenset()
    idle_settings: frozenset[str] = frozenset()

    # In a model

    @abstractmethod
    def check(self, config: LoraConfig) -> None:
        """Refuse settings that do not go with this kind.

        Raises:
            ParameterError: names it.
        """

    @abstractmethod
    def new_layer(self, linear: torch.nn.Linear, config: LoraConfig) -> AdaptedLinear:
        """An adapted layer that shares the weight of `linear`.

        Raises:
            ParameterError: a rank that does not fit the layer.
        """

    def start(self, layer: AdaptedLinear, config: LoraConfig) -> None:  # noqa: B027  # nothing to do for most kinds
        """Bring a new layer to where training starts, where that depends on the weight's values.

        Raises:
            NumericsError: NaN or infinity in the weight.
        """

    def start_fingerprint(self, layers: Iterable[AdaptedLinear]) -> str | None:
        """Of where training started, where another machine may start elsewhere; else None."""
        return None

    @abstractmethod
    def target(self, layer: AdaptedLinear) -> Target:
        """What a layer was trained to do; the tensors are its own, not copies."""

    @abstractmethod
    def trained_layer(self, linear: torch.nn.Linear, target: Any) -> AdaptedLinear:
        """The layer that was trained, on top of the base's."""

    # In a file of RWKV-PEFT's layout

    @abstractmethod
    def file_part(self, name: str) -> tuple[str, str] | None:
        """(layer, part) of a tensor that is a part of such an adapter; None of others."""

    @abstractmethod
    def check_note(self, note: dict[str, Any]) -> None:
        """Refuse a note that is not as `file_content` writes it. Missing keys and wrong types may raise KeyError,
        TypeError or ValueError.

        Raises:
            ParameterError: values out of range.
        """

    @abstractmethod
    def read_file(
        self, ck: Checkpoint, layers: Layers, note: Mapping[str, Any], options: AdapterOptions
    ) -> tuple[dict[str, Target], str]:
        """(targets by layer, method) of a file with parts of this kind.

        Raises: as `open_adapter`.
        """

    @abstractmethod
    def file_content(self, adapter: Adapter) -> tuple[dict[str, Values], dict[str, Any]]:
        """(tensors by name, note) of a file.

        Raises:
            ParameterError: an adapter that the layout cannot express.
        """

    # In a folder of Hugging Face's peft

    @abstractmethod
    def folder_part(self, name: str) -> tuple[str, str] | None:
        """(layer, part) as `file_part`."""

    @abstractmethod
    def read_folder(
        self, ck: Checkpoint, config: Mapping[str, Any], layers: Layers, options: AdapterOptions
    ) -> tuple[dict[str, Target], str]:
        """(targets by layer, method) of a folder whose `peft_type` is one of this kind's.

        Args:
            config: what `adapter_config.json` holds.

        Raises: as `open_adapter`.
        """

    @abstractmethod
    def folder_content(self, adapter: Adapter) -> tuple[dict[str, Values], dict[str, Any]]:
        """(tensors by name, settings beside those that all kinds have) of a folder.

        Raises:
            ParameterError: an adapter that peft has no words for.
        """


ADAPTER_KINDS: dict[str, AdapterKind] = {}  # by method, filled by the modules of `rwkv_lab.peft.kinds`


@checked
def register(kind: AdapterKind) -> None:
    """Make a kind of adapter known.

    Raises:
        ParameterError: there is one of that name.
    """
    if kind.method in ADAPTER_KINDS:
        raise ParameterError(f"There is a kind of adapter named {kind.method!r} already.")
    ADAPTER_KINDS[kind.method] = kind


def is_whole(value: object) -> bool:
    """Whether it is a whole number, which True is not."""
    return isinstance(value, int) and not isinstance(value, bool)
