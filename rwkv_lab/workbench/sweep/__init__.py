"""Many runs of one notebook: a grid, a list or a random draw of its parameters, on this machine or on a cluster.

`sweep("merge", "grid.yaml")` runs them and writes a summary; a second call goes on where the first was stopped.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rwkv_lab.workbench.sweep.driver import SweepResult, sweep


def __getattr__(name: str) -> Any:
    if name not in ("SweepResult", "sweep"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rwkv_lab.workbench.sweep import driver  # brings torch along, which the process of a run need not wait for

    return getattr(driver, name)


__all__ = ["SweepResult", "sweep"]
