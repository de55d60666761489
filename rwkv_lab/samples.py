"""Text that models wrote after one prompt."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    prompt: str
    texts: dict[str, str]  # model -> continuation
