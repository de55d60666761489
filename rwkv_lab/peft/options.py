"""What a caller gives `open_adapter` because a file may not state it."""

import math
from dataclasses import dataclass
from pathlib import Path

from rwkv_lab.errors import ParameterError


@dataclass(frozen=True)
class AdapterOptions:
    """The options of `open_adapter`; None where they are left to the file.

    Raises:
        ParameterError: a value out of range, or options that contradict each other.
    """

    alpha: float | None = None
    use_rslora: bool | None = None
    bat: str | None = None
    has_pissa_init: bool = False
    residual_base: bool = False

    def __post_init__(self) -> None:
        number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        if self.alpha is not None and not (number and 0 < self.alpha < math.inf):
            raise ParameterError(f"alpha={self.alpha!r}: it must be a positive number.")
        if self.bat is not None and self.bat not in ("hf", "rwkv-peft"):
            raise ParameterError(f"bat={self.bat!r}: there are: hf, rwkv-peft.")
        if self.has_pissa_init and self.residual_base:
            raise ParameterError("pissa_init goes with the original base, residual_base with another: pass one.")

    @property
    def states_pissa(self) -> bool:
        """Whether they state that the adapter is PiSSA."""
        return self.has_pissa_init or self.residual_base

    def refuse_other(self, name: str, given: object, found: object, path: Path) -> None:
        """Refuse an option that the file contradicts.

        Args:
            given: of the option; None where it is left to the file.
            found: in the file.

        Raises:
            ParameterError: with both values.
        """
        if given is not None and given != found:
            raise ParameterError(f"{name}={given!r} was given, {path} states {found!r}; leave it out.")

    def refuse_for_lora(self, path: Path, described: str) -> None:
        """Refuse the options of LoRA and PiSSA, for a file of another kind.

        Raises:
            ParameterError: an alpha, or a start of PiSSA.
        """
        for name, given in (("alpha", self.alpha), ("pissa_init", self.states_pissa or None)):
            if given is not None:
                raise ParameterError(f"{name} was given, and {path} is {described}, which has none; leave it out.")
