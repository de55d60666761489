"""Parameters of a notebook are made from the specs of its job; what a notebook states itself is the difference."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import BeforeValidator, Field

from rwkv_lab.errors import ParameterError
from rwkv_lab.spec import Number, Patterns, Spec
from rwkv_lab.workbench.fields import field_for
from rwkv_lab.workbench.options import takes, values_for
from rwkv_lab.workbench.parameters import InputPath, Parameters, PathOrEmpty
from rwkv_lab.workbench.parameters_cell import parameters_cell


class Job(Spec):
    source: Annotated[Path, BeforeValidator(lambda value: Path(value))] = Field(description="what is read")
    share: Annotated[Number, Field(ge=0)] | None = Field(None, description="of the way")
    only: Patterns | None = Field(None, description="patterns")
    dtype: Literal["bf16", "fp32"] | None = Field(None, description="of the output")


class How(Spec):
    folder: Annotated[Path, BeforeValidator(lambda value: Path(value))] | None = Field(
        None, description="where it may go"
    )
    log: bool = Field(False, description="say more")


@takes(Job, How, without=("log",))
class ToyParameters(Parameters):
    title: ClassVar[str] = "toy"
    basic: ClassVar[tuple[str, ...]] = ("source", "out")

    source: InputPath = "demo:base"
    out: PathOrEmpty = Field("", description="what is written")


def test_order_defaults_and_help():
    fields = ToyParameters.model_fields
    assert list(fields) == ["source", "out", "share", "only", "dtype", "folder"]
    assert [f.default for f in fields.values()] == ["demo:base", "", None, [], "", ""]
    assert fields["source"].description == "what is read" and fields["folder"].description == "where it may go"
    assert ToyParameters.__name__ == "ToyParameters" and ToyParameters.title == "toy"


def test_ranges_and_names_are_those_of_the_spec():
    for wrong in ({"share": -1}, {"dtype": "fp64"}, {"only": 3}, {"log": True}):
        with pytest.raises(ParameterError, match=next(iter(wrong))):
            ToyParameters.read(wrong)
    assert ToyParameters.read({"dtype": "bf16", "share": "1e-2"}).share == 0.01


def test_what_is_not_given_is_none_again():
    nothing = {"share": None, "only": None, "dtype": None}
    assert values_for(Job, ToyParameters.read({})) == {"source": "demo:base"} | nothing
    given = values_for(Job, ToyParameters.read({"only": ["a"], "dtype": "fp32", "source": "/x"}))
    assert Job.read(given) == Job(source=Path("/x"), only=["a"], dtype="fp32")
    assert values_for(How, ToyParameters.read({"folder": "/y"})) == {"folder": "/y"}


def test_the_cell_has_a_line_for_each():
    assert parameters_cell(ToyParameters).splitlines() == [
        "from typing import Optional",
        "",
        'source: str = "demo:base"  # what is read',
        'out: str = ""  # what is written',
        "share: Optional[float] = None  # of the way",
        "only: list[str] = []  # patterns",
        'dtype: str = ""  # of the output',
        'folder: str = ""  # where it may go',
    ]


def test_a_field_of_the_panel_for_each():
    fields = {name: field_for(name, info) for name, info in ToyParameters.model_fields.items()}
    assert dict(fields["dtype"].widget.options) == {"(none)": "", "bf16": "bf16", "fp32": "fp32"}
    fields["only"].widget.value = "a\n\nb"
    assert fields["only"].value == ["a", "b"] and hasattr(fields["source"].widget, "browse")
