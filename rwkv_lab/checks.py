"""Verdicts of a run: what was measured, the limit it had to keep, and whether it did."""

from dataclasses import dataclass

from rwkv_lab.text import shown


@dataclass(frozen=True)
class Check:
    name: str  # what was checked, in words a reader of the report understands
    value: float | int | str  # what was found
    limit: float | int | str  # what had to hold, in the unit of `value`
    passed: bool

    def __str__(self) -> str:
        return f"{'PASS' if self.passed else 'FAIL'}  {self.name}: {shown(self.value)} (limit {shown(self.limit)})"


@dataclass(frozen=True)
class NotApplicable:
    """A check that this run gives no occasion for; it is neither passed nor failed."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"n/a   {self.name}: {self.reason}"
