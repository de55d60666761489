"""The options of a training: what they accept, what they normalise, what they refuse."""

import inspect
from pathlib import Path
from typing import get_args

import pytest

from rwkv_lab.errors import ParameterError
from rwkv_lab.peft.settings import QUANTS
from rwkv_lab.train import plan_training, train
from rwkv_lab.train.spec import KINDS, TrainOptions, TrainSpec


def test_every_keyword_of_train_is_an_option_and_every_option_a_keyword():
    keywords = inspect.signature(train).parameters
    assert set(keywords) == {"out", *TrainSpec.model_fields, *TrainOptions.model_fields}
    assert not set(TrainSpec.model_fields) & set(TrainOptions.model_fields)
    for model in (TrainSpec, TrainOptions):
        for name, field in model.model_fields.items():
            assert field.description and name != "out"
            default = keywords[name].default
            if default is not inspect.Parameter.empty:
                given = {"kind": "pretrain", name: default} if model is TrainSpec else {name: default}
                assert getattr(model.read(given), name) == field.get_default(call_default_factory=True), name


def test_what_python_callers_give_is_normalised():
    spec = TrainSpec.read(
        dict(kind="lora", base=Path("b.pth"), targets=("att.key",), train_parts=None, lr="1e-3", accumulate=None)
    )
    assert (spec.base, spec.targets, spec.train_parts, spec.lr, spec.accumulate) == (
        "b.pth",
        ["att.key"],
        [],
        0.001,
        1,
    )
    assert TrainSpec.read(dict(kind="pretrain", base=None)).base == ""
    assert TrainOptions.read(dict(log_folder=Path("log"))).log_folder == "log"


def test_the_kinds_own_values_stand_where_none_is_given():
    spec = TrainSpec.read(dict(kind="lora", base="b.pth", steps=7)).resolved()
    assert (spec.data, spec.steps, spec.batch_size, spec.ctx_len, spec.lr, spec.rank) == (
        "python",
        7,
        8,
        128,
        1e-2,
        8,
    )
    assert TrainSpec.read(dict(kind="pretrain")).resolved().rank is None
    assert spec.resolved() == spec


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(kind="lroa"), "it should be one of pretrain, full, state, lora, pissa, miss; did you mean lora?"),
        (dict(kidn="lora"), "did you mean kind?"),
        (dict(kind="state"), "base is missing"),
        (dict(kind="pretrain", warmup=801), "from 0 to the 800 steps"),
        (
            dict(kind="pretrain", targets=["att.key"]),
            "goes with lora, pissa, miss; kind='pretrain' takes no targets",
        ),
        (dict(kind="pretrain", base="a\0b"), "zero byte"),
        (dict(kind="pretrain", device="meta"), "device='meta'"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(values, words):
    with pytest.raises(ParameterError) as refused:
        TrainSpec.read(values)
    assert words in str(refused.value)


def test_every_word_of_quant_is_taken():
    for word in QUANTS:
        assert TrainSpec.read({"kind": "lora", "base": "b", "quant": word}).quant == word
    with pytest.raises(ParameterError, match="did you mean int8"):
        TrainSpec.read({"kind": "lora", "base": "b", "quant": "int9"})


@pytest.mark.parametrize("name", ["dtype", "autocast"])
def test_the_dtypes_that_are_offered_are_taken(name):
    for word in get_args(TrainSpec.model_fields[name].annotation):
        if (name, word) != ("autocast", "float16"):  # of CUDA only
            spec = TrainSpec.read({"base": "b", name: word})
            assert str(spec.torch_dtype if name == "dtype" else spec.autocast_dtype).endswith(word or "None")


def test_the_help_on_kinds_names_all_of_them():
    described = TrainSpec.model_fields["kind"].description
    assert described.split(":")[0].replace(" or ", ", ").split(", ") == list(KINDS)


def test_options_that_would_do_nothing_are_refused(tmp_path):
    for given, words in (({"base": "B.pth", "n_embd": 64}, "n_embd=64 is of a fresh model, and B.pth has its own"),):
        with pytest.raises(ParameterError, match=words):
            TrainSpec.read({"kind": "full", **given})
    assert TrainSpec.read({"kind": "pretrain", "n_embd": 64}).n_embd == 64
    assert TrainSpec.read({"kind": "full", "base": "B.pth", "data": tmp_path}).data == str(tmp_path)
    for given in ({"ignore": ["id"]}, {"template": "mine.json"}):
        with pytest.raises(ParameterError, match="is for records, and python is text"):
            plan_training("pretrain", n_embd=32, data="python", **given)
