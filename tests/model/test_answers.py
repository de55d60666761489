"""The model's logits and states against people who computed them without us."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy_rwkv7 import NumpyRwkv7
from random_rwkv7 import add_random_time_state, make_model, make_tokens, relative_rms

from rwkv_lab.checkpoint import write_checkpoint
from rwkv_lab.model import RWKV_Dual, RWKVMode

MODES = list(RWKVMode)
MODELS = Path(__file__).parents[2].parent / "shared" / "models"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("n_embd, head_size", [(32, 32), (64, 32), (64, 64), (64, 8)])
def test_float64_follows_the_formulas(n_embd, head_size, tuned, mode):
    model = make_model(n_embd, 3, head_size=head_size, dtype=torch.float64)
    if tuned:
        add_random_time_state(model)
    model.set_mode(mode)
    tokens = make_tokens(1, 37)
    logits, state = model(tokens)
    judge = NumpyRwkv7(model.state_dict(), head_size)
    expected = np.stack([judge.step(int(t)) for t in tokens[0]])
    # Two float64 implementations; a few hundred rounding errors of 1e-16 through three layers and 37 tokens.
    assert relative_rms(logits[0], expected) < 1e-12
    assert relative_rms(state.wkv[0], np.stack(judge.wkv)) < 1e-12
    assert relative_rms(state.att_shift[0], np.stack(judge.att_shift)) < 1e-12
    assert relative_rms(state.ffn_shift[0], np.stack(judge.ffn_shift)) < 1e-12


_PIP = """
import json, sys
import numpy as np
from rwkv.model import RWKV
model = RWKV(model=sys.argv[1], strategy="cpu fp32")
logits, state = model.forward(json.loads(sys.argv[2]), None, full_output=True)
numbers = {f"state{i}": s.numpy() for i, s in enumerate(state)}
np.savez(sys.argv[3], logits=logits.numpy(), **numbers)
"""


@pytest.mark.parametrize("n_embd, head_size", [(128, 64), (64, 64)])
def test_float32_agrees_with_the_rwkv_package(tmp_path, n_embd, head_size):
    """PyPI's `rwkv`: reads its settings at import, wants the path without its suffix, folds ln0 into the embedding."""
    pytest.importorskip("rwkv", reason="the PyPI package rwkv is not installed")
    model = make_model(n_embd, 3, vocab_size=300, head_size=head_size)
    write_checkpoint(tmp_path / "m.pth", model.state_dict())
    tokens = make_tokens(1, 50, vocab_size=300)
    environment = os.environ | {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
    command = [sys.executable, "-c", _PIP, tmp_path / "m", json.dumps(tokens[0].tolist()), tmp_path / "out.npz"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = np.load(tmp_path / "out.npz")
    for mode in MODES:
        model.set_mode(mode)
        logits, state = model(tokens)
        # float32 on both sides, different orders of summation.
        assert relative_rms(logits[0], theirs["logits"]) < 2e-5
        for layer in range(3):
            assert relative_rms(state.att_shift[0, layer], theirs[f"state{3 * layer}"]) < 2e-5
            assert relative_rms(state.wkv[0, layer], theirs[f"state{3 * layer + 1}"]) < 2e-5
            assert relative_rms(state.ffn_shift[0, layer], theirs[f"state{3 * layer + 2}"]) < 2e-5


@pytest.mark.parametrize("mode", MODES)
def test_a_model_that_others_trained(mode):
    """One head, no v0/v1/v2 in layer 0; logits after `"in`, computed by rwkv.cpp."""
    path = MODELS / "tiny-7v0-834K.pth"
    if not path.exists():
        pytest.skip("../shared/models is not there")
    model = RWKV_Dual.from_pretrained(path, mode=mode)
    logits, _ = model(torch.tensor([model.tokenizer.encode('"in')]))
    expected = np.load(path.with_name("tiny-7v0-834K.expected_logits.npy"))
    assert relative_rms(logits[0, -1], expected) < 1e-5
