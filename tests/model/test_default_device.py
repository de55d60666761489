"""torch's default device, whatever it is, is not where a model on the CPU computes, nor a merge."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from models import LAYOUTS, random_lora, random_model, random_state

from rwkv_lab import RWKV_Dual, merge
from rwkv_lab.analysis.conversion import changes_of_values
from rwkv_lab.checkpoint import write_checkpoint
from rwkv_lab.convert import convert, verify_convert
from rwkv_lab.convert.logits import prompt_logits
from rwkv_lab.merge import verify_merge
from rwkv_lab.model import generate, quantise_weights
from rwkv_lab.model.evaluate import bits_per_byte
from rwkv_lab.train.batches import Rows, Windows
from rwkv_lab.train.material import Row

IDS = torch.tensor([[1, 2, 3, 4]])
JOBS = {
    "parallel": lambda model: model.parallel(IDS)[0].tolist(),
    "prefill": lambda model: model.prefill(IDS)[0].tolist(),
    "generate": lambda model: generate(model, ["hello", "you"], max_new_tokens=3, presence_penalty=0.5),
    "stream": lambda model: model.generate_with_streaming("hello", 20, 0.0, presence_penalty=100.0),
    "prompt": lambda model: prompt_logits(model).tolist(),
    "evaluate": lambda model: bits_per_byte(model, b"hello you there", ctx_len=4),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "demo.pth"  # with a vocabulary of bytes
    write_checkpoint(path, random_model(replace(LAYOUTS["7.0"], vocab_size=257), torch.float32))
    return path


@pytest.mark.parametrize("mode", ["transformer", "rnn"])
@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
def test_the_default_device_changes_nothing(quant, mode, path):
    model = RWKV_Dual.from_pretrained(path, mode=mode)
    if quant != "none":
        quantise_weights(model, quant)
    for name, job in JOBS.items():
        expected = job(model)
        with torch.device("meta"):
            assert job(model) == expected, name


SOME = dict([*random_model(seed=1).items()][:3])
MERGES = {
    "lora": (random_lora(), {"alpha": 4}),
    "quantised": (random_lora(full=False), {"alpha": 4, "parameters": {"quant": "bnb-int8"}}),
    "state": (random_state(), {}),
    "blend": (SOME, {"alpha": 0.5}),
    "slerp": (SOME, {"method": "slerp"}),
    "ties": (SOME, {"method": "ties"}),
    "dare_ties": (SOME, {"method": "dare_ties", "parameters": {"density": 0.5}}),
}


@pytest.mark.parametrize("kind", MERGES)
def test_a_merge_gives_the_same_bytes_and_is_proved(kind, tmp_path):
    tuned, given = MERGES[kind]
    write_checkpoint(tmp_path / "base.pth", random_model())
    write_checkpoint(tmp_path / "tuned.pth", tuned)
    files = tmp_path / "base.pth", tmp_path / "tuned.pth"
    expected = merge(*files, tmp_path / "expected.pth", **given).out.read_bytes()
    with torch.device("meta"):
        result = merge(*files, tmp_path / "out.pth", **given)
        assert result.out.read_bytes() == expected and all(check.passed for check in verify_merge(result))


def test_a_model_is_converted_and_compared(path, tmp_path):
    with torch.device("meta"):
        result = convert(path, "gguf", tmp_path / "out.gguf", dtype="q4_0")
        assert all(check.passed for check in verify_convert(result))
        assert changes_of_values(result)


def test_batches_are_the_same():
    tokens = np.arange(50)
    rows = [Row(tokens[:n], tokens[:n] > 1) for n in (5, 3, 8)]
    made = (lambda: Windows("x", tokens, tokens, 50, 4, 0)), (lambda: Rows(rows, rows, 16, 0))
    for make in made:
        expected = [str(batch) for batch in (make().draw(2), *make().held_out())]
        with torch.device("meta"):
            batches = make()
            assert [str(batch) for batch in (batches.draw(2), *batches.held_out())] == expected
            batches.resume_from(batches.position())
