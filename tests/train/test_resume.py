"""An interrupted training goes on as if it had never stopped, and its checkpoint is refused where it does not fit."""

import json
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from tiny_training import LRS, SHORT, sha256

from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint
from rwkv_lab.errors import CorruptFileError, NumericsError, ParameterError
from rwkv_lab.model import RWKV_Dual
from rwkv_lab.train import load_corpus, resume_path, train
from rwkv_lab.train.batches import in_batches

ROOT = Path(__file__).parents[2]
QUANTS = {"lora": "nf4", "miss": "int8", "state": "int8"}


class Interrupted(Exception):
    pass


def interrupt_at(step):
    def on_step(done, losses):
        if done == step:
            raise Interrupted

    return on_step


@pytest.fixture
def settings(small, texts):
    return dict(base=small, data=str(texts), **SHORT, checkpoint_every=3, accumulate=2, eval_every=2)


def interrupted(kind, out, settings, at=4):
    """Stop a training after step 4; its checkpoint is of step 3."""
    with pytest.raises(Interrupted):
        train(kind, out, **settings, on_step=interrupt_at(at))
    assert resume_path(out).exists() and not out.exists()


@pytest.mark.parametrize("kind", LRS)
def test_resumed_is_as_never_stopped_bit_for_bit(kind, settings, tmp_path):
    settings |= dict(lr=LRS[kind], quant=QUANTS.get(kind, "none"))
    whole = train(kind, tmp_path / "whole.pth", **settings)
    out = tmp_path / "out.pth"
    interrupted(kind, out, settings)
    resumed = train(kind, out, **settings, resume=True, log_folder=tmp_path)
    assert resumed.resumed_at == 3 and whole.resumed_at == 0
    assert resumed.losses == whole.losses and resumed.held_out == whole.held_out
    assert resumed.bits_before == whole.bits_before and resumed.bits_after == whole.bits_after
    with open_checkpoint(out) as a, open_checkpoint(whole.out) as b:
        assert list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)
    assert not resume_path(out).exists()
    assert [row["step"] for row in json.loads((tmp_path / "log.json").read_text())["steps"]] == [1, 2, 3, 4, 5, 6]


def test_a_killed_process_is_resumed(settings, warm, tmp_path):
    """SIGKILL right after the second checkpoint, by the process itself: nothing is tidied up."""
    whole = train("lora", tmp_path / "whole.pth", **settings | {"checkpoint_every": 2})
    program = (
        "import os, signal, torch; torch.set_num_threads(1)\n"
        "from rwkv_lab.train import train\n"
        f"settings = {settings | {'base': str(settings['base']), 'checkpoint_every': 2}!r}\n"
        "kill = lambda step, losses: step == 5 and os.kill(os.getpid(), signal.SIGKILL)\n"
        f"train('lora', {str(tmp_path / 'out.pth')!r}, on_step=kill, **settings)\n"
    )
    done = subprocess.run([warm.python, "-c", program], env=warm.environment, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.pth.resume.safetensors", "whole.pth"]
    resumed = train("lora", tmp_path / "out.pth", **settings | {"checkpoint_every": 2}, resume=True)
    assert resumed.resumed_at == 4 and resumed.losses == whole.losses
    assert sha256(resumed.out) == sha256(whole.out)


def test_examples_are_resumed_where_they_were(small, tmp_path):
    lines = [json.dumps({"prompt": f"{i}+1=", "response": str(i + 1)}) for i in range(10)]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines))
    settings = dict(base=small, data=str(tmp_path / "sums.jsonl"), **SHORT | {"batch_size": 5}, checkpoint_every=3)
    whole = train("lora", tmp_path / "whole.pth", **settings)
    interrupted("lora", tmp_path / "out.pth", settings)
    assert train("lora", tmp_path / "out.pth", **settings, resume=True).losses == whole.losses
    assert sha256(tmp_path / "out.pth") == sha256(whole.out)


def test_the_best_values_outlive_an_interruption(settings, tmp_path):
    """Held-out text unlike the other gets worse and worse; the checkpoint has to bring the best values along."""
    strange = tmp_path / "strange.txt"
    strange.write_text("zqxj" * 2300 + "the cat sat on 3 mats; " * 44)
    settings |= dict(data=str(strange), patience=3, eval_every=1, steps=12, accumulate=1)
    whole = train("lora", tmp_path / "whole.pth", **settings)
    assert whole.stopped_early and len(whole.losses) < 12
    best = min(bits for _, bits in whole.held_out)
    assert whole.bits_after == pytest.approx(best, rel=1e-12)
    stops = len(whole.losses)
    interrupted("lora", tmp_path / "out.pth", settings, at=stops - 1)
    resumed = train("lora", tmp_path / "out.pth", **settings, resume=True)
    assert resumed.held_out == whole.held_out and resumed.bits_after == whole.bits_after


def test_without_a_checkpoint_resume_begins_at_the_beginning(settings, tmp_path):
    whole = train("lora", tmp_path / "whole.pth", **settings)
    assert train("lora", tmp_path / "out.pth", **settings, resume=True).losses == whole.losses


def test_other_settings_are_named(settings, tmp_path, texts):
    out = tmp_path / "out.pth"
    interrupted("lora", out, settings)
    for other, words in (
        ({"lr": 0.5}, "lr was 0.01, is 0.5"),
        ({"rank": 2}, "rank was 8, is 2"),
        ({"data": "python"}, "data was .*text was"),
        ({"steps": 7}, "steps was 6, is 7"),
    ):
        with pytest.raises(ParameterError, match=words):
            train("lora", out, **settings | other, resume=True)
    assert resume_path(out).exists() and not out.exists()


def test_what_is_no_such_checkpoint_is_refused(settings, tmp_path):
    out = tmp_path / "out.pth"
    write_checkpoint(resume_path(out), {"x": torch.zeros(1)})
    with pytest.raises(CorruptFileError, match="remove it"):
        train("lora", out, **settings, resume=True)
    resume_path(out).write_bytes(b"\0" * 100)
    with pytest.raises(CorruptFileError):
        train("lora", out, **settings, resume=True)


A = "blocks.0.att.key.lora_A"
DAMAGE = [
    (lambda note, t: t.pop(f"optimiser/exp_avg/{A}"), f"exp_avg/{A} was added or lost"),
    (lambda note, t: [t.pop(name) for name in list(t) if name.startswith("optimiser/")], "was added or lost"),
    (lambda note, t: t.pop("data/generator"), "data/generator was added or lost"),
    (lambda note, t: (t.pop("data/generator"), note["tensors"].remove("data/generator")), "cannot resume from it"),
    (lambda note, t: t.update({"data/generator": torch.zeros(3, dtype=torch.uint8)}), "cannot resume from it"),
    (lambda note, t: t.update({f"optimiser/exp/{A}": torch.zeros(1)}), "was added or lost"),
    (lambda note, t: rename(note, t, f"optimiser/exp_avg/{A}", f"optimiser/exp/{A}"), "is not known"),
    (lambda note, t: t.update({f"optimiser/exp_avg/{A}": torch.zeros(2, 2)}), r"is \[2, 2\], not \[8, 32\]"),
    (lambda note, t: t.update({f"optimiser/step/{A}": torch.zeros(2)}), r"is \[2\], not \[\]"),
    (lambda note, t: t.update({f"trained/{A}": torch.zeros(2, 2)}), r"not \[8, 32\]"),
    (lambda note, t: t.pop(f"trained/{A}"), "was added or lost"),
    (lambda note, t: note.pop("settings"), "no checkpoint of an unfinished training"),
    (lambda note, t: note.update(settings=3), "no checkpoint of an unfinished training"),
    (lambda note, t: note["course"].update(step="a"), "'a' of 6 steps"),
    (lambda note, t: note["course"].update(step=99), "99 of 6 steps"),
    (lambda note, t: note["course"].update(step=2), "3 losses"),
    (lambda note, t: note["course"].pop("losses"), "lacks losses"),
    (lambda note, t: note["course"].update(losses=["a"] * 3), "its losses"),
    (lambda note, t: note["course"].update(held_out=[3]), "its held_out"),
    (lambda note, t: note["course"].update(best="a"), "its measurements"),
    (lambda note, t: note["course"].update(scaler=[]), "its scaler"),
]


def rename(note, tensors, old, new):
    tensors[new] = tensors.pop(old)
    note["tensors"][note["tensors"].index(old)] = new


def test_a_damaged_checkpoint_is_refused_in_words(settings, tmp_path):
    out, key = tmp_path / "out.pth", "rwkv_lab.train.resume"
    settings |= {"targets": ["blocks.0.att.key"]}
    interrupted("lora", out, settings)
    path = resume_path(out)
    whole = path.read_bytes()
    for damage, words in DAMAGE:
        path.write_bytes(whole)
        with open_checkpoint(path) as ck:
            tensors, note = {name: ck[name] for name in ck}, json.loads(ck.metadata[key])
        damage(note, tensors)
        write_checkpoint(path, tensors, {key: json.dumps(note)}, overwrite=True)
        with pytest.raises(CorruptFileError, match=words):
            train("lora", out, **settings, resume=True)
    path.write_bytes(whole)
    assert train("lora", out, **settings, resume=True).resumed_at == 3


def test_a_damaged_order_of_examples_is_refused(small, tmp_path):
    lines = [json.dumps({"prompt": f"{i}+1=", "response": str(i + 1)}) for i in range(10)]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines))
    rows = in_batches(load_corpus(str(tmp_path / "sums.jsonl")), RWKV_Dual.from_pretrained(small).tokenizer, 16, 0)
    rows.draw(2)
    good = rows.position()
    for damage in ({"order": good["order"] + 1}, {"order": good["order"][:3]}, {"next": torch.tensor([99])}):
        with pytest.raises(ValueError, match="there are"):
            rows.resume_from(good | damage)
    rows.resume_from(good)


def test_a_loss_that_is_nan_stops_and_keeps_the_last_good_checkpoint(settings, tmp_path, monkeypatch):
    from rwkv_lab.train import fitting

    calls, nats = [], fitting.nats

    def broken(logits, targets):
        calls.append(1)
        return nats(logits, targets) * (float("nan") if len(calls) > 8 else 1.0)

    monkeypatch.setattr(fitting, "nats", broken)
    out = tmp_path / "out.pth"
    with pytest.raises(NumericsError, match="NaN|nan") as refusal:
        train("lora", out, **settings)
    assert resume_path(out).name in str(refusal.value) and not out.exists()
    with open_checkpoint(resume_path(out)) as ck:
        assert all(ck[name].isfinite().all() for name in ck if name.startswith("trained/"))
    monkeypatch.setattr(fitting, "nats", nats)
    assert train("lora", out, **settings, resume=True).resumed_at == 3
