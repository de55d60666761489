"""Recipes in mergekit's spelling: the same as the arguments they stand for, and mergekit's own results."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from models import LAYOUTS, random_model, same

from rwkv_lab import merge
from rwkv_lab.checkpoint import Layout
from rwkv_lab.errors import CorruptFileError, ParameterError
from rwkv_lab.merge import merge_recipe, verify_merge
from rwkv_lab.merge.recipe import read_recipe

LAYERS = 4
LAYOUT = Layout("7.0", LAYERS, 16, 16, 64, 11, 4, 4, LAYOUTS["7.0"].ranks)


@pytest.fixture
def files(tmp_path):
    base, way = random_model(LAYOUT, torch.float32), random_model(LAYOUT, torch.float32, seed=9)
    for i, name in enumerate(("base", "one", "two")):
        g = torch.Generator().manual_seed(i)
        # Partly the same way from the base: model_stock stays at the base where fine-tunes turn from each other.
        torch.save({n: t + bool(i) * (0.2 * way[n] + 0.1 * torch.randn(t.shape, generator=g)) for n, t in base.items()},
                   tmp_path / f"{name}.pth")  # fmt: skip
    return tmp_path


def written(folder: Path, text: str) -> Path:
    (folder / "recipe.yml").write_text(text)
    return folder / "recipe.yml"


MODELS = """
base_model: base.pth
models:
  - model: base.pth
  - model: one.pth
    parameters: {weight: 0.5, density: 0.4}
  - model: two.pth
    parameters: {weight: 2e-1}
parameters: {density: 0.7, lambda: 1.5, int8_mask: true}
dtype: float32
"""
LINEAR = """
merge_method: linear
models:
  - {model: base.pth, parameters: {weight: 1}}
  - {model: one.pth, parameters: {weight: 0.5}}
"""
SLERP = """
merge_method: slerp
base_model: base.pth
slices:
  - sources:
      - {model: base.pth, layer_range: [0, 4]}
      - {model: one.pth, layer_range: [0, 4]}
parameters:
  t:
    - {filter: att, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: ffn, value: [1, 0.5, 0]}
    - value: 0.5
"""
STACK = """
merge_method: passthrough
slices:
  - sources: [{model: one.pth, layer_range: [0, 3]}]
  - sources: [{model: base.pth, layer_range: [1, 4]}]
dtype: bfloat16
"""
BOTH = ["base.pth", "one.pth", "two.pth"]
MEANT = {
    LINEAR: (BOTH[:2], {"method": "linear", "weights": [1, 0.5]}),
    SLERP: (
        BOTH[:2],
        {
            "method": "slerp",
            "alpha": {"*att*": {"gradient": [0, 0.5, 0.3, 0.7, 1]}, "*ffn*": {"gradient": [1, 0.5, 0]}, "*": 0.5},
        },
    ),
    "merge_method: task_arithmetic" + MODELS: (BOTH, {"weights": [0.5, 0.2], "alpha": 1.5, "dtype": "fp32"}),
    "merge_method: ties" + MODELS: (
        BOTH,
        {"weights": [0.5, 0.2], "alpha": 1.5, "parameters": {"density": [0.4, 0.7]}, "dtype": "fp32"},
    ),
    "merge_method: dare_ties" + MODELS: (
        BOTH,
        {
            "weights": [0.5, 0.2],
            "alpha": 1.5,
            "parameters": {"density": [0.4, 0.7], "normalize": False},
            "dtype": "fp32",
        },
    ),
    "merge_method: model_stock\nbase_model: base.pth\nmodels: [{model: one.pth}, {model: two.pth}]": (BOTH, {}),
    STACK: (["one.pth", "base.pth"], {"parameters": {"layers": ["base[0:3]", "tuned[1:4]"]}, "dtype": "bf16"}),
}


@pytest.mark.parametrize("text", MEANT, ids=lambda text: re.search(r"merge_method: (\w+)", text)[1])
def test_a_recipe_is_what_its_arguments_are(text, files, monkeypatch):
    names, given = MEANT[text]
    given = {"method": re.search(r"merge_method: (\w+)", text)[1]} | given
    result = merge_recipe(written(files, text), files / "o.pth")
    assert all(c.passed for c in (*result.checks, *verify_merge(result)))
    base, *tuned = [files / n for n in names]
    merge(base, tuned, files / "p.pth", **given)
    one, other = (torch.load(files / n, weights_only=True) for n in ("o.pth", "p.pth"))
    assert list(one) == list(other) and all(same(t, other[n]) for n, t in one.items())
    monkeypatch.chdir("/")
    merge_recipe(files / "recipe.yml", files / "o.pth", overwrite=True, precision="float64")  # paths are its own


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("merge_method: karcher\nmodels: [{model: one.pth}]", "'karcher'; known here are linear"),
        ("models: [{model: one.pth}]", "merge_method is None"),
        ("merge_method: ties", "one of models and slices"),
        (LINEAR + "slices: []", "one of models and slices"),
        (LINEAR + "merge_methd: x", "did you mean merge_method"),
        (LINEAR.replace("weight: 0.5", "wieght: 0.5"), "wieght=0.5.*not known"),
        (LINEAR.replace("parameters: {weight: 0.5}", "parameters: {}"), "weight is missing"),
        (LINEAR.replace("weight: 0.5", "weight: much"), "a number is needed"),
        (LINEAR.replace("one.pth", "base.pth"), "stands in it twice"),
        (LINEAR.replace("one.pth", "one.pth+lora"), "merge the LoRA first"),
        (LINEAR.replace("one.pth", "[1]"), "a path is needed"),
        (LINEAR + "dtype: int4", "dtype='int4'"),
        (LINEAR + "parameters: {normalize: 3}", "True or False"),
        (SLERP.replace("base_model: base.pth", ""), "needs base_model"),
        (SLERP.replace("filter: att", "filter: self_attn"), "att and ffn"),
        (SLERP.replace("filter: att", "filter: attn"), "matches none"),
        (SLERP.replace("    - value: 0.5", ""), "for what no filter fits"),
        (SLERP.replace("[0, 4]", "[0, 2]"), r"mixed are all layers, \[0, 4\]"),
        (SLERP.replace("[0, 4]", "all"), "layer_range"),
        (SLERP.replace("value: [1, 0.5, 0]", "vale: 1"), "a filter and a value"),
        (STACK.replace("[0, 3]", "[0, 9]"), "layers 0 to 3"),
        (STACK + "parameters: {scale: 0.5}", "scale=0.5"),
        (LINEAR.replace("parameters: {weight: 0.5}", "weight: 0.5"), "'weight' is not known here in an entry"),
        (LINEAR.replace("one.pth,", "one.pth, density: 0.1,"), "'density' is not known here in an entry"),
        (LINEAR.replace("one.pth,", "one.pth, layer_range: [0, 4],"), "'layer_range' is not known here in an entry"),
        (SLERP.replace("[0, 4]}", "[0, 4], t: 1}"), "'t' is not known here in an entry"),
        (STACK.replace("[0, 3]}", "[0, 3], scale: 2}"), "'scale' is not known here in an entry"),
        (
            STACK.replace("sources: [{model: base", "scale: 2, sources: [{model: base")
            .replace("- scale", "- {scale")
            .replace("[1, 4]}]", "[1, 4]}]}"),
            "'scale' is not known here in a slice",
        ),
        (LINEAR.replace("one.pth", "{path: one.pth, weight: 2}"), "'weight' is not known here in the name"),
        (LINEAR.replace("weight: 0.5", "weight: 0.5, weight: 1"), "'weight' stands twice in one mapping, .*line 5"),
        (LINEAR + "merge_method: linear", "'merge_method' stands twice"),
        (LINEAR.replace("linear", "[linear]"), r"merge_method is \['linear'\]"),
        (LINEAR + "dtype: [bfloat16]", r"dtype=\['bfloat16'\]"),
        (LINEAR + "dtype: ''", "dtype=''"),
        (SLERP.replace("filter: att", "filter: [att]"), "is no text"),
        ("- 1\n- 2", "holds no mapping"),
        ("merge_method: linear\nmodels: 3", "a list of mappings"),
        (
            "merge_method: ties" + MODELS.replace("int8_mask", "rescale"),
            "rescale=True",
        ),
    ],
)
def test_recipes_that_cannot_be_meant(text, said, files):
    with pytest.raises(ParameterError, match=said) as caught:
        merge_recipe(written(files, text), files / "o.pth")
    assert str(caught.value).count("\n") < 3 and not (files / "o.pth").exists()


@pytest.mark.parametrize(
    "text",
    ["a: [", "a: !!python/object/apply:os.getcwd []", "\0", "a: &a [*a]" * 3, "a: &a {b: *a}", "a: 2026-02-30", ""],
)
def test_a_file_that_is_no_recipe(text, files):
    with pytest.raises((CorruptFileError, ParameterError)):
        merge_recipe(written(files, text), files / "o.pth")


def test_files_that_are_not_there_and_options_given_twice(files):
    with pytest.raises(ParameterError, match="no file .*no.yml"):
        merge_recipe(files / "no.yml", files / "o.pth")
    with pytest.raises(ParameterError, match="no file .*: it is a folder"):
        read_recipe(files)
    with pytest.raises(ParameterError, match="no file .*none.pth"):
        merge_recipe(written(files, LINEAR.replace("one.pth", "none.pth")), files / "o.pth")
    with pytest.raises(ParameterError, match="method is in the recipe"):
        merge_recipe(written(files, LINEAR), files / "o.pth", method="slerp")
    assert read_recipe(written(files, LINEAR)).base == files / "base.pth"


COMPARED = {
    "linear": {"weight": [1.0, 0.5, 0.3]},
    "slerp": {"t": 0.3},
    "task_arithmetic": {"weight": [0.5, 0.2], "lambda": 1.5},
    "ties": {"weight": [0.5, 0.2], "density": [0.4, 0.7]},
    "dare_ties": {"weight": [0.5, -0.2]},  # at density 1: its random numbers are others
    "dare_linear": {"weight": [0.5, 0.2], "normalize": True},
    "model_stock": {},
}


@pytest.mark.parametrize("method", COMPARED)
def test_mergekit_itself_gives_the_same_tensors(method, files):
    api = pytest.importorskip("mergekit.merge_methods.api", reason="mergekit is not installed")
    names, given = BOTH[:2] if method == "slerp" else BOTH, COMPARED[method]
    counted = names if method == "linear" else names[1:]
    each = {k: dict(zip(counted, v, strict=True)) for k, v in given.items() if isinstance(v, list)}
    shared = {k: v for k, v in given.items() if k not in each}
    entries = [{"model": n, "parameters": {k: v[n] for k, v in each.items() if n in v}} for n in names]
    recipe = {"merge_method": method, "base_model": "base.pth", "models": entries, "dtype": "float32"}
    merge_recipe(written(files, json.dumps(recipe | {"parameters": shared})), files / "o.pth")
    models = {n: torch.load(files / n, weights_only=True) for n in names}
    base = None if method == "linear" else "base.pth"
    wanted = api.merge_state_dicts(models, method, parameters=each | shared, base=base)
    for name, tensor in torch.load(files / "o.pth", weights_only=True).items():
        # Both are float32: a few roundings of values of size 1 to 4.
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=2e-6)


def test_mergekit_reads_filters_and_gradients_the_same_way(files):
    config = pytest.importorskip("mergekit.config", reason="mergekit is not installed")
    from mergekit.merge_methods.api import merge_tensors

    merge_recipe(written(files, SLERP), files / "o.pth")
    asked = config.MergeConfiguration.model_validate(yaml.safe_load(SLERP)).parameters["t"]
    base, one = (torch.load(files / n, weights_only=True) for n in BOTH[:2])
    for name, tensor in torch.load(files / "o.pth", weights_only=True).items():
        layer = int(name.split(".")[1]) if name.startswith("blocks.") else 0
        t = config.evaluate_setting(name, asked, layer / (LAYERS - 1), validate=float)
        wanted = merge_tensors([base[name], one[name]], "slerp", parameters={"t": t}, base_index=0)
        torch.testing.assert_close(tensor, wanted, rtol=1e-6, atol=2e-6)


def test_anchors_and_merged_mappings_are_no_repetition(files):
    text = """
merge_method: linear
models:
  - &first {model: base.pth, parameters: &own {weight: 1}}
  - <<: *first
    model: one.pth
  - {model: two.pth, parameters: {<<: *own, weight: 3}}
"""
    assert read_recipe(written(files, text)).weights == [1, 1, 3]
