"""Two processes, by DistributedDataParallel and by FSDP2, train what one process trains."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from tiny_training import LRS, SHORT, SIZES, sha256

from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.train import train
from rwkv_lab.train.__main__ import main

ROOT = Path(__file__).parents[2]
CASES = [
    ("pretrain", "ddp", "none"),
    ("lora", "ddp", "nf4"),
    ("state", "ddp", "none"),
    ("pretrain", "fsdp", "none"),
    ("pissa", "fsdp", "none"),
    ("miss", "fsdp", "int8"),
    ("state", "fsdp", "none"),
]

# All cases in one start of two processes: each takes seconds to import torch.
_PROGRAM = """
import json, os, sys
import torch
torch.set_num_threads(1)
from rwkv_lab.train import train
from rwkv_lab.train.processes import started_by_torchrun
results = []
class Interrupted(Exception): pass
def interrupt(step, losses):
    if step == 3: raise Interrupted
with started_by_torchrun("cpu") as device:
    for kind, settings in json.load(open(sys.argv[1])):
        r = train(kind, device=device, **settings)
        again = settings | {"out": settings["out"] + ".again.pth"}
        try:
            train(kind, device=device, on_step=interrupt, **again)
        except Interrupted:
            resumed = train(kind, device=device, resume=True, **again)
        same = resumed.losses == r.losses and resumed.held_out == r.held_out
        results.append([r.losses, r.bits_before, r.bits_after, len(r.outputs), r.held_out, same, resumed.resumed_at])
json.dump(results, open(f"{sys.argv[1]}.{os.environ['RANK']}", "w"))
"""


def torchrun(warm, *words, **options):
    command = [warm.python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
    environment = warm.environment | {"PYTHON_EXEC": warm.python}  # by which it starts the two
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, **options)
    return done


@pytest.fixture(scope="module")
def runs(small, texts, warm, tmp_path_factory):
    """(settings, results of the first and the second process) of each case."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "program.py").write_text(_PROGRAM)
    all_settings = []
    for i, (kind, parallel, quant) in enumerate(CASES):
        settings = dict(base=str(small), data=str(texts), lr=LRS[kind], quant=quant, parallel=parallel, accumulate=2)
        settings |= dict(out=str(folder / f"{i}.pth"), **SHORT, eval_every=3, checkpoint_every=2)
        settings["gradient_checkpointing"] = kind == "pretrain"
        all_settings.append((kind, settings))
    (folder / "settings.json").write_text(json.dumps(all_settings))
    done = torchrun(warm, str(folder / "program.py"), str(folder / "settings.json"))
    assert done.returncode == 0, done.stderr[-4000:]
    results = [json.loads((folder / f"settings.json.{rank}").read_text()) for rank in (0, 1)]
    return {case: (s, *r) for case, (_, s), *r in zip(CASES, all_settings, *results, strict=True)}


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_two_processes_train_as_one_does(runs, case, tmp_path):
    kind = case[0]
    settings, first, second = runs[case]
    losses, before, after, files, held_out = first[:5]
    assert (losses, before, after) == tuple(second[:3]) and (files, second[3]) == (1, 0)
    one = train(kind, **settings | {"out": tmp_path / "one.pth"})
    # The same sums in another order: float32 rounds at 6e-8, over sums of 64 tokens and six steps.
    assert losses == pytest.approx(one.losses, rel=1e-5) and len(losses) == 6
    assert [before, after] == pytest.approx([one.bits_before, one.bits_after], rel=1e-5)
    assert [bits for _, bits in held_out] == pytest.approx([bits for _, bits in one.held_out], rel=1e-5)
    with open_checkpoint(settings["out"]) as two, open_checkpoint(one.out) as alone:
        assert list(two) == list(alone)
        for name in two:
            # AdamW divides by a gradient's own size: one that is rounding alone may move a value either way.
            apart = (two[name].float() - alone[name].float()).norm() / alone[name].float().norm().clamp_min(1e-6)
            assert apart < 1e-3, name


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_two_processes_resume_bit_for_bit(runs, case):
    settings, *each = runs[case]
    assert [found[5:] for found in each] == [[True, 2], [True, 2]]
    assert sha256(settings["out"] + ".again.pth") == sha256(settings["out"])


def test_torchrun_starts_the_module_itself(small, texts, warm, tmp_path):
    out = tmp_path / "out.pth"
    (tmp_path / "run.json").write_text(json.dumps({"kind": "lora", "base": str(small), "rank": 2, "steps": 99}))
    words = ["--data", str(texts), "--steps", "2", "--batch-size", "4", "--ctx-len", "16", "--no-samples"]
    words += ["--targets", "att.key", "att.value", "--out", str(out), "--log-folder", str(tmp_path)]
    done = torchrun(warm, "-m", "rwkv_lab.train", "--json", str(tmp_path / "run.json"), *words)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("bits per byte") == 1 and str(out) in done.stdout
    with open_checkpoint(out) as ck:
        assert ck.kind == "lora" and len(ck) == 8 and torch.isfinite(ck["blocks.0.att.key.lora_A"]).all()
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 3


def test_the_command_line_refuses_in_words(tmp_path, capsys):
    (tmp_path / "run.json").write_text('{"kidn": "lora"}')
    assert main(["--json", str(tmp_path / "run.json")]) == 1
    assert "did you mean kind?" in capsys.readouterr().err
    assert main(["--kind", "lora"]) == 1 and "out must be given" in capsys.readouterr().err
    assert main(["--kind", "lora", "--out", str(tmp_path / "x.pth")]) == 1
    assert capsys.readouterr().err.startswith("ParameterError: base is missing: kind='lora' tunes a model")
    words = ["--kind", "lora", "--base", "b.pth", "--out", str(tmp_path / "x.pth")]
    assert main([*words, "--device", "foo"]) == 1
    assert capsys.readouterr().err.startswith("ParameterError: There is no device 'foo'")
    (tmp_path / "run.json").write_text('{"steps": "3"}')
    assert main([*words, "--json", str(tmp_path / "run.json")]) == 1
    assert capsys.readouterr().err == "ParameterError: steps='3': it should be a valid integer\n"


def test_fsdp_in_one_process_says_that_it_does_nothing(tmp_path, caplog):
    result = train("pretrain", tmp_path / "o.pth", parallel="fsdp", **SHORT, **SIZES)
    assert any("parallel='fsdp' does nothing in one process" in note for note in result.notes)
    assert "does nothing in one process" in caplog.text
    assert not train("pretrain", tmp_path / "p.pth", **SHORT, **SIZES).notes
