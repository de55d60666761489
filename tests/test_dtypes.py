"""A dtype has the same names in every option, command and file that takes one."""

import pytest
import torch

from rwkv_lab.bench.__main__ import _parser
from rwkv_lab.dtypes import floats, long_name, short_name, to_dtype
from rwkv_lab.errors import ParameterError
from rwkv_lab.merge import MergeSpec
from rwkv_lab.merge.spec import ExtractSpec
from rwkv_lab.train import TrainSpec
from rwkv_lab.workbench.registry import parameters_of

NAMES = {
    torch.bfloat16: ("bf16", "bfloat16", "BF16", "torch.bfloat16", torch.bfloat16),
    torch.float16: ("fp16", "float16", "half", "F16", torch.float16),
    torch.float32: ("fp32", "float32", "float", "F32", torch.float32),
    torch.float64: ("fp64", "float64", "double", "F64", torch.float64),
}
SPELLED = [(dtype, name) for dtype, names in NAMES.items() for name in names]


@pytest.mark.parametrize(("dtype", "name"), SPELLED, ids=str)
def test_every_spelling_is_understood(dtype, name):
    assert to_dtype(name) == dtype and to_dtype(short_name(dtype)) == to_dtype(long_name(dtype)) == dtype


@pytest.mark.parametrize(("dtype", "name"), SPELLED, ids=str)
def test_every_option_takes_every_spelling_of_what_it_takes(dtype, name):
    files, short, long = {"base": "b", "tuned": "t"}, short_name(dtype), long_name(dtype)
    found = {
        (MergeSpec, "dtype"): (files, short),
        (MergeSpec, "precision"): (files, long),
        (ExtractSpec, "dtype"): (files | {"rank": 1}, short),
        (TrainSpec, "dtype"): ({"base": "b"}, long),
        (TrainSpec, "autocast"): ({"base": "b"}, long),
        (parameters_of("merge"), "dtype"): ({}, short),
        (parameters_of("train"), "dtype"): ({}, long),
        (parameters_of("modes"), "dtypes"): ({}, [long]),
        (parameters_of("benchmark"), "dtypes"): ({}, [short]),
    }
    taken = 0
    for (model, option), (also, expected) in found.items():
        try:
            value = getattr(model.read(also | {option: name}), option)
        except ParameterError as e:  # this option does not take the dtype, in whatever spelling
            assert option in str(e)
            continue
        assert value == expected
        taken += 1
    assert taken >= 3


def test_commands_take_every_spelling():
    assert _parser().parse_args(["models", "--dtypes", "bfloat16", "float32"]).dtypes == ["bf16", "fp32"]


@pytest.mark.parametrize("wrong", ["int8", "fp8", "", None, 32, torch.int64, ["bf16"]])
def test_what_is_no_float_is_refused_with_the_names(wrong):
    with pytest.raises(ParameterError, match="output=.*float64, float32, bfloat16, float16"):
        to_dtype(wrong, "output")
    assert len(floats()) == len(NAMES)


def test_only_those_that_an_option_may_have():
    with pytest.raises(ParameterError, match="one of float32$"):
        to_dtype("bf16", among=[torch.float32])
