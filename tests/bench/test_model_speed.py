"""Rates of tiny models: every generation has them, peers too, and whoever disagrees has none."""

import json
import math
import shlex
import sys

import numpy as np
import pytest
import torch
from models import LAYOUTS

from rwkv_lab.bench import peers as peer_room
from rwkv_lab.bench import speed
from rwkv_lab.bench.__main__ import main
from rwkv_lab.bench.engines import READ, expected_answers, flops_per_token, load_model, weight_bytes
from rwkv_lab.bench.models import SHAPES, random_model
from rwkv_lab.bench.peers import Peer, PeerError, Session, parse_peers
from rwkv_lab.bench.speed import Plan, measure_speed
from rwkv_lab.errors import ParameterError
from rwkv_lab.model import RWKV_Dual

TINY = Plan(dtypes=("fp32",), lengths=(5,), batches=(1, 3), rounds=2)

# A peer as a user would write one, less the model: it knows the answers, and tells them honestly or times a factor.
PEER = """
import json, sys, numpy as np
task, path, tokens, read, out, known, factor = sys.argv[1:]
tokens = json.load(open(tokens))
if task == "answers":
    assert len(tokens) >= int(read) and path.endswith("v7.0.pth")
    np.save(out, np.load(f"{known}/{read}.npy") * float(factor))
print("warming up")
print(json.dumps({"seconds": 0.01}))
"""


@pytest.fixture
def command(tmp_path, tiny):
    """command(1.5) -> the command of a peer whose logits are 1.5 times what they should be."""
    (tmp_path / "peer.py").write_text(PEER)
    expected = expected_answers(tiny("7.0"), [5], 1)
    np.save(tmp_path / f"{READ}.npy", expected.steps)
    np.save(tmp_path / "5.npy", expected.prefilled[5])
    start = shlex.join([sys.executable, str(tmp_path / "peer.py")])
    return lambda factor: f"{start} {{task}} {{model}} {{tokens}} {{read}} {{out}} {tmp_path} {factor}"


@pytest.mark.parametrize("version", LAYOUTS)
def test_every_generation_has_rates_and_shares(version, tiny, quick):
    rows, floors = measure_speed(tiny(version), "tiny", TINY)
    where = [(row.job, row.size) for row in rows]
    assert where == [("decode", 1), ("decode beside a busy loop", 1), ("decode", 3), ("prefill", 5)]
    for row in rows:
        assert len(row.samples) == 2 and row.agreement.passed and not row.problem and row.median > 0
    assert rows[0].shares.keys() == {"read floor", "FMA rate"} and rows[1].shares.keys() == {"its rate alone"}
    assert rows[0].agreement.positions == 65 and rows[2].agreement.positions == 12
    assert len(floors["read GB/s"]) == 2 * 3  # in every round of every contest but the busy one


def test_weights_in_8_and_4_bits_have_rates_and_what_they_lose(tiny, quick):
    rows, _ = measure_speed(tiny("7.0"), "tiny", Plan(("bf16", "int8", "int4"), (5,), (1,), rounds=1))
    decode = {row.dtype: row for row in rows if row.job == "decode"}
    assert all(row.samples and row.agreement.kl > 0 for row in decode.values())
    assert decode["int4"].agreement.error > decode["int8"].agreement.error > 0


def test_peers_by_command_and_whoever_disagrees_gets_no_rate(tiny, quick, command):
    peers = parse_peers([f"honest={command(1)}", f"wrong={command(1.5)}", "broken=false {task} {model} {tokens} {out}"])
    plan = Plan(dtypes=("fp32",), lengths=(5,), batches=(1,), rounds=1, peers=tuple(peers))
    rows, _ = measure_speed(tiny("7.0"), "tiny", plan)
    by = {(row.job, row.engine): row for row in rows}
    for job in ("decode", "prefill"):
        assert by[job, "honest"].samples and by[job, "honest"].agreement.passed
        wrong, broken = by[job, "wrong"], by[job, "broken"]
        assert wrong.samples == [] and wrong.disagrees and wrong.agreement.error == pytest.approx(0.5)
        assert "answers disagree with the reference: error 0.5" in wrong.problem
        assert broken.samples == [] and not broken.disagrees and "ended with code 1" in broken.problem
    assert by["decode beside a busy loop", "honest"].samples
    assert ("decode beside a busy loop", "wrong") not in by


ANSWERS = {  # what a peer's command does, and what its row says
    "print('{\"error\": null}')": "an error without a word",
    "print('[1]')": "no JSON object: [1]",
    "sys.stdout.buffer.write(b'\\xff\\n')": "no JSON",
    "np.save(out, np.zeros((65, 3), 'f4')); print('{}')": "its logits have shape [65, 3], the reference's [65, 11]",
    "np.save(out, np.full((65, 11), 'x')); print('{}')": "it wrote no logits",
    "np.save(out, np.ones((65, 11), int)); print('{}')": "its logits are torch.int64",
    "open(out, 'w').close(); print('{}')": "it wrote no logits",
    "print('{\"seconds\": Infinity}'); out and np.save(out, np.ones((65, 11), 'f4'))": "answers disagree",
}


@pytest.mark.parametrize("does", ANSWERS)
def test_a_peer_that_talks_nonsense_gets_a_row_that_says_so(does, tiny, quick, tmp_path):
    script = tmp_path / "peer.py"
    script.write_text(f"import sys, numpy as np\nout = sys.argv[4]\n{does}\n")
    peers = parse_peers([f"odd={sys.executable} {script} {{task}} {{model}} {{tokens}} {{out}}"])
    plan = Plan(dtypes=("fp32",), lengths=(), batches=(1,), rounds=1, peers=tuple(peers))
    rows, _ = measure_speed(tiny("7.0"), "tiny", plan)
    by = {(row.job, row.engine): row for row in rows}
    assert by["decode", "rwkv_lab"].samples and not by["decode", "odd"].samples
    assert ANSWERS[does] in by["decode", "odd"].problem


def test_a_peer_that_fails_in_the_middle_is_left_out_and_the_others_go_on(tiny, quick, monkeypatch):
    seconds, asked = Session.seconds, []

    def at_first(session, *request):
        asked.append(request)
        if len(asked) > 3:
            raise PeerError("it is tired")
        return seconds(session, *request)

    monkeypatch.setattr(Session, "seconds", at_first)
    monkeypatch.setattr(peer_room, "_run_command", lambda *_: {"seconds": 1.0})
    monkeypatch.setattr(Session, "answers", lambda session, tokens, read: right.steps)
    right = speed.expected_answers(tiny("7.0"), (), 1)
    plan = Plan(("fp32",), (), (1,), rounds=5, peers=(Peer("tired", "run"),))
    rows, _ = measure_speed(tiny("7.0"), "tiny", plan)
    by = {(row.job, row.engine): row for row in rows}
    assert len(by["decode", "rwkv_lab"].samples) == 5
    assert by["decode", "tired"].problem == "it is tired" and not by["decode", "tired"].samples


def test_our_own_wrong_answers_get_no_rate_either(tiny, quick, monkeypatch):
    right = speed.expected_answers

    def off(path, lengths, batch):
        found = right(path, lengths, batch)
        for logits in (found.steps, found.batch, *found.prefilled.values()):
            logits *= 1.01
        return found

    monkeypatch.setattr(speed, "expected_answers", off)
    rows, _ = measure_speed(tiny("6.0"), "tiny", TINY)
    assert len(rows) == 3 and all(row.disagrees and row.samples == [] for row in rows)
    assert math.isnan(rows[0].median) and rows[0].agreement.error == pytest.approx(0.01, rel=0.02)


@pytest.mark.parametrize(("version", "dtype"), [("4.0", "fp32"), ("6.0", "fp32"), ("7.0", "bf16")])
def test_the_package_rwkv(version, dtype, tmp_path, quick):
    pytest.importorskip("rwkv", reason="the PyPI package rwkv is not installed")
    layout = SHAPES[{"4.0": "v4-169m", "6.0": "v6-0.3b", "7.0": "v7-0.1b"}[version]]
    sizes = dict(n_layer=2, n_embd=128, dim_att=128, dim_ffn=256, vocab_size=300)
    sizes |= {} if version == "4.0" else dict(n_head=2)
    random_model(tmp_path / "m.pth", type(layout)(**{**layout.__dict__, **sizes}))
    plan = Plan(dtypes=(dtype,), lengths=(7,), batches=(1,), rounds=1, peers=tuple(parse_peers(["rwkv"])))
    rows, _ = measure_speed(tmp_path / "m.pth", "tiny", plan)
    theirs = [row for row in rows if row.engine.startswith("rwkv 0.")]
    assert [row.job for row in theirs] == ["decode", "decode beside a busy loop", "prefill"]
    assert all(row.samples and row.agreement.passed for row in theirs), [row.problem for row in theirs]


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (["llama"], "neither"),
        (["llama=run {model}"], "{task}"),
        (["=run {task} {model} {tokens} {out}"], "needs a name"),
        (["rwkv_lab=run {task} {model} {tokens} {out}"], "another name"),
        (["x='run {task} {model} {tokens} {out}"], "command of x cannot be read: No closing quotation"),
    ],
)
def test_peers_that_cannot_be_asked_are_refused(wanted, says):
    with pytest.raises(ParameterError, match=says):
        parse_peers(wanted)
    assert parse_peers([]) == []
    assert parse_peers(["x = run {task} {model} {tokens} {out}"]) == [Peer("x", "run {task} {model} {tokens} {out}")]


@pytest.mark.parametrize("version", LAYOUTS)
def test_random_models_are_calm_and_the_same_each_time(version, tiny, tmp_path):
    random_model(tmp_path / "again.pth", LAYOUTS[version])
    assert (tmp_path / "again.pth").read_bytes() == tiny(version).read_bytes()
    with torch.no_grad():
        logits, state = RWKV_Dual.from_pretrained(tiny(version))(torch.arange(300)[None] % 11)
    assert 0.5 < float(logits.std()) < 10 and all(x.abs().max() < 1e3 for x in (state.att_shift, state.ffn_shift))


def test_bytes_and_operations_of_a_token(tiny):
    model = load_model(tiny("7.0"), "fp32")
    C, F, V, N = 16, 64, 11, 4
    matrices = 2 * (4 * C * C + 2 * C * F + 2 * C * (4 + 3 + 5)) + 2 * C * 3 + V * C  # v only from layer 1 on
    wkv = 2 * 4 * 10 * N * N
    assert flops_per_token(model) == 2 * matrices + wkv
    assert flops_per_token(model, head=False) == flops_per_token(model) - 2 * V * C
    assert weight_bytes(model) == 4 * sum(p.numel() for p in model.parameters()) - 4 * V * C


def test_the_command_writes_json_a_table_and_figures(tiny, quick, tmp_path, capsys):
    given = ["--models", str(tiny("7.0")), "--dtypes", "fp32", "--peers", "--rounds", "1", "--report", str(tmp_path)]
    main(["models", *given, "--lengths", "5", "--batches", "1", "2", "--folder", str(tmp_path / "f")])
    content = json.loads((tmp_path / "models.json").read_text())
    assert [row["job"] for row in content["rows"]] == ["decode", "decode beside a busy loop", "decode", "prefill"]
    assert content["machine"]["threads"] == 1 and content["floors"]["FMA GFLOP/s"]["median"] == 500
    assert (tmp_path / "models-batches.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "models-rates-v7.0.png").exists() and (tmp_path / "models.md").exists()
    assert "| decode | v7.0 | 1 | rwkv_lab fp32 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["models", "--threads", "0"], "2"),
        (["wkv", "--lengths", "-5"], "2"),
        (["models", "--rounds", "many"], "2"),
        (["merge", "--lora-rank", "0"], "2"),
        (["models", "--device", "gpu9"], "ParameterError: There is no device 'gpu9'"),
        (["models", "--peers", "rwkv_lab=x {task} {model} {tokens} {out}"], "ParameterError: peers: rwkv_lab"),
        (["wkv", "--backends", "nosuch", "--rounds", "1", "--lengths", "9"], "RwkvLabError: Nothing was measured"),
    ],
)
def test_the_command_refuses_what_it_cannot_measure(given, says, quick, tmp_path):
    with pytest.raises(SystemExit, match=says):
        main([*given, "--report", str(tmp_path)])


def test_a_device_that_is_not_there_ends_the_command_at_once(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit, match="DeviceError: cuda failed"):
        main(["models", "--device", "cuda", "--report", str(tmp_path)])


def test_the_command_ends_with_an_error_where_something_of_ours_disagrees(tiny, quick, tmp_path, monkeypatch):
    monkeypatch.setitem(speed.LIMITS, "fp32", 1e-12)
    given = ["--models", str(tiny("7.0")), "--dtypes", "fp32", "--peers", "--rounds", "1", "--report", str(tmp_path)]
    with pytest.raises(SystemExit, match="NumericsError: No rate is reported .*prefill v7.0 rwkv_lab fp32"):
        main(["models", *given, "--lengths", "5", "--batches", "1", "--folder", str(tmp_path / "f")])
    assert all(row["samples"] == [] for row in json.loads((tmp_path / "models.json").read_text())["rows"])
