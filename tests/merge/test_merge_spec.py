"""What `merge` takes, read into one typed object: normalised, or refused in words."""

import inspect
from pathlib import Path

import pytest
import torch

from rwkv_lab import merge
from rwkv_lab.errors import ParameterError
from rwkv_lab.merge.spec import MergeOptions, MergeSpec


def test_values_are_normalised(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    spec = MergeSpec.read(
        {
            "base": "~/base.pth",
            "tuned": Path("tuned.pth"),
            "weights": (1, 2.5),
            "pissa_init": [None, "init.pth"],
            "include": ("blocks.0",),
            "exclude": [],
            "dtype": torch.float16,
        }
    )
    assert spec.base == Path("/home/someone/base.pth") and spec.tuned == (Path.cwd() / "tuned.pth",)
    assert spec.weights == [1, 2.5] and spec.pissa_init == [None, Path.cwd() / "init.pth"]
    assert spec.include == ["blocks.0"] and spec.exclude is None
    assert spec.dtype == "fp16" and spec.output_dtype == torch.float16 and spec.recipe()["dtype"] == "float16"
    assert MergeSpec.read({"base": "a", "tuned": None}).tuned == ()


@pytest.mark.parametrize(
    "given, message",
    [
        ({"base": None}, "base=None: it should be a path"),
        ({"tuned": ["a", 3]}, "it should be a path"),
        ({"tuned": "https://host/a.pth"}, "it is an address"),
        ({"method": "linaer"}, "did you mean linear?"),
        ({"alpha": float("nan")}, "a finite number"),
        ({"weights": [1.0, float("inf")]}, "must be finite"),
        ({"alpha": {0.5}}, "numbers, texts, lists and mappings are needed"),
        ({"parameters": [1]}, "a mapping of names to values"),
        ({"include": "emb*"}, "must be a list"),
        ({"exclude": [3]}, "3 is no pattern"),
        ({"dtype": "int8"}, "'bf16', 'fp16' or 'fp32'"),
        ({"precision": "float16"}, "'float32' or 'float64'"),
        ({"allow_nonfinite": "true"}, "boolean"),
        ({"alhpa": 1}, "did you mean alpha?"),
    ],
)
def test_wrong_values_are_refused_in_words(given, message):
    with pytest.raises(ParameterError, match=message.replace("?", "[?]")):
        MergeSpec.read({"base": "a.pth", "tuned": "b.pth"} | given)


def test_a_copy_of_the_settings_is_kept():
    setting = {"*.att": [0.1]}
    spec = MergeSpec.read({"base": "a.pth", "tuned": "b.pth", "alpha": setting})
    setting["*.att"].append(2)
    assert spec.alpha == {"*.att": [0.1]}


def test_the_keywords_of_merge_are_the_fields():
    fields = [*MergeSpec.model_fields, *MergeOptions.model_fields]
    keywords = inspect.signature(merge).parameters
    assert set(keywords) == {*fields, "out"}
    for name, parameter in keywords.items():
        field = (MergeSpec.model_fields | MergeOptions.model_fields).get(name)
        if field is not None and name not in ("base", "tuned", "parameters"):
            assert parameter.default == field.default, name
    assert all(field.description for field in (MergeSpec.model_fields | MergeOptions.model_fields).values())
