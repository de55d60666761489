"""What a tuned state holds and does, against a model that runs with the state file and without."""

import math

import pytest
import torch
from random_models import make_layout, write_model
from torch.nn import functional as F
from tuned_files import write_state, write_tuned

from rwkv_lab import RWKV_Dual
from rwkv_lab.analysis import tuned_model
from rwkv_lab.analysis.state_effects import measure_state_effect, state_heads
from rwkv_lab.analysis.texts import held_out_text
from rwkv_lab.analysis.tuning import open_tuning
from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint
from rwkv_lab.errors import LayoutError


def test_the_effect_is_that_of_running_with_the_state_and_without(base, tmp_path):
    path = write_state(tmp_path / "s.pth", base)
    with open_tuning(base, path) as t:
        found = measure_state_effect(t, "english", texts=1, length=100)
    model = RWKV_Dual.from_pretrained(base).requires_grad_(False)
    tokens = torch.tensor(model.tokenizer.encode(held_out_text("english")))[None, :101]
    logits = [model.parallel(tokens[:, :-1], s)[0][0] for s in (model.create_state(1, tuned=path), None)]
    tuned, plain = (x.double().log_softmax(1) for x in logits)
    kl = F.kl_div(plain, tuned, reduction="none", log_target=True).sum(1) / math.log(2)
    # Both ways round logits in float32; a KL is of second order in what differs.
    torch.testing.assert_close(found.kl_bits[0], kl, rtol=1e-4, atol=1e-9)
    saved = (F.cross_entropy(logits[1], tokens[0, 1:]) - F.cross_entropy(logits[0], tokens[0, 1:])) / math.log(2)
    assert float(found.bits_saved.mean()) == pytest.approx(float(saved), abs=1e-5)
    assert found.measured and found.source == "held-out text of the corpus 'english'" and found.checks == []


def test_heads(base, tmp_path):
    with open_checkpoint(write_state(tmp_path / "s.pth", base)) as ck:
        states = {n: ck[n] for n in ck}
    states["blocks.1.att.time_state"][1] = torch.outer(torch.arange(16.0), torch.ones(16))  # one direction
    write_checkpoint(tmp_path / "t.pth", states)
    with open_tuning(base, tmp_path / "t.pth") as t:
        found = state_heads(t)
    assert found.state.shape == (2, 2, 16, 16) and found.full_rank == 16
    expected = torch.stack(list(states.values())).double()
    assert torch.equal(found.state, expected)
    torch.testing.assert_close(found.norms, expected.square().sum((2, 3)).sqrt())
    assert float(found.effective_ranks[1, 1]) == pytest.approx(1) and 8 < float(found.effective_ranks[0, 0]) < 16


def test_random_tokens_where_the_vocabulary_tells_no_tokenizer(tmp_path):
    base = write_model(tmp_path / "b.safetensors", make_layout("6.0"))
    with open_tuning(base, write_state(tmp_path / "s.pth", base)) as t:
        found = measure_state_effect(t, texts=2, length=5)
    assert "drawn at random" in found.source and found.kl_bits.shape == (2, 5) and bool((found.kl_bits > 0).all())


def test_a_tuning_without_a_state_is_refused(base, tmp_path):
    with open_tuning(base, write_tuned(tmp_path / "t.pth", base, "lora")) as t:
        for measure in (state_heads, measure_state_effect):
            with pytest.raises(LayoutError, match="t.pth holds no tuned state"):
                measure(t)


def test_a_model_that_does_not_fit_into_memory(base, tmp_path, monkeypatch):
    monkeypatch.setattr(tuned_model, "memory_free", lambda: 1000)
    with open_tuning(base, write_state(tmp_path / "s.pth", base)) as t:
        found = measure_state_effect(t)
        assert state_heads(t).norms.shape == (2, 2)  # needs no model
    assert not found.measured and "of memory" in found.checks[0].reason
