"""What a caller says about an adapter because its file may not: told apart from what the file says."""

import math
from dataclasses import dataclass

from rwkv_lab.errors import ParameterError

BATS = {"hf": "bat-hf", "rwkv-peft": "bat-rwkv-peft"}


@dataclass(frozen=True)
class Asked:
    """The arguments of `open_adapter`; None where the caller left it to the file."""

    alpha: float | None
    use_rslora: bool | None
    bat: str | None
    has_pissa_init: bool
    residual_base: bool

    def __post_init__(self):
        number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        if self.alpha is not None and not (number and 0 < self.alpha < math.inf):
            raise ParameterError(f"alpha={self.alpha!r}: it must be a positive number.")
        if self.bat is not None and self.bat not in BATS:
            raise ParameterError(f"bat={self.bat!r}: there are: {', '.join(BATS)}.")
        if self.has_pissa_init and self.residual_base:
            raise ParameterError("pissa_init goes with the original base, residual_base with another one; say one.")

    @property
    def says_pissa(self) -> bool:
        return self.has_pissa_init or self.residual_base

    def agree(self, what: str, given, said, path) -> None:
        """Refuse a value that the file contradicts.

        Raises:
            ParameterError: with both values.
        """
        if given is not None and given != said:
            raise ParameterError(f"{what}={given!r} was given, {path} says {said!r}; leave it out.")

    def choose_bat(self, path, said: str | None = None) -> str:
        """The variant of a block with three dimensions.

        Raises:
            ParameterError: neither given nor said by the file, or contradictory.
        """
        if said is not None:
            self.agree("bat", self.bat and BATS[self.bat], said, path)
            return said
        if self.bat is None:
            raise ParameterError(
                f"{path} holds MiSS blocks of the kind 'bat', of which there are two that do not go together:\n"
                'say bat="hf" (one block per output tile, Hugging Face peft) or bat="rwkv-peft" (one per input tile).'
            )
        return BATS[self.bat]

    def check_lora_only(self, path, kind: str) -> None:
        """Refuse what makes sense for LoRA and PiSSA only.

        Raises:
            ParameterError: an alpha, or a start of PiSSA, for a file of `kind`.
        """
        for what, given in (("alpha", self.alpha), ("pissa_init", self.says_pissa or None)):
            if given is not None:
                raise ParameterError(f"{what} was given, and {path} is {kind}, which has none; leave it out.")
