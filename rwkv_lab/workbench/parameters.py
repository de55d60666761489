"""What the parameters of all notebooks share: types, reading them from a notebook's variables, and the demo files.

papermill only warns of a wrong name; here it is an error. Each notebook's own parameters stand in its folder.
"""

import ast
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, Field

from rwkv_lab.analysis.texts import Reading
from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.checkpoint.packed import refuse_packed
from rwkv_lab.checkpoint.whole_model import whole_model
from rwkv_lab.errors import ParameterError
from rwkv_lab.paths import path_fault
from rwkv_lab.spec import Advise, OneOf, Patterns, Spec, Text
from rwkv_lab.suggestions import unknown_name
from rwkv_lab.train.held_out import WINDOW
from rwkv_lab.workbench.words import as_option, example, from_words, in_command, takes_mapping

DEMO = ("demo:base", "demo:state")
FINE_TUNE = "fine-tune"  # in `takes_kinds`: a whole model that was tuned from a base, taken together with it


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
    """Marks a text that is the path of an input, or a list of such; a panel has a file chooser for it.

    several: a list is taken.
    kinds: of checkpoints that are taken; none for any.
    checkpoints: False for texts, YAML and the like.
    weights: the parameter with a number for each file; empty: none.
    """

    several: bool = False
    kinds: tuple[str, ...] = ()
    checkpoints: bool = True
    weights: str = ""


MODEL = Files(kinds=("model",))
TEXT = Files(checkpoints=False)

_Path = Annotated[Text, AfterValidator(_absolute)]
InputPath = Annotated[_Path, Files()]
ModelPath = Annotated[_Path, MODEL]
WeightedPaths = Annotated[_Path | list[_Path], Files(several=True, weights="weights")]
PathOrEmpty = Annotated[str, AfterValidator(_absolute)]
InputOrEmpty = Annotated[PathOrEmpty, Files()]
ModelOrEmpty = Annotated[PathOrEmpty, MODEL]
TextFileOrEmpty = Annotated[PathOrEmpty, TEXT]
TextOrFile = Annotated[Text, TEXT]  # a word, such as english, or the path of a file
InputsOrEmpty = Annotated[PathOrEmpty | list[PathOrEmpty], Files(several=True)]


def _backends() -> tuple[str, ...]:
    from rwkv_lab.wkv import backends  # brings torch, which no value needs while the default stands

    return backends()


Backends = list[Annotated[str, OneOf(_backends, everywhere=False)]]


class Parameters(Spec):
    """Base of all notebooks' parameters. Field order is the order in the notebook, descriptions are its comments."""

    basic: ClassVar[tuple[str, ...]] = ()  # what most people set; a panel shows the others folded
    takes_kinds: ClassVar[
        tuple[str, ...]
    ] = ()  # of checkpoints that other notebooks write: reports lead on to this one
    takes_output: ClassVar[str] = ""  # the parameter that takes such a checkpoint
    takes_base: ClassVar[str] = "base"  # the parameter that takes the base of an adapter, where there is one
    purpose: ClassVar[str] = ""  # what it does with the checkpoint, for a person who has one

    @classmethod
    def parameter_for(cls, kind: str) -> str:
        """The parameter that takes a checkpoint of one of the kinds in `takes_kinds`."""
        return cls.takes_output

    @classmethod
    def applies(cls, name: str, values: Mapping[str, Any]) -> bool:
        """Whether parameter `name` means anything beside these values, not yet validated; a panel hides it if not."""
        return True

    @classmethod
    def stands_for(cls, values: Mapping[str, Any]) -> Mapping[str, object]:
        """What None comes to beside these values, not yet validated, by parameter; a panel shows it."""
        return {}

    @classmethod
    def weighted(cls, values: Mapping[str, Any]) -> Sequence[str]:
        """The files that have a weight beside these values, not yet validated, in the order of the weights."""
        return ()

    @classmethod
    def read(cls, values: Mapping[str, Any], advise: Advise | None = None) -> Self:
        """The parameters with these values; those that are not given keep their defaults.

        A list may be given as one word, or as words with commas between them.

        Args:
            advise: as in `Spec.read`.
        Raises:
            ParameterError: an unknown name, a wrong type, a value out of range, or values that do not go together.
        """
        fields = cls.model_fields
        values = {name: from_words(fields[name], v) if name in fields else v for name, v in values.items()}
        parameters = super().read(values, advise)
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


class ReadsText(Parameters):
    """What notebooks share that measure held-out text; the text itself, `data`, is a parameter of each."""

    tokenizer: Annotated[str, TEXT] = Field(
        "", description="world, bytes, or the path of a vocabulary or tokenizer.json; empty: by the vocabulary's size"
    )
    ignore: Patterns = Field(
        [], examples=[["id", "source"]], description="fields of records that are not read, or patterns of them"
    )
    template: TextOrFile = Field("world", description="of conversations: world, or the path of a JSON file with one")
    window: Annotated[int, Field(ge=1)] = Field(
        WINDOW, description="tokens of text, each window read from a fresh state; as ctx_len of train"
    )
    measure_bytes: Annotated[int, Field(ge=1)] | None = Field(
        None, description="of held-out text; None: all, which large models take minutes for"
    )

    def reading(self, data: Sequence[str]) -> Reading:
        """What models read and continue."""
        return Reading(tuple(data), self.tokenizer, self.window, self.measure_bytes, tuple(self.ignore), self.template)


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
    values = {name: namespace[name] for name in model.model_fields if name in namespace}
    return model.read(values, _advice_in_batch(model) if names_are_all else None)


_BY_PATTERN = {"blocks.0.*": 0.5, "*": 1.0}
_OF_PAPERMILL = ("papermill takes a mapping by -y", "papermill's -p takes")


def _advice_in_batch(model: type[Parameters]) -> Advise:
    """How papermill's options, or the words of rwkv-lab, pass a value of the type that is needed."""

    def advise(error: str, name: str, given: object) -> str:
        value = example(name, model.model_fields[name]) if name else None
        if error == "string_type" and (given is None or isinstance(given, bool | int | float)):
            word = f"the word {given}" if given is None or isinstance(given, bool) else "text that looks like a number"
            also = f"; leave {name} out for its default" if given is None else ""
            return f"papermill's -p makes a value of {word}: -r {name} keeps it as text{also}."
        mapping, booleans = ("Give a mapping as JSON", "Write") if in_command() else _OF_PAPERMILL
        if isinstance(given, str) and given.lstrip()[:1] in ("{", "[") and takes_mapping(model.model_fields[name]):
            return f"It is no JSON. {mapping}: {as_option(name, _BY_PATTERN)}"
        if isinstance(given, float) and given.is_integer() and error in ("int_type", "int_from_float"):
            return f"Write it without a fraction or an exponent: {as_option(name, int(given))}"
        return {
            "bool_type": f"{booleans} True and False, spelled like this.",
            "dict_type": f"{mapping}: {as_option(name, value)}",
            "list_type": f"Give words with commas between them: {as_option(name, value)}",
        }.get(error, "")

    return advise


def input_path(value: str) -> Path:
    """The file behind an input parameter; the demo files are trained now if they are not there."""
    from rwkv_lab import train  # here, because it brings the model with it

    if value == "demo:base":
        return train.demo_base()
    if value == "demo:state":
        return train.demo_state()
    return Path(value)


def check_headers(*paths: str | None, dense_for: str = "") -> None:
    """Refuse checkpoints that cannot be opened, from their headers; demo files and "" pass.

    Args:
        dense_for: refuse packed ones, too: the job that needs dense weights, as `refuse_packed` takes it.
    Raises:
        RwkvLabError: as `open_checkpoint` and `refuse_packed`.
    """
    for path in paths:
        if path and path not in DEMO:
            with open_checkpoint(path) as ck:
                if dense_for:
                    refuse_packed(ck.path, ck.info.values(), dense_for)


def check_models(*paths: str | None) -> None:
    """Refuse what is no whole model, from the headers; demo files and "" pass.

    Raises:
        RwkvLabError: as `open_checkpoint` and `whole_model`.
    """
    for path in paths:
        if path and path not in DEMO:
            with open_checkpoint(path) as ck:
                whole_model(ck)


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
