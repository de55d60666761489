"""Options as typed models: what is refused, and in which words."""

from typing import Annotated, Literal

import pytest
from pydantic import Field

from rwkv_lab.errors import ParameterError
from rwkv_lab.spec import Number, OneOf, Patterns, Spec

NAMES = ["linear", "slerp"]


class Toy(Spec):
    title = "toy"
    method: Annotated[str, OneOf(lambda: NAMES)] = "linear"
    share: Annotated[Number, Field(ge=0)] | None = None
    only: Patterns = []
    scan: Literal["all", "some"] = "all"


def test_a_name_that_is_not_there_is_refused_with_the_nearest_one():
    with pytest.raises(ParameterError, match="^method='slurp': it should be one of linear, slerp; did you mean slerp"):
        Toy.read({"method": "slurp"})
    with pytest.raises(ParameterError, match="^method=3: it should be a valid string"):
        Toy.read({"method": 3})


def test_names_may_be_added_later(monkeypatch):
    monkeypatch.setattr("test_spec.NAMES", [*NAMES, "ties"])
    assert Toy.read({"method": "ties"}).method == "ties"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"shar": 1}, "^toy has no parameter 'shar'; did you mean share?"),
        ({"share": float("nan")}, "finite"),
        ({"share": "1e-3x"}, "valid number"),
        ({"share": True}, "valid number"),
        ({"share": -1}, "greater than or equal to 0"),
        ({"only": [" "]}, "empty"),
        ({"scan": "none", "share": "x"}, "Wrong too: scan"),
    ],
)
def test_wrong_values(values, says):
    with pytest.raises(ParameterError, match=says):
        Toy.read(values)


def test_text_that_reads_as_a_number_is_one():
    assert Toy.read({"share": "1e-3"}).share == 0.001


def test_changed_and_given():
    spec = Toy.read({"share": 1})
    assert spec.changed(scan="some").given() == {"share": 1.0, "scan": "some"}
    with pytest.raises(ParameterError):
        spec.changed(share=-1)
    assert spec.share == 1.0
