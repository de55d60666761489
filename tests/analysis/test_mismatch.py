"""Where two runs part: shown on copies that were broken on purpose."""

import copy
from dataclasses import replace

import pytest
import torch
from random_models import load_model
from random_rwkv7 import make_model, make_tokens

from rwkv_lab import wkv
from rwkv_lab.analysis.agreement import Execution, compare_modes
from rwkv_lab.analysis.mismatch import explain_failures, first_mismatch
from rwkv_lab.errors import ParameterError
from rwkv_lab.model import RWKVMode

TOKENS = make_tokens(2, 70)


def break_the_chunked_decay(monkeypatch, factor=1.01):
    right = wkv._FORMS["wkv7"]["chunked"]
    broken = lambda r, w, *rest: right(r, w * factor, *rest)  # noqa: E731
    monkeypatch.setitem(wkv._FORMS["wkv7"], "chunked", broken)


@pytest.mark.parametrize(
    "version, weight, name",
    [
        ("4.0", "blocks.1.att.time_decay", "blocks.1.att.w"),
        ("4.0", "blocks.1.att.time_first", "blocks.1.att.y"),
        ("4.0", "blocks.0.ffn.receptance.weight", "blocks.0.ffn.r"),
        ("5.0", "blocks.1.att.key.weight", "blocks.1.att.k"),
        ("5.1", "blocks.0.att.gate.weight", "blocks.0.att.g"),
        ("5.2", "blocks.1.att.value.weight", "blocks.1.att.v"),
        ("5.2", "blocks.1.att.ln_x.weight", "blocks.1.att.out"),
        ("6.0", "blocks.1.att.time_decay_w2", "blocks.1.att.w"),
        ("6.0", "blocks.0.att.time_faaaa", "blocks.0.att.y"),
        ("6.0", "blocks.1.ffn.key.weight", "blocks.1.ffn.k"),
    ],
)
def test_a_changed_weight_of_every_generation_is_traced_to_its_operator(version, weight, name, tmp_path):
    good = load_model(tmp_path, version)
    bad = copy.deepcopy(good)
    parameter = bad.get_parameter(weight)
    parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    tokens = make_tokens(2, 30, vocab_size=70)
    found = first_mismatch(Execution(good), Execution(bad), tokens)
    assert found.name == name and found.token <= 1 and f"in layer {name[7]}," in str(found)


def test_a_wrong_decay_in_one_form_is_found_and_placed(monkeypatch):
    model = make_model(n_layer=3)
    break_the_chunked_decay(monkeypatch)
    both = ["reference", "chunked"]
    rows = compare_modes(model, TOKENS, dtypes=[torch.float32], modes=[RWKVMode.TRANSFORMER], backends=both)
    assert [(row.backend, row.verdict) for row in rows] == [("reference", "PASS"), ("chunked", "FAIL")]
    found = first_mismatch(Execution(model, backend="reference"), Execution(model, backend="chunked"), TOKENS)
    # The first token reads a state of zeros, so its decay cannot matter.
    assert (found.name, found.layer, found.token) == ("blocks.0.att.y", 0, 1)
    assert "layer 0" in str(found) and "WKV operator" in str(found) and "token 1 " in str(found)


def test_modes_that_part_late_are_caught_at_that_token(monkeypatch):
    model = make_model(dtype=torch.float64)
    model.set_mode(RWKVMode.RNN)
    right = wkv._FORMS["wkv7"]["chunked"]

    def forgets_at_40(r, w, k, v, a, b, state):
        w = w.clone()
        w[:, 40:41] -= 0.5
        return right(r, w, k, v, a, b, state)

    monkeypatch.setitem(wkv._FORMS["wkv7"], "chunked", forgets_at_40)
    found = first_mismatch(Execution(model, RWKVMode.RNN), Execution(model, RWKVMode.TRANSFORMER), TOKENS)
    assert (found.name, found.token) == ("blocks.0.att.y", 40)
    assert model.mode is RWKVMode.RNN


@pytest.mark.parametrize(
    "weight, name",
    [
        ("emb.weight", "blocks.0.x"),
        ("blocks.1.ln1.weight", "blocks.1.att.x"),
        ("blocks.2.att.receptance.weight", "blocks.2.att.r"),
        ("blocks.1.att.w2", "blocks.1.att.w"),
        ("blocks.1.att.v0", "blocks.1.att.v"),
        ("blocks.1.att.key.weight", "blocks.1.att.kk"),
        ("blocks.0.att.k_a", "blocks.0.att.k"),
        ("blocks.1.att.g1", "blocks.1.att.g"),
        ("blocks.1.att.output.weight", "blocks.1.att.out"),
        ("blocks.1.att.r_k", "blocks.1.att.out"),
        ("blocks.1.ln2.bias", "blocks.1.ffn.x"),
        ("blocks.0.ffn.x_k", "blocks.0.ffn.k"),
        ("blocks.2.ffn.value.weight", "blocks.2.ffn.out"),
        ("head.weight", "logits"),
    ],
)
def test_a_changed_weight_is_traced_to_its_operator(weight, name):
    good = make_model(n_layer=3)
    bad = copy.deepcopy(good)
    parameter = bad.get_parameter(weight)  # noise, not a factor: norms take factors out again
    parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    found = first_mismatch(Execution(good), Execution(bad), TOKENS)
    assert found.name == name and found.token <= 1  # a token shift acts from the second token on
    assert first_mismatch(Execution(good), Execution(copy.deepcopy(good)), TOKENS) is None


def test_one_bad_row_of_the_embedding_is_placed_at_the_token_that_uses_it():
    good = make_model()
    bad = copy.deepcopy(good)
    bad.emb.weight.data[TOKENS[0, 33]] = torch.linspace(-1, 1, 64)
    first_use = int((TOKENS == TOKENS[0, 33]).any(0).nonzero()[0])
    found = first_mismatch(Execution(good), Execution(bad), TOKENS)
    assert (found.name, found.token) == ("blocks.0.x", first_use)


def test_nan_is_a_mismatch():
    good = make_model()
    bad = copy.deepcopy(good)
    bad.blocks[1].att.a0.data[..., 3] = float("nan")
    assert first_mismatch(Execution(good), Execution(bad), TOKENS).name == "blocks.1.att.a"


def test_failures_are_explained_once_per_mode_and_backend(monkeypatch):
    model, dtypes = make_model(dtype=torch.float64), [torch.float32, torch.bfloat16]
    right = wkv._FORMS["wkv7"]["chunked"]
    monkeypatch.setitem(wkv._FORMS["wkv7"], "chunked", lambda r, w, *rest: right(r, 1.5 * w, *rest))
    rows = compare_modes(model, TOKENS, dtypes, backends=["reference", "chunked"])
    found = explain_failures(model, TOKENS, rows)
    assert [(failure.row.mode, failure.row.backend) for failure in found] == [(mode, "chunked") for mode in RWKVMode]
    assert all(failure.row.dtype == torch.float32 and failure.beside == "float64" for failure in found)
    assert all(failure.mismatch.name == "blocks.0.att.y" and "in layer 0" in failure.where for failure in found)


def test_a_mode_that_fails_is_laid_beside_the_first_run_of_its_dtype():
    model = make_model()
    rows = compare_modes(model, TOKENS, [torch.float32], backends=["reference"])
    wrong = replace(rows[1], logits_apart=1.0)  # its run agrees, so that no tensor inside is off
    (found,) = explain_failures(model, TOKENS, [rows[0], wrong])
    assert found.beside == "float32, transformer, reference" and found.mismatch is None
    assert found.where == "No tensor inside is off by 2e-05 at any token: small errors of all layers add up."


def test_other_layouts_are_refused():
    with pytest.raises(ParameterError, match="2 layers"):
        first_mismatch(Execution(make_model()), Execution(make_model(n_layer=3)), TOKENS)
