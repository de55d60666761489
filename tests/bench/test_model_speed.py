"""Rates of tiny models: every generation has them, peers too, and whoever disagrees has none."""

import json
import math
import shlex
import sys
from contextlib import nullcontext
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from models import LAYOUTS

from rwkv_lab.bench import engines, speed
from rwkv_lab.bench.__main__ import main
from rwkv_lab.bench.comparison import OURS, as_json
from rwkv_lab.bench.engines import READ, expected_answers, flops_per_token, load_model, weight_bytes
from rwkv_lab.bench.models import SHAPES, random_model
from rwkv_lab.bench.peers import Peer, PeerError, Session, open_peer, parse_peers
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


@pytest.mark.parametrize("version", ["4.0", "7.0"])
def test_a_generation_has_rates_and_shares(version, tiny, quick):
    rows, floors = measure_speed(tiny(version), "tiny", TINY)
    where = [(row.job, row.size) for row in rows]
    assert where == [("decode", 1), ("decode beside a busy loop", 1), ("decode", 3), ("prefill", 5)]
    for row in rows:
        assert len(row.samples) == 2 and row.agreement.passed and not row.problem and row.median > 0
    assert rows[0].shares.keys() == {"read floor", "FMA rate"} and rows[1].shares.keys() == {"its rate alone"}
    assert rows[0].agreement.positions == 65 and rows[2].agreement.positions == 12
    assert len(floors["read GB/s"]) == 2 * 3  # in every round of every comparison but the busy one


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


# What a peer does after it has read its task: each gives another reason, and none of them ends the others.
STRANGE = {
    "other vocabulary": ("np.save(out, np.zeros((65, 99), 'f'))", "its logits are [65, 99] of torch.float32; [65, 11]"),
    "one column": ("np.save(out, np.ones((65, 1), 'f'))", "[65, 11] of float32 are expected"),
    "whole numbers": ("np.save(out, np.ones((65, 11), int))", "its logits are [65, 11] of torch.int64"),
    "text": ("np.save(out, np.full((65, 11), 'x'))", "it wrote no logits"),
    "an empty file": ("open(out, 'w')", "it wrote no logits"),
    "another file": ("open(out, 'w').write('PK' + chr(3) + chr(4))", "it wrote no logits"),
    "null": ("print('{\"error\": null}')", "it failed without a reason"),
    "no text": ('print(\'{"error": ""}\')', "it failed without a reason"),
    "two lines": ('print(\'{"error": "one\\\\ntwo \\\\ud800"}\')', "one two ?"),
    "a list": ("print([1])", "its reply is no JSON object: [1]"),
    "no JSON": ("print('done')", "its last line is no JSON: done"),
    "deep": ("print('[' * 100000)", "its last line is no JSON: [["),
    "no UTF-8": ("sys.stdout.buffer.write(b'\\xff\\n')", "its last line is no JSON: \N{REPLACEMENT CHARACTER}"),
    "silent": ("sys.stdout = open('/dev/null', 'w')", "its last line is no JSON: no message"),
}


def test_strange_peers_are_rows_with_a_reason_and_the_rest_goes_on(tiny, quick, tmp_path):
    commands = []
    for name, (code, _) in STRANGE.items():
        before = "import json, sys, numpy as np; out = sys.argv[4]; seconds = json.dumps({'seconds': 1});"
        after = "" if "print" in code or "std" in code else "; print(seconds)"
        words = [sys.executable, "-c", f"{before} {code}{after}"]
        commands.append(f"{name}={shlex.join(words)} {{task}} {{model}} {{tokens}} {{out}}")
    plan = Plan(dtypes=("fp32",), lengths=(), batches=(1,), rounds=1, peers=tuple(parse_peers(commands)))
    rows, floors = measure_speed(tiny("7.0"), "tiny", plan)
    by = {row.engine: row for row in rows if row.job == "decode"}
    for name, (_, reason) in STRANGE.items():
        assert by[name].samples == [] and reason in by[name].problem, (name, by[name].problem)
    assert by[OURS].samples and as_json({}, floors, rows).encode()


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_peer_that_fails_in_the_middle_is_a_row_without_a_rate(tiny, quick, monkeypatch, after):
    """It answers, and `after` times more, then its process is gone."""
    expected = expected_answers(tiny("7.0"), [], 1)

    def ask(request):
        if request["task"] == "answers":
            np.save(request["out"], expected.steps)
            return {}
        asked.append(request)
        if len(asked) > after:
            raise PeerError("it ended")
        return {"seconds": 0.1}

    asked = []
    monkeypatch.setattr(engines, "open_peer", lambda *_: nullcontext(Session(ask)))
    plan = Plan(dtypes=("fp32",), lengths=(), batches=(1,), rounds=2, peers=(Peer("x", "x"),))
    rows, _ = measure_speed(tiny("7.0"), "tiny", plan)
    by = {(row.job, row.engine): row for row in rows}
    assert by["decode", "x"].problem == "it ended" and by["decode", "x"].samples == []
    assert len(by["decode", OURS].samples) == 2 and by["decode beside a busy loop", OURS].samples


@pytest.mark.parametrize("seconds", [None, True, "1", 0, -1, math.nan, math.inf, 1e-300, 10**400])
def test_seconds_that_cannot_be_are_refused(seconds):
    with pytest.raises(PeerError, match="no seconds that can be"):
        Session(lambda request: {"seconds": seconds}).seconds("decode", [1, 2], 1)


@pytest.mark.parametrize("does", ["raise SystemExit('gone')", "print([1], flush=True)", "print('{', flush=True)"])
def test_a_package_that_does_not_answer_as_it_should(tiny, monkeypatch, tmp_path, does):
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable}\nimport sys\n{does}\nsys.stdin.close()\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(PeerError, match="it ended: gone|no JSON"), open_peer(Peer("rwkv"), tiny("7.0"), "fp32"):
        pass


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


def test_llama_cpp_beside_packed_weights(tmp_path, quick):
    if find_spec("llama_cpp") is None or find_spec("gguf") is None:
        pytest.skip("llama-cpp-python is not installed")
    sizes = dict(n_layer=2, n_embd=128, dim_att=128, dim_ffn=256, vocab_size=257, n_head=2)
    layout = SHAPES["v7-0.1b"]
    random_model(tmp_path / "m.pth", type(layout)(**{**layout.__dict__, **sizes}))
    plan = Plan(dtypes=("int8", "int4"), lengths=(7,), batches=(1,), rounds=1, peers=tuple(parse_peers(["llama.cpp"])))
    rows, _ = measure_speed(tmp_path / "m.pth", "tiny", plan)
    theirs = [row for row in rows if row.engine.startswith("llama.cpp 0.")]
    assert [(row.job, row.dtype) for row in theirs] == [
        (job, dtype) for job in ("decode", "decode beside a busy loop", "prefill") for dtype in ("int8", "int4")
    ]
    assert all(row.samples and row.agreement.passed for row in theirs), [row.problem for row in theirs]
    four = measure_speed(tiny_of_4(tmp_path), "tiny", Plan(("int8",), (), (1,), 1, peers=plan.peers))[0]
    assert [row.problem for row in four if row.engine.startswith("llama")][0]


def tiny_of_4(folder):
    random_model(folder / "4.pth", type(SHAPES["v4-169m"])("4.0", 1, 32, 32, 64, 257, 0, 0))
    return folder / "4.pth"


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (["llama"], "none of 'auto'"),
        (["llama=run {model}"], "{task}"),
        (["=run {task} {model} {tokens} {out}"], "needs a name"),
        (["x=run 'a {task} {model} {tokens} {out}"], "a quote that is not closed"),
        (["rwkv_lab=run {task} {model} {tokens} {out}"], "the name 'rwkv_lab' is taken"),
        (["x=run {task} {model} {tokens} {out}", "x=go {task} {model} {tokens} {out}"], "the name 'x' is taken"),
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


def test_the_command_ends_with_an_error_where_something_of_ours_disagrees(tiny, quick, tmp_path, monkeypatch):
    monkeypatch.setitem(speed.LIMITS, "fp32", 1e-12)
    given = ["--models", str(tiny("7.0")), "--dtypes", "fp32", "--peers", "--rounds", "1", "--report", str(tmp_path)]
    with pytest.raises(SystemExit, match="NumericsError: No rate is reported .*prefill v7.0 rwkv_lab fp32"):
        main(["models", *given, "--lengths", "5", "--batches", "1", "--folder", str(tmp_path / "f")])
    assert all(row["samples"] == [] for row in json.loads((tmp_path / "models.json").read_text())["rows"])
