"""Vocabularies whose size does not tell their tokenizer: it is given, checked, and part of what a result depends on."""

import json

import numpy as np
import pytest
from tiny_training import SHORT, SIZES

from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.errors import ParameterError
from rwkv_lab.model import RWKV_Dual
from rwkv_lab.train import compare_methods, plan_training, train, verify_training
from rwkv_lab.train.__main__ import main
from rwkv_lab.train.spec import TrainSpec

TEXT = "Der Käfer saß auf der Mütze, 猫は座った, the cat sat.\n" * 400


def write_tokenizer(path, size: int) -> str:
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet)
    library.train_from_iterator([TEXT], trainer)
    library.save(str(path))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "text").write_text(TEXT)
    write_tokenizer(folder / "tokenizer.json", 280)
    write_tokenizer(folder / "larger.json", 290)
    short = SHORT | {"steps": 20, "lr": 1e-2}
    train("pretrain", folder / "base.pth", str(folder / "text"), tokenizer=folder / "tokenizer.json", **short, **SIZES)
    return folder


def test_a_fresh_model_has_the_vocabulary_of_its_tokenizer(folder, tmp_path):
    with open_checkpoint(folder / "base.pth") as ck:
        assert ck.layout.vocab_size == 280
    for tokenizer, size in (("world", 65536), ("bytes", 257), ("", 257), (str(folder / "larger.json"), 290)):
        if tokenizer == "world":
            pytest.importorskip("pyrwkv_tokenizer")
        plan = plan_training("pretrain", data=str(folder / "text"), tokenizer=tokenizer, **SIZES)
        assert plan.layout.vocab_size == size


@pytest.mark.parametrize("kind", ["full", "state", "lora"])
def test_a_tokenizer_is_asked_for_and_used(kind, folder, tmp_path):
    settings = dict(base=folder / "base.pth", data=str(folder / "text"), **SHORT)
    with pytest.raises(ParameterError, match=r"280 tokens does not tell.*\nPass tokenizer="):
        train(kind, tmp_path / "o.pth", **settings)
    tokenizer = folder / "tokenizer.json"
    result = train(kind, tmp_path / "o.pth", tokenizer=tokenizer, **settings | {"samples": True})
    assert result.bits_before < 8 and result.samples[0].prompt.startswith("Der") or result.samples
    names = ("base", "data", "ctx_len", "batch_size", "steps")
    spec = TrainSpec.read({"kind": kind, "tokenizer": tokenizer, **{n: settings[n] for n in names}})
    again = next(c for c in verify_training(spec, result) if "re-opened" in c.name)
    assert again.passed


def test_tokens_outside_the_vocabulary_are_refused(folder, tmp_path):
    settings = dict(base=folder / "base.pth", **SHORT)
    for tokenizer, words in (
        ("world", "do not belong together"),
        (str(folder / "larger.json"), "has tokens up to 289, the model only 0 to 279"),
        (str(folder / "text"), "text"),
        ("nowhere.json", "There is no tokenizer 'nowhere.json'"),
    ):
        with pytest.raises(Exception, match=words) as refusal:
            train("lora", tmp_path / "o.pth", str(folder / "text"), tokenizer=tokenizer, **settings)
        assert type(refusal.value).__module__ == "rwkv_lab.errors"
    np.save(tmp_path / "ids.npy", np.full(2000, 280))
    with pytest.raises(ParameterError, match="token 280 at position 0 is outside the model's vocabulary of 280"):
        train("lora", tmp_path / "o.pth", str(tmp_path / "ids.npy"), tokenizer=folder / "tokenizer.json", **settings)


def test_the_tokenizer_is_part_of_the_settings(folder, tmp_path):
    settings = dict(base=folder / "base.pth", data=str(folder / "text"), **SHORT)
    train("lora", tmp_path / "o.pth", tokenizer=folder / "tokenizer.json", **settings)
    same = tmp_path / "copy.json"
    same.write_bytes((folder / "tokenizer.json").read_bytes())
    assert train("lora", tmp_path / "o.pth", tokenizer=same, **settings | {"steps": 8}, resume=True).resumed_at == 6
    same.write_text(json.dumps(json.loads(same.read_text())))
    with pytest.raises(ParameterError, match="tokenizer was"):
        train("lora", tmp_path / "o.pth", tokenizer=same, **settings | {"steps": 9}, resume=True)


def test_the_command_line_takes_the_options_of_data(folder, tmp_path, capsys):
    talks = [
        {"id": i, "messages": [{"role": "user", "content": "a" * i}, {"role": "assistant", "content": "b"}]}
        for i in range(1, 40)
    ]
    (tmp_path / "talks").write_text("\n".join(map(json.dumps, talks)))
    words = ["--kind", "lora", "--base", folder / "base.pth", "--data", tmp_path / "talks", "--out", tmp_path / "o.pth"]
    words += ["--tokenizer", folder / "tokenizer.json", "--steps", "2", "--batch-size", "2", "--ctx-len", "40"]
    words = [str(word) for word in words]
    assert main(words) == 1 and 'ignore=["id"]' in capsys.readouterr().err
    assert main([*words, "--ignore", "id", "--long", "drop"]) == 0
    assert "bits per byte" in capsys.readouterr().out
    assert main([*words, "--ignore", "id", "--long", "error", "--overwrite"]) == 1
    assert "would fit all" in capsys.readouterr().err
    assert main([*words, "--ignore", "id", "--long", "split", "--start", str(tmp_path / "o.pth"), "--overwrite"]) == 1
    assert "is the input" in capsys.readouterr().err


def test_samples_are_answers_to_what_is_held_out(folder, tmp_path):
    asked = [{"question": f"How much is {i}?", "answer": "It is much."} for i in range(30)]
    (tmp_path / "asked").write_text("\n".join(map(json.dumps, asked)))
    settings = dict(base=folder / "base.pth", tokenizer=folder / "tokenizer.json", **SHORT | {"ctx_len": 64})
    result = train("lora", tmp_path / "o.pth", str(tmp_path / "asked"), **settings | {"samples": True, "steps": 2})
    assert 1 <= len(result.samples) <= 2
    for sample in result.samples:
        assert sample.prompt.startswith("User: How much is ") and sample.prompt.endswith("Assistant:")
        assert "\n\n" not in sample.before + sample.after


def test_methods_are_compared_on_the_same_data(folder, tmp_path):
    lines = [{"prompt": f"{i}+1=", "response": str(i + 1), "id": i} for i in range(20)]
    (tmp_path / "sums").write_text("\n".join(map(json.dumps, lines)))
    short = dict(steps=1, batch_size=2, ctx_len=16, tokenizer=folder / "tokenizer.json", ignore=["id"])
    found = compare_methods(folder / "base.pth", str(tmp_path / "sums"), methods=["lora", "state"], **short)
    assert [c.method for c in found] == ["lora", "state"]


def test_a_tokenizer_that_was_given_is_the_models(folder):
    model = RWKV_Dual.from_pretrained(folder / "base.pth")
    model.tokenizer = folder / "tokenizer.json"
    assert model.tokenizer.decode(model.tokenizer.encode(TEXT)) == TEXT
