"""A word, a number, or words with commas serve where a list is meant; examples in messages are of the parameter."""

import json
import shlex
from typing import Any

import pytest
import torch
from models import random_lora, random_model

from rwkv_lab.errors import ParameterError
from rwkv_lab.merge import MergeOptions, run_merge
from rwkv_lab.workbench.fields import field_for
from rwkv_lab.workbench.parameters import read_parameters
from rwkv_lab.workbench.registry import notebook_names, parameters_of
from rwkv_lab.workbench.words import advice_in_words

OWN = {"base": "/b.pth", "tuned": "/t.pth"}


def as_papermill_has_it(word: str) -> Any:
    """What `papermill -p name word` gives."""
    from papermill.cli import _resolve_type

    return _resolve_type(word)


def read(notebook: str, **words: Any) -> Any:
    model = parameters_of(notebook)
    return read_parameters(model, {n: as_papermill_has_it(w) for n, w in words.items()}, names_are_all=True)


def refusal(notebook: str, values: dict[str, Any]) -> str:
    with pytest.raises(ParameterError) as caught:
        read_parameters(parameters_of(notebook), values, names_are_all=True)
    assert len(str(caught.value).splitlines()) <= 3
    return str(caught.value)


LISTS = [
    ("merge", "include", "blocks.0.*", ["blocks.0.*"]),
    ("merge", "exclude", "emb, head", ["emb", "head"]),
    ("merge", "include", "blocks.[0,1].*,emb", ["blocks.[0,1].*", "emb"]),
    ("merge", "include", '["blocks.0.*", "emb"]', ["blocks.0.*", "emb"]),
    ("merge", "include", "['emb']", ["emb"]),
    ("merge", "include", "[ab]*", ["[ab]*"]),
    ("merge", "allow_extra", "blocks.*.att.x", ["blocks.*.att.x"]),
    ("merge", "include", "None", []),
    ("merge", "include", "", []),
    ("merge", "weights", "0.5,1e-4", [0.5, 1e-4]),
    ("merge", "weights", "1", [1.0]),
    ("train", "ignore", "id,source", ["id", "source"]),
    ("merge", "ignore", "id,source", ["id", "source"]),
    ("peft", "ignore", "meta*", ["meta*"]),
    ("merge", "data", "mine.txt,english", ["mine.txt", "english"]),
    ("train", "targets", "att.key,ffn.key", ["att.key", "ffn.key"]),
    ("train", "train_parts", "emb", ["emb"]),
    ("peft", "targets", "att.key", ["att.key"]),
    ("modes", "dtypes", "bf16", ["bfloat16"]),
    ("modes", "dtypes", "float32,half", ["float32", "float16"]),
    ("modes", "backends", "reference", ["reference"]),
    ("benchmark", "backends", "reference,chunked", ["reference", "chunked"]),
    ("benchmark", "dtypes", "bfloat16,int8", ["bf16", "int8"]),
    ("benchmark", "lengths", "64", [64]),
    ("benchmark", "batches", "1, 8", [1, 8]),
    ("benchmark", "peers", "auto", ["auto"]),
    ("export", "quantization_level", "none,int8", ["none", "int8"]),
    ("chat", "stop", "one,two", ["one", "two"]),
]


@pytest.mark.parametrize(("notebook", "name", "word", "value"), LISTS)
def test_a_word_serves_where_a_list_is_meant(notebook, name, word, value):
    also = {"kind": "lora"} if notebook == "train" else {}
    assert getattr(read(notebook, **{name: word}, **also), name) == value


@pytest.mark.parametrize(("word", "value"), [(3, 3), ("A text.,another", ["A text.", "another"]), ("one", ["one"])])
def test_a_number_or_words_serve_where_a_number_or_a_list_is_meant(word, value):
    assert read("export", test_input_samples=word).test_input_samples == value


def test_every_list_of_every_notebook_is_among_them():
    lists = {(n, name) for n in notebook_names() for name, f in parameters_of(n).model_fields.items()
             if isinstance(f.default, list)}  # fmt: skip
    assert lists <= {(notebook, name) for notebook, name, *_ in LISTS}


def test_several_files_are_words_with_commas(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tuned = read("merge", base="/b.pth", tuned="A.pth,B.pth").tuned
    assert tuned == [str(tmp_path / "A.pth"), str(tmp_path / "B.pth")]
    assert read("merge", base="/b.pth", tuned="A.pth").tuned == str(tmp_path / "A.pth")
    assert read("merge", **OWN, pissa_init="/a.pth,/b.pth").pissa_init == ["/a.pth", "/b.pth"]
    assert read("peft", pissa_init="/a.pth,/b.pth").pissa_init == ["/a.pth", "/b.pth"]


def test_a_file_that_is_there_is_one_word_whatever_its_name(tmp_path):
    (tmp_path / "step,100.pth").write_bytes(b"")
    assert read("merge", base="/b.pth", tuned=str(tmp_path / "step,100.pth")).tuned == str(tmp_path / "step,100.pth")


def test_a_mapping_may_be_json():
    assert read("merge", **OWN, parameters='{"density": 0.3}').parameters == {"density": 0.3}
    assert "-y" in refusal("merge", {"parameters": "density"})


@pytest.mark.parametrize(
    ("notebook", "values", "example"),
    [
        ("merge", {"include": {"a": 1}}, "-p include 'blocks.0.*'"),
        ("merge", {"exclude": True}, "-p exclude emb,head"),
        ("merge", {"weights": True}, "-p weights 0.5,0.5"),
        ("train", {"kind": "lora", "targets": {}}, "-p targets att.key,ffn.key"),
        ("modes", {"dtypes": {}}, "-p dtypes float64,float32,bfloat16"),
        ("modes", {"backends": {}}, "-p backends reference"),
        ("benchmark", {"lengths": {}}, "-p lengths 64,256"),
        ("benchmark", {"peers": {}}, "-p peers auto"),
    ],
)
def test_the_example_in_a_message_is_accepted(notebook, values, example):
    message = refusal(notebook, values)
    assert example in message
    name, word = shlex.split(message[message.index("-p ") :])[1:3]
    kind = {"kind": "lora"} if notebook == "train" else {}
    assert getattr(read(notebook, **kind, **{name: word}), name)


@pytest.mark.parametrize(("notebook", "needed"), [("merge", "density"), ("peft", "use_rslora")])
def test_the_example_of_a_mapping_is_the_parameters_own(notebook, needed):
    message = refusal(notebook, {"parameters": 3})
    assert needed in json.loads(shlex.split(message[message.index("-y ") :])[1])["parameters"]


@pytest.mark.parametrize(
    ("name", "word", "value"),
    [
        ("alpha", "4,0", [4.0, 0.0]),
        ("alpha", "4,None", [4.0, None]),
        ("alpha", "[4, 0]", [4.0, 0.0]),
        ("alpha", "4", 4.0),
        ("alpha", "", None),
        ("alpha", '{"blocks.0.*": 1, "*": 2}', {"blocks.0.*": 1, "*": 2}),
        ("weights", '{"blocks.0.*": 0.5}', {"blocks.0.*": 0.5}),
        ("weights", '[{"blocks.0.*": 0.5}, 1]', [{"blocks.0.*": 0.5}, 1.0]),
    ],
)
def test_numbers_that_differ_by_file_or_by_tensor(name, word, value):
    found = read("merge", **OWN, **{name: word})
    assert getattr(found, name) == value
    field = field_for(name, type(found).model_fields[name])
    field.value = value  # as the panel has it
    assert getattr(found.changed(**{name: field.value}), name) == value


@pytest.mark.parametrize("name", ["alpha", "weights"])
def test_a_mapping_that_is_no_json_is_told_how_to_be_given(name):
    message = refusal("merge", {name: "{blocks.0.*: 1}"})
    given = json.loads(shlex.split(message[message.index("-y ") :])[1])
    assert isinstance(getattr(parameters_of("merge").read({**OWN, **given}), name), dict)


def test_a_list_of_alphas_is_merged(tmp_path):
    torch.save(random_model(), tmp_path / "base.pth")
    for seed in (1, 2):
        torch.save(random_lora(seed=seed, full=False), tmp_path / f"{seed}.pth")
    tuned = ",".join(str(tmp_path / f"{seed}.pth") for seed in (1, 2))
    spec = read("merge", base=str(tmp_path / "base.pth"), tuned=tuned, alpha="4,0").spec()
    result = run_merge(spec, tmp_path / "o.pth", MergeOptions.read({}))
    assert any("2.pth adds nothing" in note for note in result.notes)
    by_pattern = read("merge", base=str(tmp_path / "base.pth"), tuned=tuned, alpha="4", weights='[{"*": 0.5}, 1]')
    assert by_pattern.spec().weights == [{"*": 0.5}, 1.0]


NAMES = ("ignore", "tokenizer", "alpha", "parameters")


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ('a: b\nPass ignore=["id", "meta"] to leave them out', "a: b\nPass -p ignore id,meta to leave them out"),
        (
            "Put it there, or pass ignore=['*d'] to leave it out.",
            "Put it there, or pass -p ignore '*d' to leave it out.",
        ),
        ('Pass ignore=["a"] or ignore=["b"].', "Pass -p ignore a or -p ignore b."),
        ("Pass tokenizer='world' or a path.", "Pass -p tokenizer world or a path."),
        ("pass alpha=0.5.", "pass -p alpha 0.5."),
        ("Pass parameters={'unmerge': True}.", """Pass -y '{"parameters": {"unmerge": true}}'."""),
        ("pass alpha= (16, 32)", "pass alpha= (16, 32)"),
        ("pass other=3", "pass other=3"),
        ("ignore=['a'] has no effect", "ignore=['a'] has no effect"),
    ],
)
def test_advice_says_what_to_pass_to_papermill(message, words):
    assert advice_in_words(message, NAMES) == words


def test_nothing_is_said_of_papermill_where_python_is_written():
    with pytest.raises(ParameterError) as caught:
        read_parameters(parameters_of("merge"), {"include": {}, "dry_run": "true"}, names_are_all=False)
    assert "papermill" not in str(caught.value) and "-p " not in str(caught.value)


@pytest.mark.parametrize(
    ("notebook", "name", "word", "advice"),
    [
        ("train", "quant", "None", "makes a value of the word None: -r quant keeps it as text; leave quant out"),
        ("merge", "tuned", "True", "makes a value of the word True: -r tuned keeps it as text"),
        ("train", "data", "5", "of text that looks like a number: -r data keeps it as text"),
        ("train", "steps", "1e3", "without a fraction or an exponent: -p steps 1000"),
        ("benchmark", "lengths", "", "lengths=.*: it is empty"),
    ],
)
def test_advice_fits_the_value_that_was_given(notebook, name, word, advice):
    with pytest.raises(ParameterError, match=advice):
        read(notebook, **{name: word})
