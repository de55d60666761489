"""What training wrote is opened and measured again; a file that is not what training ended with is found out."""

import json

import pytest
import torch
from tiny_training import LRS, SHORT

from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint
from rwkv_lab.train import TrainSpec, measure_again, train, verify_training

WRITTEN = [
    "kind of the output",
    "values in the output that are NaN or Inf",
    "bits per byte of the re-opened output: difference from the end of training",
    "bits per byte of held-out text: fewer than before",
    "inputs that changed while training",
]
NO_STATES = "tensors in the output that are no states"


def trained(kind, folder, small, data, **options):
    given = {"base": str(small), "data": str(data), **SHORT, "lr": LRS[kind], **options}
    result = train(kind, folder / "out.pth", **given)
    return TrainSpec(kind=kind, **{n: v for n, v in given.items() if n != "samples"}), result


@pytest.mark.parametrize(
    ("kind", "options"), [("full", {}), ("state", {"steps": 20}), ("lora", {"quant": "nf4"}), ("miss", {})]
)
def test_what_was_trained_passes(kind, options, tmp_path, small, texts):
    spec, result = trained(kind, tmp_path, small, texts, **options)
    checks = verify_training(spec, result)
    assert [c.name for c in checks if c.name != NO_STATES] == WRITTEN and all(c.passed for c in checks)
    assert any(c.name == NO_STATES for c in checks) == (kind == "state")
    assert measure_again(spec, result.out) == pytest.approx(result.bits_after, abs=1e-6)


def test_examples_are_measured_again_too(tmp_path, small):
    data = tmp_path / "sums.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"{i}+1=", "response": str(i + 1)}) for i in range(20)))
    spec, result = trained("lora", tmp_path, small, data)
    assert measure_again(spec, result.out) == pytest.approx(result.bits_after, abs=1e-6)


def failed(spec, result):
    return [c.name for c in verify_training(spec, result) if not c.passed]


def test_another_file_in_its_place_is_found_out(tmp_path, small, texts):
    spec, result = trained("state", tmp_path, small, texts, steps=20)
    with open_checkpoint(result.out) as ck:
        states = {n: ck[n] for n in ck}
    write_checkpoint(result.out, {n: 3 * t for n, t in states.items()}, overwrite=True)
    assert WRITTEN[2] in failed(spec, result)
    write_checkpoint(result.out, states | {"blocks.0.att.x_k": torch.zeros(1, 1, 32)}, overwrite=True)
    assert NO_STATES in failed(spec, result)


def test_an_input_that_changed_and_text_that_got_no_easier_are_found_out(tmp_path, small, texts):
    base = tmp_path / "base.pth"
    base.write_bytes(small.read_bytes())
    spec, result = trained("full", tmp_path, base, texts)
    assert failed(spec, result) == []
    with open_checkpoint(base) as ck:
        tensors = {n: ck[n] for n in ck}
    write_checkpoint(base, {n: 1.01 * t for n, t in tensors.items()}, overwrite=True)
    assert failed(spec, result) == [WRITTEN[4]]
    result.bits_before = result.bits_after
    assert WRITTEN[3] in failed(spec, result)
