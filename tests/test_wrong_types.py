"""Wrong values for every argument of every public function: nothing but errors of our tree, or a right answer.

`public_calls.py` has a valid call of each; here one argument at a time is exchanged for what it cannot be.
"""

import contextlib
import inspect
import io
import math
import re
import warnings
from pathlib import Path

import pytest
import torch
from public_calls import INTERNAL, World, calls, public
from random_rwkv7 import make_model

from rwkv_lab import merge, open_checkpoint
from rwkv_lab.analysis.texts import held_out_text
from rwkv_lab.arguments import check, checked
from rwkv_lab.convert import convert
from rwkv_lab.errors import OutputError, ParameterError, RwkvLabError
from rwkv_lab.merge import merge_recipe
from rwkv_lab.model import RWKV_Dual, generate, load_state, load_tokenizer
from rwkv_lab.peft import open_adapter
from rwkv_lab.train import load_corpus, train


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def valid(world) -> dict:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return {call.name: call for call in calls(world)}


def wrong_values(folder: Path) -> dict[str, object]:
    return {
        "None": None,
        "object": object(),
        "negative": -1,
        "zero": 0,
        "nan": math.nan,
        "infinity": math.inf,
        "large": 2**62,
        "larger": 2**70,
        "True": True,
        "no text": "",
        "text": "x",
        "zero byte": "a\0b",
        "address": "https://x/y.pth",
        "bytes": b"x\xff",
        "empty list": [],
        "list": [object()],
        "empty dict": {},
        "dict": {"x": 1},
        "whole numbers": torch.tensor([[1, 2]]),
        "complex": torch.zeros(3, 2, dtype=torch.complex64),
        "empty tensor": torch.zeros(0),
        "module": math,
        "folder": folder,
        "folder as text": str(folder),
        "missing": str(folder / "nothing.pth"),
    }


def parameters(function) -> list[inspect.Parameter]:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p for p in inspect.signature(function).parameters.values() if p.kind not in variadic]


def outcome(function, arguments: dict) -> BaseException | None:
    """What a call raises; a context manager is entered too."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("error")
            result = function(**arguments)
            if hasattr(result, "gen"):
                with result:
                    pass
    except Exception as e:
        return e
    return None


NAMES = [name for name, found in public() if name not in INTERNAL]


@pytest.mark.parametrize("name", NAMES)
def test_wrong_values_end_in_errors_of_our_tree(name, valid, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # "x" is a good name of an output
    found = []
    for call in (c for c in valid.values() if c.name.split(".")[0] == name):
        for parameter in parameters(call.function):
            for kind, value in wrong_values(world.folder).items():
                e = outcome(call.function, {**call.arguments, parameter.name: value})
                if e is not None and not isinstance(e, RwkvLabError):
                    found.append(f"{call.name}({parameter.name}={kind}): {type(e).__name__}: {str(e)[:100]}")
                elif e is not None and len(str(e).splitlines()) > 3:
                    found.append(f"{call.name}({parameter.name}={kind}): more than three lines: {e}")
    assert not found, "\n".join(found)


def test_every_public_function_has_a_valid_call(valid):
    for call in valid.values():
        needed = [p.name for p in parameters(call.function) if p.default is p.empty]
        assert not set(needed) - set(call.arguments), f"public_calls.py: state a valid call of {call.name}"
        e = outcome(call.function, call.arguments) if call.arguments else None  # those without make demo models
        assert e is None or isinstance(e, RwkvLabError), f"{call.name}: {e!r}"


@pytest.mark.parametrize(
    ("hint", "fine", "wrong", "words"),
    [
        (int, [1, torch.tensor(3)], [1.0, True, "1", None, 2**70], "whole number"),
        (float, [1, 2.5], [math.nan, math.inf, "1", True, 1j], "finite number"),
        (str | Path, ["a", Path("a")], ["", "a\0", 3, "https://x"], "path|address"),
        (list[str], [["a"], ("a",), []], ["a", [1], {"a": 1}, None], "list|holds"),
        (dict[str, int], [{"a": 1}, {}], [{"a": "b"}, {1: 1}, [1]], "dict|each name|must be a whole"),
        (bool | None, [True, None], [1, "True"], "True or False or None"),
        (torch.device | str, ["cpu", torch.device("cpu")], ["", "gpu", 1.0], "device"),
    ],
)
def test_what_an_annotation_takes(hint, fine, wrong, words):
    for value in fine:
        check("f", "x", value, hint)
    for value in wrong:
        with pytest.raises(ParameterError, match=f"f: x=.*({words})"):
            check("f", "x", value, hint)


def test_a_call_without_an_argument_has_pythons_own_message():
    @checked
    def f(x: int) -> int:
        return x

    with pytest.raises(TypeError, match="missing 1 required"):
        f()
    assert f(3) == 3


def test_a_missing_file_is_named_with_what_is_near(world):
    with pytest.raises(ParameterError, match=r"no file .*bsae.pth; did you mean base.pth"):
        RWKV_Dual.from_pretrained(world.folder / "bsae.pth")
    with pytest.raises(ParameterError, match="of its folders there is only .*world"):
        RWKV_Dual.from_pretrained(world.folder / "a/b/c.pth")


def test_a_mask_given_for_lengths_is_explained(world):
    with pytest.raises(ParameterError, match=r"mask.sum\(1\)"):
        world.model.prefill(world.tokens, lengths=torch.ones(1, 2, dtype=torch.bool))


@pytest.mark.parametrize("name", ["bf16", "bfloat16", "fp16", "float16", "fp32", "float32", "torch.float32"])
def test_dtypes_by_name(name, world):
    model = RWKV_Dual.from_pretrained(world.base, dtype=name)
    assert str(model.emb.weight.dtype)[6:8] == {"b": "bf", "f": "fl", "t": "fl"}[name[0]]
    assert world.state.to(dtype=name).att_shift.dtype == model.emb.weight.dtype


def test_a_file_that_is_missing_is_one_kind_of_error_everywhere(world, tmp_path):
    (tmp_path / "text.txt").write_text("words " * 2000)
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    out, text, base = tmp_path / "o.pth", str(tmp_path / "text.txt"), str(world.base)
    training = dict(base=base, steps=1, batch_size=1, ctx_len=8)
    uses = {
        "open_checkpoint": open_checkpoint,
        "from_pretrained": RWKV_Dual.from_pretrained,
        "merge, base": lambda path: merge(path, world.base, out),
        "merge, tuned": lambda path: merge(world.base, path, out),
        "recipe": lambda path: merge_recipe(path, out),
        "load_state": lambda path: load_state(path, world.model),
        "create_state": lambda path: world.model.create_state(tuned=path),
        "load_tokenizer": load_tokenizer,
        "convert": lambda path: convert(path, "pth", out),
        "open_adapter": open_adapter,
        "train, base": lambda path: train("full", out, text, **(training | {"base": path})),
        "train, data": lambda path: train("full", out, path, **training),
        "train, data as a path": lambda path: train("full", out, Path(path), **training),
        "train, tokenizer": lambda path: train("full", out, text, tokenizer=path, **training),
        "train, template": lambda path: train("full", out, text, template=path, **training),
        "train, start": lambda path: train("lora", out, text, start=path, **training),
        "load_corpus": load_corpus,
        "held_out_text": held_out_text,
    }
    cases = {
        str(tmp_path / "txet.txt"): "here is no file .*txet.txt; did you mean text.txt",
        str(tmp_path / "no/such.x"): f"here is no file .*such.x: of its folders there is only {tmp_path}",
        str(tmp_path / "link"): "here is no file .*link: it is a link to nothing",
        str(tmp_path / "Z.txt"): r"here is no file [^;]*Z.txt(?!; did)",  # the suffix alone is not near
    }
    for name, use in uses.items():
        for path, words in cases.items():
            with pytest.raises(ParameterError) as refusal:
                use(path)
            assert re.search(words, str(refusal.value)), (name, str(refusal.value))


def test_a_folder_that_cannot_be_made_is_named(world, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(OutputError, match="file.* cannot be made"):
            make_model(n_embd=32, n_layer=1, head_size=16).save_pretrained(folder)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(stop=5), "stop=5: it must be a text or None or a list, each a text"),
        (dict(stop={"a": 1}), "stop=.*it must be a text or texts"),
        (dict(stop_tokens="x"), "stop_tokens='x': it must be a whole number or a list, each a whole number"),
        (dict(top_k=10**30), r"top_k=10+: it is outside -2\^63 to 2\^63 - 1"),
        (dict(top_k=-(10**30)), r"top_k=-10+: it is outside -2\^63 to 2\^63 - 1"),
        (dict(stop_tokens=[10**30]), r"it holds 10+; it is outside -2\^63"),
    ],
)
def test_what_is_wrong_with_a_value_is_what_the_message_says(world, given, words):
    with pytest.raises(ParameterError, match=words):
        generate(world.model, "abc", **given)
