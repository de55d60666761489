"""What a configuration or a header states against what its tensors have."""

import json
import struct

import pytest
from models import LAYOUTS, random_model

from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint
from rwkv_lab.checkpoint.gguf_facts import RANK_KEYS
from rwkv_lab.convert import convert, to_gguf
from rwkv_lab.errors import CorruptFileError, LayoutError

INDEX = "model.safetensors.index.json"
NUMBERS = {"fla": ("6.0", "7.0"), "world": ("5.2", "6.0"), "transformers": ("4.0", "5.2", "7.0")}
PAIRS = [(target, version) for target, versions in NUMBERS.items() for version in versions]


def written(folder, target, version):
    write_checkpoint(folder / "m.pth", random_model(LAYOUTS[version]))
    return convert(folder / "m.pth", target, folder / "out").out


def changed(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def notes(path):
    with open_checkpoint(path) as ck:
        return "\n".join(ck.notes)


@pytest.mark.parametrize(("target", "version"), PAIRS)
def test_every_dimension_of_a_configuration_that_the_tensors_do_not_have(target, version, tmp_path):
    folder = written(tmp_path, target, version)
    assert not notes(folder)
    config = json.loads((folder / "config.json").read_text())
    other = ("context_length", "rescale_every", "bos_token_id", "eos_token_id", "pad_token_id")
    names = [n for n, value in config.items() if type(value) is int and n not in other]
    assert len(names) > 4
    for name in names:
        changed(folder, **{name: config[name] + 1})
        assert f"states {name} {config[name] + 1}, the tensors have {config[name]}" in notes(folder)
        changed(folder, **{name: None})
        assert not notes(folder)
        changed(folder, **{name: config[name]})


OTHERWISE = [
    ("fla", "7.0", "value_dim", [16, 8], "the tensors have [16, 16]"),
    ("fla", "7.0", "value_dim", 8, "the tensors have [16, 16]"),
    ("transformers", "7.0", "ranks", {"w": 1}, "the tensors have {"),
    ("transformers", "7.0", "version", "6.0", "the tensors have '7.0'"),
    ("fla", "7.0", "model_type", "rwkv6", "the tensors have 'rwkv7'"),
    ("world", "6.0", "model_type", "llama", "the tensors have 'rwkv6'"),
    ("fla", "7.0", "hidden_act", "silu", "RWKV-7.0 is computed with 'sqrelu'"),
    ("fla", "6.0", "norm_bias", False, "RWKV-6.0 is computed with True"),
    ("world", "5.2", "torch_dtype", "float32", "most tensors are bfloat16; every tensor is read in its own"),
    ("fla", "7.0", "dtype", "float16", "most tensors are bfloat16"),
    ("transformers", "4.0", "dtype", "int8", "most tensors are bfloat16"),
]


@pytest.mark.parametrize(("target", "version", "name", "value", "message"), OTHERWISE)
def test_what_else_a_configuration_states_otherwise(target, version, name, value, message, tmp_path):
    folder = written(tmp_path, target, version)
    changed(folder, **{name: value})
    assert f"config.json states {name} {value!r}" in notes(folder) and message in notes(folder)


@pytest.mark.parametrize(("name", "value"), [("value_dim", 16), ("torch_dtype", "auto"), ("torch_dtype", "bfloat16")])
def test_other_words_for_what_the_tensors_have(name, value, tmp_path):
    folder = written(tmp_path, "fla", "7.0")
    changed(folder, **{name: value})
    assert not notes(folder)


def test_a_head_beside_weights_that_the_configuration_ties(tmp_path):
    folder = written(tmp_path, "fla", "7.0")
    changed(folder, tie_word_embeddings=True)
    assert "states tie_word_embeddings, and there is a head of its own, lm_head.weight: it is read" in notes(folder)


@pytest.mark.parametrize(
    ("name", "twice"), [("config.json", "hidden_size"), (INDEX, "weight_map"), (INDEX, "model.norm.bias")]
)
def test_a_key_that_stands_twice_in_a_json_file(name, twice, tmp_path):
    """json keeps the last one, other programs the first: they would read different models."""
    write_checkpoint(tmp_path / "m.pth", random_model())
    folder = convert(tmp_path / "m.pth", "fla", tmp_path / "out", max_shard_size="3KB").out
    text = (folder / name).read_text()
    (folder / name).write_text(text.replace(f'"{twice}":', f'"{twice}": {{}}, "{twice}":'))
    with pytest.raises(CorruptFileError, match=f"{name}: '{twice}' appears twice in it"):
        open_checkpoint(folder)


def test_a_model_in_the_folder_of_an_adapter(tmp_path):
    folder = written(tmp_path, "fla", "7.0")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(LayoutError, match=r"take adapter_config.json out to read the model in model.safetensors"):
        open_checkpoint(folder)


@pytest.mark.parametrize("value", [0.5, 0, "x", float("nan")])
@pytest.mark.parametrize(("target", "version"), [("fla", "6.0"), ("fla", "7.0"), ("world", "6.0")])
def test_another_eps_of_the_norms(target, version, value, tmp_path):
    folder = written(tmp_path, target, version)
    name = "norm_eps" if target == "fla" else "layer_norm_epsilon"
    changed(folder, **{name: value})
    assert f"{name} is stated as {value}; the norms are computed with 1e-05" in notes(folder)


DIMENSIONS = ["block_count", "embedding_length", "feed_forward_length", "vocab_size"]


@pytest.mark.parametrize(
    ("name", "version"),
    [(name, version) for version in ("6.0", "7.0") for name in [*DIMENSIONS, *RANK_KEYS[version].values()]],
)
def test_every_dimension_of_a_gguf_header_that_the_tensors_do_not_have(name, version, tmp_path):
    write_checkpoint(tmp_path / "m.pth", random_model(LAYOUTS[version]))
    out = to_gguf(tmp_path / "m.pth", tmp_path / "m.gguf").out
    assert not notes(out)
    key = f"rwkv{version[0]}.{name}".encode()
    data = bytearray(out.read_bytes())
    at = data.index(key) + len(key) + 4
    data[at : at + 4] = struct.pack("<I", 77)
    out.write_bytes(data)
    assert f"states {key.decode()} 77, the tensors have" in notes(out)


@pytest.mark.parametrize("name", ["group_norm_eps", "weights_rescaled_every"])
def test_records_that_are_no_numbers_name_their_file(name, tmp_path):
    target, version = ("fla", "7.0") if name == "group_norm_eps" else ("transformers", "4.0")
    folder = written(tmp_path, target, version)
    changed(folder, **{name: "x"})
    with pytest.raises(CorruptFileError, match=f"{folder}: {name} is recorded as 'x'"), open_checkpoint(folder) as ck:
        assert ck.group_norm_eps


def test_a_folder_with_a_checkpoint_under_another_name_says_to_give_the_file(tmp_path):
    for name in ("m.pth", "m.safetensors"):
        (tmp_path / "folder").mkdir()
        write_checkpoint(tmp_path / "folder" / name, random_model())
        with pytest.raises(LayoutError, match=f"Give the file by itself: .*folder/{name}"):
            open_checkpoint(tmp_path / "folder")
        (tmp_path / "folder" / name).rename(tmp_path / name)
        (tmp_path / "folder").rmdir()


def test_shards_that_the_index_does_not_name_are_told(tmp_path):
    write_checkpoint(tmp_path / "m.pth", random_model())
    folder = convert(tmp_path / "m.pth", "fla", tmp_path / "out", max_shard_size="3KB").out
    assert not notes(folder)
    (folder / "model-00099-of-00099.safetensors").write_bytes(b"")
    assert "does not name model-00099-of-00099.safetensors" in notes(folder)
