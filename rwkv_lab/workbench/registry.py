"""Which notebooks there are: every folder here that has a `parameters.py`."""

from importlib import import_module
from pathlib import Path
from types import ModuleType

from rwkv_lab.arguments import checked
from rwkv_lab.errors import ParameterError
from rwkv_lab.suggestions import did_you_mean
from rwkv_lab.workbench.parameters import Parameters

_FOLDER = Path(__file__).parent


def notebook_names() -> tuple[str, ...]:
    """All notebooks by name, in alphabetical order."""
    return tuple(sorted(p.parent.name for p in _FOLDER.glob("*/parameters.py")))


@checked
def parameters_of(notebook: str) -> type[Parameters]:
    """The model of a notebook's parameters: `PARAMETERS` of its `parameters.py`.

    Raises:
        ParameterError: no such notebook.
    """
    _check_name(notebook)
    return import_module(f"{__package__}.{notebook}.parameters").PARAMETERS


@checked
def cells_of(notebook: str) -> ModuleType:
    """The functions that a notebook's cells call: its `cells.py`.

    Raises:
        ParameterError: no such notebook.
    """
    _check_name(notebook)
    return import_module(f"{__package__}.{notebook}.cells")


def _check_name(notebook: str) -> None:
    names = notebook_names()
    if notebook not in names:
        raise ParameterError(
            f"{notebook!r} is no notebook{did_you_mean(notebook, names) or '.'} There are: {', '.join(names)}."
        )
