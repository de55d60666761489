"""Training: what it learns, what it leaves alone, what it writes and what it refuses."""

import os
import shutil
from dataclasses import replace

import pytest
import torch
from tiny_training import sha256

from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.errors import OutputError, ParameterError
from rwkv_lab.model import RWKV_Dual, bits_per_byte
from rwkv_lab.train import TrainSpec, demo_base, demo_folder, demo_state, load_corpus, train
from rwkv_lab.train.__main__ import main
from rwkv_lab.train.optimiser import make_optimiser, schedule, set_lr

SHORT = dict(steps=60, batch_size=4, ctx_len=32, lr=1e-2)
TINY = SHORT | dict(n_embd=32, n_layer=2, head_size=16)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny pretrained model and the result that came with it."""
    return train("pretrain", out=tmp_path_factory.mktemp("base") / "base.pth", **TINY)


def test_pretraining_learns_and_reports_what_it_measured(base):
    assert base.bits_after < base.bits_before - 1  # an untrained model needs 8 bits
    assert base.bits_before == pytest.approx(8.0, abs=0.5)
    assert len(base.losses) == 60 and base.losses[-1] < base.losses[0]
    model = RWKV_Dual.from_pretrained(base.out)
    assert base.bits_after == pytest.approx(bits_per_byte(model, load_corpus("english").held_out, 32), rel=1e-6)
    assert base.frozen == 0 and base.trained == sum(p.numel() for p in model.parameters())
    assert [s.prompt for s in base.samples] == ["The ", "If the value of "]
    assert base.outputs[0].bytes == base.out.stat().st_size and base.inputs == []
    assert set(base.seconds) == {"data", "before", "training", "after", "total"}


def test_the_same_arguments_write_the_same_file(base, tmp_path):
    again = train("pretrain", out=tmp_path / "again.pth", **TINY)
    assert sha256(again.out) == sha256(base.out) and again.losses == base.losses
    assert sha256(train("pretrain", out=tmp_path / "other.pth", seed=1, **TINY).out) != sha256(base.out)


def test_training_leaves_the_callers_random_numbers_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train("pretrain", out=tmp_path / "m.pth", **(TINY | {"steps": 1}))
    assert torch.equal(torch.rand(3), expected)


def test_state_tuning_trains_the_states_and_nothing_else(base, tmp_path):
    before = sha256(base.out)
    settings = dict(base=base.out, steps=40, batch_size=4, ctx_len=32, lr=0.3)
    tuned = [train("state", tmp_path / name, **settings) for name in ("one.pth", "two.pth")]
    assert sha256(base.out) == before and sha256(tuned[0].out) == sha256(tuned[1].out)
    assert tuned[0].bits_after < tuned[0].bits_before
    assert tuned[0].trained == 2 * 32 * 16 and tuned[0].frozen == base.trained
    assert tuned[0].inputs == base.outputs
    with open_checkpoint(tuned[0].out) as ck:
        assert ck.kind == "state"
        assert sorted(ck.info) == [f"blocks.{i}.att.time_state" for i in range(2)]
        assert all(ck[name].shape == (2, 16, 16) and ck[name].dtype == torch.float32 for name in ck.info)
    model = RWKV_Dual.from_pretrained(base.out)
    model.load_state_file(tuned[0].out)
    held_out = load_corpus("python").held_out
    assert tuned[0].bits_after == pytest.approx(bits_per_byte(model, held_out, 32), rel=1e-6)


def test_pretraining_from_a_base_starts_where_it_ended(base, tmp_path):
    longer = train("pretrain", out=tmp_path / "m.safetensors", base=base.out, **(SHORT | {"steps": 5, "lr": 1e-3}))
    assert longer.bits_before == pytest.approx(base.bits_after, rel=1e-6)


def test_refusals_come_before_any_work(base, tmp_path):
    free = tmp_path / "new.pth"
    cases = [
        (dict(kind="lroa", out=free), ParameterError, "pretrain, full, state, lora"),
        (dict(kind="state", out=free), ParameterError, "base="),
        (dict(kind="pretrain", out=free, steps=0), ParameterError, "steps=0"),
        (dict(kind="pretrain", out=free, lr=-1.0), ParameterError, "lr=-1"),
        (dict(kind="pretrain", out=free, dtype="fp8"), ParameterError, "bfloat16"),
        (dict(kind="pretrain", out=free, data="no such thing"), ParameterError, "english, python"),
        (dict(kind="pretrain", out=tmp_path / "m.bin"), ParameterError, ".pth"),
        (dict(kind="pretrain", out=base.out), OutputError, "exists"),
    ]
    for arguments, error, words in cases:
        with pytest.raises(error, match=words):
            train(**arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_the_base_or_the_text_is_refused(base, tmp_path, capsys):
    vic, text = tmp_path / "vic.pth", tmp_path / "tx.txt"
    shutil.copy(base.out, vic)
    text.write_text("the cat sat on a mat; " * 600)
    (tmp_path / "soft.pth").symlink_to(vic)
    (tmp_path / "hard.pth").hardlink_to(vic)
    (tmp_path / "text.pth").hardlink_to(text)
    (tmp_path / "b.pth.resume.safetensors").hardlink_to(vic)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    for name in ("vic.pth", "soft.pth", "hard.pth", "text.pth", "b.pth"):
        with pytest.raises(OutputError, match="inputs are never written to"):
            train("lora", tmp_path / name, str(text), vic, steps=1, overwrite=True)
    words = ["--kind", "lora", "--base", str(vic), "--data", str(text), "--out", str(vic), "--overwrite"]
    assert main(words) == 1 and capsys.readouterr().err.startswith("OutputError: ")
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_folder_of_other_things_is_not_replaced(base, tmp_path):
    texts, held = tmp_path / "texts", tmp_path / "held"
    texts.mkdir()
    for i in range(3):
        (texts / f"{i}.txt").write_text(f"the cat sat on {i} mats; " * 50)
    held.mkdir()
    shutil.copy(base.out, held / "base.pth")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "notes")
    (tmp_path / "plain").write_text("x")
    (tmp_path / "a.pth").mkdir()
    for out, words in (
        (texts, "never written to"),
        (texts / "new", "lies in"),
        (held, "holds the input"),
        (tmp_path / "notes", "mine.txt"),
        (tmp_path / "link", "no folder of its own"),
        (tmp_path / "plain", "no folder of its own"),
        (tmp_path / "a.pth", "is a folder"),
    ):
        with pytest.raises(OutputError, match=words):
            train("lora", out, str(texts), held / "base.pth", steps=1, overwrite=True)
    assert len(list(texts.iterdir())) == 3 and (held / "base.pth").exists() and not list(tmp_path.glob(".*"))
    again = dict(base=held / "base.pth", steps=1, batch_size=1, ctx_len=8, samples=False, overwrite=True)
    for _ in range(2):  # one of its own is replaced
        assert train("lora", tmp_path / "ours", str(texts), **again).out.is_dir()


def test_parameter_groups_and_schedule():
    model = RWKV_Dual(32, 2, 257, head_size=16)
    over = schedule(TrainSpec.read(dict(kind="pretrain", steps=100, lr=1.0)))
    optimiser = make_optimiser(dict(model.named_parameters()), over)
    groups = {(g["weight_decay"], g["factor"]): g["params"] for g in optimiser.param_groups}
    assert {id(p) for p in groups[0.0, 2.0]} == {id(b.att.w0) for b in model.blocks}
    assert id(model.head.weight) in {id(p) for p in groups[0.1, 1.0]}
    assert id(model.blocks[0].att.w1) in {id(p) for p in groups[0.0, 1.0]}
    assert sum(map(len, groups.values())) == len(list(model.parameters()))
    rates = [set_lr(optimiser, over, step) for step in range(100)]
    assert max(rates) == 1.0 and rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and rates[-1] < 0.03
    assert [set_lr(optimiser, replace(over, warmup=0), step) for step in (0, 99)] == pytest.approx([1, 0.02], abs=1e-3)


def test_demo_files_are_trained_once_where_the_environment_says(tmp_path, monkeypatch, caplog):
    from rwkv_lab.train import demo

    calls = []

    def quick(kind, out, base=None):
        calls.append(kind)
        return train(kind, out, base=base, **(SHORT | ({} if base else TINY) | {"steps": 2}))

    monkeypatch.setenv("RWKV_LAB_DEMO", str(tmp_path / "d"))
    monkeypatch.setattr(demo, "train", quick)
    assert demo_folder() == tmp_path / "d"
    state, base = demo_state(), demo_base()
    assert state == demo_state() and calls == ["pretrain", "state"]
    assert {state.name, base.name} < set(os.listdir(tmp_path / "d"))
    assert "once; the time left is stated" in caplog.text and "is ready" in caplog.text
