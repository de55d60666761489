"""Training further: a finished training with more steps, and an adapter or a tuned state that is there."""

import json

import pytest
import torch
from tiny_training import LRS, SHORT

from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint
from rwkv_lab.errors import OutputError, ParameterError
from rwkv_lab.peft import open_adapter
from rwkv_lab.train import open_trained, plan_training, resume_path, train, verify_training
from rwkv_lab.train.optimiser import Schedule, make_optimiser, set_lr


class Interrupted(Exception):
    pass


def interrupt_at(step):
    def on_step(done, losses):
        if done == step:
            raise Interrupted

    return on_step


def tensors(path) -> dict[str, torch.Tensor]:
    with open_checkpoint(path) as ck:
        return {name: ck[name] for name in ck}


@pytest.fixture
def settings(small, texts):
    return dict(base=small, data=str(texts), **SHORT)


@pytest.mark.parametrize("kind", LRS)
def test_a_finished_training_is_continued_with_more_steps(kind, settings, tmp_path):
    settings |= {"lr": LRS[kind]}
    out = tmp_path / "out.pth"
    first = train(kind, out, **settings)
    before = tensors(out)
    further = train(kind, out, **settings | {"steps": 9}, resume=True, log_folder=tmp_path)
    assert (further.resumed_at, further.continued, len(further.losses)) == (6, 6, 3)
    assert further.bits_before == pytest.approx(first.bits_after, rel=1e-9) and further.bits_after < first.bits_before
    assert any("finished after 6 steps and is continued to 9" in note for note in further.notes)
    after = tensors(out)
    assert after.keys() == before.keys() and any(not torch.equal(after[name], before[name]) for name in after)
    assert [row["step"] for row in json.loads((tmp_path / "log.json").read_text())["steps"]] == [7, 8, 9]
    again = train(kind, out, **settings | {"steps": 12}, resume=True)
    assert again.resumed_at == 9 and not resume_path(out).exists()


def test_a_folder_is_continued_too(settings, tmp_path):
    train("lora", tmp_path / "A", **settings)
    assert train("lora", tmp_path / "A", **settings | {"steps": 8}, resume=True).resumed_at == 6


def test_the_batches_continue_where_they_ended(settings, tmp_path, monkeypatch):
    from rwkv_lab.train.batches import Windows

    drawn, draw = [], Windows.draw
    monkeypatch.setattr(Windows, "draw", lambda self, count: drawn.append(draw(self, count)) or drawn[-1])
    train("lora", tmp_path / "whole.pth", **settings | {"steps": 9})
    whole, _ = drawn[:], drawn.clear()
    train("lora", tmp_path / "out.pth", **settings)
    drawn.clear()
    train("lora", tmp_path / "out.pth", **settings | {"steps": 9}, resume=True)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[6:], drawn[6:], strict=True))


def test_what_continues_and_is_interrupted_is_resumed_bit_for_bit(settings, tmp_path):
    settings |= {"checkpoint_every": 2}
    for name in ("whole.pth", "out.pth"):
        train("lora", tmp_path / name, **settings)
    whole = train("lora", tmp_path / "whole.pth", **settings | {"steps": 12}, resume=True)
    with pytest.raises(Interrupted):
        train("lora", tmp_path / "out.pth", **settings | {"steps": 12}, resume=True, on_step=interrupt_at(9))
    resumed = train("lora", tmp_path / "out.pth", **settings | {"steps": 12}, resume=True)
    assert (resumed.resumed_at, resumed.continued) == (8, 6) and resumed.losses == whole.losses
    assert (tmp_path / "out.pth").read_bytes() == (tmp_path / "whole.pth").read_bytes()


def test_a_finished_training_is_not_begun_anew_by_accident(settings, tmp_path, small):
    out = tmp_path / "out.pth"
    train("lora", out, **settings)
    before = out.read_bytes()
    for other, words in (
        ({}, r"finished: it was trained for 6 steps.\nPass more than steps=6"),
        ({"steps": 4}, "Pass more than steps=4"),
        ({"steps": 9, "lr": 0.5}, "lr was 0.01, is 0.5.*\n.*start="),
        ({"steps": 9, "rank": 2}, "rank was 8, is 2"),
        ({"steps": 9, "data": "python"}, "data was"),
    ):
        with pytest.raises(ParameterError, match=words):
            train("lora", out, **settings | other, resume=True)
    with pytest.raises(OutputError, match="exists"):
        train("lora", out, **settings | {"steps": 9})
    assert out.read_bytes() == before
    anew = train("lora", out, **settings | {"lr": 0.5}, resume=True, overwrite=True)
    assert anew.resumed_at == anew.continued == 0
    out.write_bytes(small.read_bytes())  # a model that this training did not write
    with pytest.raises((OutputError, ParameterError)):
        train("lora", out, **settings | {"steps": 9}, resume=True)
    assert out.read_bytes() == small.read_bytes()


def test_the_rate_of_what_continues_rises_to_the_schedule_of_all_steps():
    optimiser = make_optimiser({"a": torch.zeros(2, requires_grad=True)}, Schedule(100, 5, 1.0, 0.1, 0.0))
    whole = [set_lr(optimiser, Schedule(100, 5, 1.0, 0.1, 0.0), step) for step in range(100)]
    further = [set_lr(optimiser, Schedule(100, 5, 1.0, 0.1, 0.0, begin=50), step) for step in range(50, 100)]
    assert further[4:] == whole[54:] and further[0] == pytest.approx(whole[50] / 5)


@pytest.mark.parametrize("kind", ["lora", "pissa", "miss", "state"])
def test_an_adapter_or_a_state_is_trained_further(kind, settings, tmp_path):
    """Rank, alpha, targets and how the base was stored are the file's; the base is asked for nothing else."""
    settings |= {"lr": LRS[kind], "quant": "int8"}
    own = {} if kind == "state" else {"rank": 4, "targets": ["att.key", "blocks.1.ffn.value"]}
    own |= {"alpha": 3.0} if kind == "lora" else {}
    first = train(kind, tmp_path / "a.pth", **settings | own)
    start = tmp_path / "a.pth"
    quant = {} if kind != "state" else {"quant": "int8"}
    plan = plan_training(kind, start=start, **{n: settings[n] for n in ("base", "data", "ctx_len")}, **quant)
    further = train(kind, tmp_path / "b.pth", start=start, **settings | {"steps": 4} | quant)
    assert further.bits_before == pytest.approx(first.bits_after, rel=1e-9) and further.bits_after < first.bits_after
    assert (plan.count, plan.frozen) == (further.trained, further.frozen) == (first.trained, first.frozen)
    assert start in [file.path for file in further.inputs]
    a, b = tensors(start), tensors(tmp_path / "b.pth")
    assert {n: t.shape for n, t in a.items()} == {n: t.shape for n, t in b.items()}
    assert any(not torch.equal(a[name], b[name]) for name in a)
    if kind == "lora":
        with open_adapter(tmp_path / "b.pth") as adapter:
            assert {t.alpha for t in adapter.targets.values()} == {3.0} and adapter.quant == "int8"
    assert all(check.passed for check in verify_training(plan.spec, further))
    assert open_trained(plan.spec, tmp_path / "b.pth")


def test_what_contradicts_the_adapter_is_refused(settings, tmp_path):
    start = tmp_path / "a.pth"
    train("lora", start, **settings, rank=4, targets=["att.key"], quant="nf4", train_parts=["ln"])
    before = start.read_bytes()
    for kind, given, words in (
        ("miss", {}, "is a LoRA.*'miss' was given.\nPass kind='lora'"),
        ("state", {}, "is of kind lora.*\nPass kind='lora'"),
        ("lora", {"rank": 8}, "rank=8 was given, .* states 4"),
        ("lora", {"alpha": 1.0}, "alpha=1.0 was given"),
        ("lora", {"quant": "int8"}, "quant='int8' was given, .* states 'nf4'"),
        ("lora", {"targets": ["att.value"]}, "has nothing for 'att.value'"),
        ("lora", {"targets": ["blocks.0.att.key"]}, "has blocks.1.att.key too"),
        ("lora", {"train_parts": ["emb"]}, "has nothing for 'emb'"),
        ("full", {}, "start=.* goes with state, lora, pissa, miss"),
    ):
        with pytest.raises(ParameterError, match=words):
            train(kind, tmp_path / "b.pth", start=start, **settings | given)
    agreeing = {"rank": 4, "alpha": 8.0, "quant": "nf4", "targets": ["att.key"]}
    assert train("lora", tmp_path / "b.pth", start=start, **settings | agreeing).trained
    with pytest.raises(OutputError, match="is the input"):
        train("lora", start, start=start, **settings, overwrite=True)
    with pytest.raises(ParameterError, match="base is missing"):
        train("lora", tmp_path / "c.pth", start=start, data=settings["data"])
    assert start.read_bytes() == before


def id_of(path) -> str:
    with open_checkpoint(path) as ck:
        return json.loads(ck.metadata["rwkv_lab.train"])["training"]


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "folder"])
def test_the_training_id_is_kept_by_what_is_trained_further(name, settings, tmp_path):
    first = train("lora", tmp_path / name, **settings).out
    known = id_of(first)
    train("lora", tmp_path / "again.pth", **settings | {"steps": 4})
    train("lora", tmp_path / "seed.pth", **settings, seed=1)
    assert id_of(tmp_path / "again.pth") == known != id_of(tmp_path / "seed.pth")
    train("lora", tmp_path / "further.pth", start=first, **settings | {"steps": 2, "lr": 1e-4})
    train("lora", first, **settings | {"steps": 8}, resume=True)
    assert id_of(tmp_path / "further.pth") == id_of(first) == known


def test_another_start_is_another_training(settings, tmp_path):
    for seed in (1, 2):
        train("lora", tmp_path / f"{seed}.pth", **settings, seed=seed)
    train("lora", tmp_path / "out.pth", start=tmp_path / "1.pth", **settings)
    with pytest.raises(ParameterError, match="started_from was"):
        train("lora", tmp_path / "out.pth", start=tmp_path / "2.pth", **settings | {"steps": 9}, resume=True)
    assert (
        train("lora", tmp_path / "out.pth", start=tmp_path / "1.pth", **settings | {"steps": 9}, resume=True).resumed_at
        == 6
    )


@pytest.mark.parametrize("kind", ["lora", "state"])
def test_a_start_of_another_base_is_refused_unless_allowed(kind, small, settings, tmp_path):
    train(kind, tmp_path / "A.pth", **settings)
    write_checkpoint(tmp_path / "other.pth", {name: 1.1 * t for name, t in tensors(small).items()})
    given = settings | {"base": tmp_path / "other.pth", "start": tmp_path / "A.pth"}
    with pytest.raises(ParameterError, match="was trained on .*, whose weights are not those of"):
        train(kind, tmp_path / "B.pth", **given)
    result = train(kind, tmp_path / "B.pth", allow_other_base=True, **given)
    assert "A.pth was trained on" in result.notes[0] and "has other weights" in result.notes[0]


def test_a_checkpoint_that_is_not_continued_from_is_named(settings, tmp_path):
    (tmp_path / "A.pth.resume.safetensors").write_bytes(b"of hours of training")
    result = train("lora", tmp_path / "A.pth", eval_every=500, **settings)
    assert "resume=True would have continued it" in result.notes[0]
    assert "eval_every=500: nothing is measured on the way" in result.notes[1]
