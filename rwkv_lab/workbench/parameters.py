"""What the parameters of all notebooks share: types, reading them from a notebook's variables, and the demo files.

papermill only warns of a wrong name; here it is an error. Each notebook's own parameters stand in its folder.
"""

import ast
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator

from rwkv_lab.errors import ParameterError
from rwkv_lab.paths import path_fault
from rwkv_lab.spec import OneOf, Spec, Text, unknown_name
from rwkv_lab.wkv import backends

DEMO = ("demo:base", "demo:state")


def _absolute(path: str) -> str:
    """Seen from the current folder: the caller's under papermill, the notebook's in JupyterLab. Demo names, "" stay."""
    if path in ("", *DEMO):
        return path
    if path.startswith("demo:"):
        raise ValueError(f"it should be one of {', '.join(DEMO)}, or a path")
    fault = path_fault(path)
    if fault:
        raise ValueError(fault)
    return os.path.abspath(os.path.expanduser(path))


@dataclass(frozen=True)
class Files:
    """Marks a text that is the path of an input, or a list of such; a panel has a file chooser for it."""

    several: bool = False


InputPath = Annotated[Text, AfterValidator(_absolute), Files()]
InputPaths = Annotated[InputPath | list[InputPath], Files(several=True)]
PathOrEmpty = Annotated[str, AfterValidator(_absolute)]
InputOrEmpty = Annotated[PathOrEmpty, Files()]
Backends = list[Annotated[str, OneOf(backends, everywhere=False)]]


class Parameters(Spec):
    """Base of all notebooks' parameters. Field order is the order in the notebook, descriptions are its comments."""

    hints: ClassVar[Mapping[str, str]] = {
        "bool_type": "papermill's -p takes True and False, spelled like this.",
        "string_type": "papermill's -p turns text that looks like a number into one; -r {name} keeps it as text.",
        "dict_type": 'papermill takes a mapping by -y: -y \'{{"{name}": {{"density": 0.3}}}}\'',
        "list_type": 'papermill takes a list by -y: -y \'{{"{name}": ["blocks.0.*"]}}\'',
    }

    basic: ClassVar[tuple[str, ...]] = ()  # what most people set; a panel shows the others folded

    @classmethod
    def applies(cls, name: str, values: Mapping[str, Any]) -> bool:
        """Whether parameter `name` means anything beside these values, not yet validated; a panel hides it if not."""
        return True

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """The parameters with these values; those that are not given keep their defaults.

        Raises:
            ParameterError: an unknown name, a wrong type, a value out of range, or values that do not go together.
        """
        parameters = super().read(values)
        parameters.check()
        return parameters

    def check(self) -> None:
        """Refuse values that do not go together.

        Raises:
            ParameterError
        """

    def check_files(self) -> None:
        """Refuse what is wrong by the files' headers or the method's own signature.

        Raises:
            RwkvLabError: a file that cannot be opened, or that does not go with the values.
        """

    def demo_files(self) -> list[str]:
        """The demo files among the inputs."""
        return [value for value in self.model_dump().values() if isinstance(value, str) and value in DEMO]


_PLAIN = (str, bytes, int, float, complex, list, dict, tuple, set, type(None))


def read_parameters(model: type[Parameters], namespace: Mapping[str, Any], names_are_all: bool) -> Parameters:
    """Validate the parameters of a notebook.

    Args:
        namespace: variables by name, such as `globals()`; a parameter that is not in it keeps its default.
        names_are_all: every public variable with a plain value must be a parameter. True in batch; in JupyterLab a
            person's own variables lie in the same namespace.
    Raises:
        ParameterError: as `Parameters.read`.
    """
    if names_are_all:
        _refuse_code(model, namespace)
        for name, value in namespace.items():
            hidden = name.startswith("_") or name in ("In", "Out")  # IPython's own
            if not hidden and name not in model.model_fields and isinstance(value, _PLAIN):
                raise unknown_name(model.title, name, model.model_fields)
    return model.read({name: namespace[name] for name in model.model_fields if name in namespace})


def input_path(value: str) -> Path:
    """The file behind an input parameter; the demo files are trained now if they are not there."""
    from rwkv_lab import train  # here, because it brings the model with it

    if value == "demo:base":
        return train.demo_base()
    if value == "demo:state":
        return train.demo_state()
    return Path(value)


def train_demo(parameters: Parameters) -> None:
    """Have the demo files that the parameters name, now rather than in the middle of a run: training takes minutes."""
    for value in parameters.demo_files():
        input_path(value)


def _refuse_code(model: type[Parameters], namespace: Mapping[str, Any]) -> None:
    """papermill writes `name = value` without looking at the name, so that a name may be code. Read what it wrote."""
    for source in namespace.get("In", []):
        if not source.startswith("# Parameters"):
            continue
        for statement in ast.parse(source).body:
            target = statement.targets[0] if isinstance(statement, ast.Assign) and len(statement.targets) == 1 else None
            if not isinstance(target, ast.Name):
                raise ParameterError(f"{ast.unparse(statement)[:80]!r} does not set a parameter; names are plain words")
            if target.id not in model.model_fields:
                raise unknown_name(model.title, target.id, model.model_fields)
