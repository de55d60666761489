"""Options that change nothing in an output are named in the plan; those that contradict it are refused."""

import re
from dataclasses import replace

import pytest
from models import SEVEN, random_lora, random_model, random_state

from rwkv_lab.checkpoint import write_checkpoint
from rwkv_lab.convert import ConvertOptions, convert
from rwkv_lab.errors import ParameterError


@pytest.fixture
def sources(tmp_path):
    model = random_model(replace(SEVEN, vocab_size=257))
    write_checkpoint(tmp_path / "model.pth", model)
    write_checkpoint(tmp_path / "tuned.pth", model | random_state())
    write_checkpoint(tmp_path / "state.pth", random_state())
    write_checkpoint(tmp_path / "lora.pth", random_lora())
    return tmp_path


def planned(sources, source, to, out, **options):
    result = convert(sources / source, to, sources / out, dry_run=True, **options)
    return [note for note in result.notes if any(note.startswith(f"{name}=") for name in options)]


TOKENIZER = ("tokenizer", "bytes", "tokenizer='bytes' changes nothing in the output: .* holds no tokenizer")
SHARDS = ("max_shard_size", "1GB", "max_shard_size=1000000000 has no effect: .* is not sharded")
ALPHA = ("alpha", 8, "alpha=8 has no effect: it is of a LoRA, and the source is of kind ")
SIZE = ("size", "0.4B", "size='0.4B' has no effect: it is of whole models")
GENERATION = ("generation", "7.0", "generation='7.0' has no effect: ")


@pytest.mark.parametrize(
    ("source", "to", "out", "idle"),
    [
        ("model.pth", "pth", "m.pth", [TOKENIZER, SHARDS, ALPHA]),
        ("model.pth", "safetensors", "m.safetensors", [TOKENIZER, SHARDS, ALPHA]),
        ("model.pth", "web-rwkv", "m.st", [TOKENIZER, SHARDS, ALPHA]),
        ("model.pth", "gguf", "m.gguf", [SHARDS, ALPHA]),
        ("model.pth", "fla", "m", [ALPHA]),
        ("model.pth", "transformers", "m", [ALPHA]),
        ("tuned.pth", "state", "s.pth", [TOKENIZER, SHARDS, ALPHA]),
        ("tuned.pth", "fla", "s.safetensors", [TOKENIZER, SHARDS, ALPHA]),
        ("state.pth", "state", "s.pth", [TOKENIZER, SHARDS, ALPHA, SIZE, GENERATION]),
        ("state.pth", "web-rwkv", "s.st", [TOKENIZER, SHARDS, ALPHA, SIZE, GENERATION]),
        ("state.pth", "safetensors", "s.safetensors", [TOKENIZER, SHARDS, ALPHA, SIZE, GENERATION]),
        ("lora.pth", "pth", "a.pth", [TOKENIZER, SHARDS, SIZE, GENERATION]),
    ],
)
def test_what_has_no_effect_is_named(source, to, out, idle, sources):
    for name, value, message in idle:
        (note,) = planned(sources, source, to, out, **{name: value})
        assert re.match(message, note), note
    assert len(planned(sources, source, to, out, **{name: value for name, value, _ in idle})) == len(idle)
    assert planned(sources, source, to, out) == []


@pytest.mark.parametrize("idle", [TOKENIZER, SHARDS, SIZE], ids=lambda one: one[0])
@pytest.mark.parametrize(("to", "more"), [("fla", {"generation": "7.0"}), ("safetensors", {})])
def test_of_an_adapter(to, more, idle, sources):
    name, value, message = idle
    (note,) = planned(sources, "lora.pth", to, "a", alpha=8, **{name: value}, **more)
    assert re.match(message, note), note


def test_what_has_an_effect_is_not_named(sources):
    assert planned(sources, "lora.pth", "fla", "a", alpha=8, generation="7.0") == []
    assert planned(sources, "lora.pth", "pth", "a.pth", alpha=8) == []
    assert planned(sources, "model.pth", "fla", "m", max_shard_size="9kB", generation="7.0") == []
    assert len(planned(sources, "lora.pth", "safetensors", "a", alpha=8, generation="7.0")) == 1


@pytest.mark.parametrize(
    ("source", "to", "out", "options", "message"),
    [
        ("model.pth", "pth", "m.pth", {"generation": "6.0"}, "generation='6.0': the weights are RWKV-7.0"),
        ("tuned.pth", "state", "s.pth", {"generation": "6.0"}, "generation='6.0': the weights are RWKV-7.0"),
        ("tuned.pth", "state", "s.pth", {"size": "0.4B"}, "size='0.4B': such a model has 24 layers of 1024"),
        ("state.pth", "state", "s.pth", {"rescale": 6}, "rescale=6: .* no place"),
        ("state.pth", "pth", "s.pth", {"dtype": "Q8_0"}, "no quantised tensors"),
        ("tuned.pth", "fla", "s.safetensors", {"dtype": "Q4_0"}, "no quantised tensors"),
        ("lora.pth", "fla", "a", {"rescale": 6}, "rescale=6: .* no place"),
        ("lora.pth", "safetensors", "a", {"dtype": "Q8_0"}, "no quantised tensors"),
    ],
)
def test_what_contradicts_the_output_is_refused(source, to, out, options, message, sources):
    more = {"alpha": 8, "generation": "7.0"} if source == "lora.pth" else {}
    with pytest.raises(ParameterError, match=message):
        convert(sources / source, to, sources / out, **more, **options)


@pytest.mark.parametrize(("name", "value"), [("licence", "mit"), ("private", False)])
def test_of_an_upload_that_is_not_asked_for(name, value):
    with pytest.raises(ParameterError, match=f"{name}={value!r} is of what push_to_hub=True uploads; it is not set"):
        ConvertOptions.read({name: value})
