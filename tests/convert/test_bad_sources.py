"""Sources that cannot be converted: each is refused by a message that names what is wrong, and nothing is left."""

import json
import shutil

import pytest
import torch
from models import LAYOUTS, random_lora, random_model, random_state, snapshot

from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint
from rwkv_lab.convert import convert
from rwkv_lab.errors import CorruptFileError, LayoutError, OutputError, RwkvLabError, UnsafeFileError

INDEX, NORM = "model.safetensors.index.json", "model.norm.weight"


def refused(error, message, source, to, out, **options):
    before = snapshot(out.parent)
    with pytest.raises(error, match=message) as e:
        convert(source, to, out, **options)
    assert len(str(e.value).splitlines()) <= 3 and snapshot(out.parent) == before


@pytest.mark.parametrize("to", ["pth", "transformers", "web-rwkv"])
@pytest.mark.parametrize("key", ["_strategy", "_version", "_rescale_layer", "blocks.0.att.key.weight_mx"])
@pytest.mark.parametrize("value", ["cpu fp16", 6, torch.ones(3)])
def test_files_that_chatrwkv_converted(key, value, to, tmp_path):
    torch.save(random_model(LAYOUTS["5.2"]) | {key: value}, tmp_path / "m.pth")
    out = tmp_path / {"pth": "out.pth", "transformers": "out", "web-rwkv": "out.st"}[to]
    refused(LayoutError, "converted by ChatRWKV.*use the original", tmp_path / "m.pth", to, out)
    with open_checkpoint(tmp_path / "m.pth") as ck:
        assert ck.kind == "converted"


@pytest.fixture
def shards(tmp_path):
    """A folder of shards."""
    write_checkpoint(tmp_path / "m.pth", random_model())
    (tmp_path / "in").mkdir()
    folder = convert(tmp_path / "m.pth", "fla", tmp_path / "in" / "folder", max_shard_size="3KB").out
    return folder, sorted(p.name for p in folder.glob("model-*"))


def changed_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(change(index)))


def elsewhere(shard):
    return lambda index: index | {"weight_map": index["weight_map"] | {NORM: shard}}


INDEXES = {
    "below": (elsewhere("../m.pth"), UnsafeFileError, "outside its folder; nothing was opened"),
    "absolute": (elsewhere("/etc/passwd"), UnsafeFileError, "outside its folder"),
    "out and in again": (elsewhere("a/../b.safetensors"), UnsafeFileError, "outside its folder"),
    "in a subfolder": (elsewhere("a/b.safetensors"), LayoutError, "a/b.safetensors, which is not there"),
    "nothing": (elsewhere(""), UnsafeFileError, "no name of a file"),
    "the folder itself": (elsewhere("."), UnsafeFileError, "no name of a file"),
    "two lines": (elsewhere("a\nb"), UnsafeFileError, r"'a\\nb', which is no name of a file"),
    "a shard that is missing": (elsewhere("model-00099-of-00099.safetensors"), LayoutError, "not there; download it"),
    "the index itself": (elsewhere(INDEX), LayoutError, "index of a model's shards"),
    "a number": (elsewhere(5), LayoutError, "no weight_map of names to files"),
    "no map": (lambda index: {"metadata": {}}, LayoutError, "no weight_map"),
    "an empty map": (lambda index: {"weight_map": {}}, LayoutError, "there is no tensor"),
    "a list": (lambda index: [index], CorruptFileError, "holds a list"),
    "a tensor that no shard has": (
        lambda index: {"weight_map": index["weight_map"] | {"odd": index["weight_map"][NORM]}},
        LayoutError,
        "lists odd in .*; it is not there",
    ),
    "a tensor left out": (
        lambda index: {"weight_map": {n: s for n, s in index["weight_map"].items() if n != NORM}},
        LayoutError,
        f"does not list {NORM}",
    ),
}


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_that_leads_astray(name, shards, tmp_path):
    change, error, message = INDEXES[name]
    changed_index(shards[0], change)
    refused(error, message, shards[0], "pth", tmp_path / "out.pth")


def test_an_index_that_names_files_inside_its_folder_by_other_words(shards, tmp_path):
    """`./` before a name, and shards in folders of their own."""
    folder, (first, second, *_) = shards
    (folder / "deep").mkdir()
    (folder / second).rename(folder / "deep" / second)
    words = {first: f"./{first}", second: f"deep/.//{second}"}
    changed_index(folder, lambda index: {"weight_map": {n: words.get(s, s) for n, s in index["weight_map"].items()}})
    assert all(check.passed for check in convert(folder, "pth", tmp_path / "out.pth").checks)


def _missing(folder, names):
    (folder / names[1]).unlink()


def _is_a_folder(folder, names):
    _missing(folder, names)
    (folder / names[1]).mkdir()


def _leads_out(folder, names):
    shutil.move(folder / names[1], folder.parent / "outside.safetensors")
    (folder / names[1]).symlink_to(folder.parent / "outside.safetensors")


def _circle(folder, names):
    _missing(folder, names)
    (folder / names[1]).symlink_to(names[1])


def _same_twice(folder, names):
    shutil.copy(folder / names[0], folder / names[1])


def _cut_off(folder, names):
    (folder / names[1]).write_bytes((folder / names[1]).read_bytes()[:-1])


SHARDS = [
    (_missing, LayoutError, "-00002-of-.*not there; download it too"),
    (_is_a_folder, LayoutError, "-00002-of-.*not there"),
    (_leads_out, UnsafeFileError, "-00002-of-.*outside its folder; nothing was opened"),
    (_circle, UnsafeFileError, "-00002-of-.*outside its folder"),
    (_same_twice, LayoutError, "-00002-of-.* too; a tensor may be in one file only"),
    (_cut_off, CorruptFileError, "-00002-of-"),
    (lambda folder, names: (folder / INDEX).unlink(), LayoutError, f"no index of them, {INDEX}; download it too"),
    (lambda folder, names: (folder / INDEX).write_text("{"), CorruptFileError, "is not JSON"),
]


@pytest.mark.parametrize(("change", "error", "message"), SHARDS)
def test_shards_that_are_missing_or_something_else(change, error, message, shards, tmp_path):
    change(*shards)
    refused(error, message, shards[0], "pth", tmp_path / "out.pth")


@pytest.mark.parametrize(
    ("to", "out"), [("pth", "o.pth"), ("gguf", "o.gguf"), ("web-rwkv", "o.st"), ("state", "o.pth")]
)
def test_one_shard_given_alone(to, out, shards, tmp_path):
    for name in shards[1]:
        refused(LayoutError, "it is shard . of .: give the folder", shards[0] / name, to, tmp_path / out)
    refused(LayoutError, "index of a model's shards(.|\n)*Pass the folder", shards[0] / INDEX, to, tmp_path / out)


def test_shards_in_the_way(shards, tmp_path):
    """Those of an older output are gone with it, and without overwrite nothing is touched."""
    folder, names = shards
    refused(OutputError, "exists. Choose another output", tmp_path / "m.pth", "fla", folder)
    (folder / "model-00042-of-00042.safetensors").write_bytes(b"old")
    out = convert(tmp_path / "m.pth", "fla", folder, overwrite=True).out
    assert not list(out.glob("model-*")) and not (out / INDEX).exists() and (out / "model.safetensors").exists()


COLLIDING = [
    ("7.0", {"module.blocks.0.ln1.weight": torch.ones(16)}, "fla", "out", "are the same tensor"),
    ("6.0", {"blocks.0.att.time_mix_k": torch.ones(1, 1, 16)}, "web-rwkv", "out.st", "time_mix_k"),
    ("5.2", {"blocks.0.att.time_first": torch.ones(4, 4)}, "web-rwkv", "out.st", "blocks.0.att.time_first"),
    ("7.0", {"model.layers.0.attn.k_k": torch.ones(16)}, "fla", "out", "both mean blocks.0.att.k_k"),
    (
        "4.0",
        {"rwkv.blocks.0.ln1.weight": torch.ones(16)},
        "transformers",
        "out",
        "no place in .*: rwkv.blocks.0.ln1.weight",
    ),
]


@pytest.mark.parametrize(("version", "more", "to", "out", "message"), COLLIDING)
def test_names_that_collide(version, more, to, out, message, tmp_path):
    write_checkpoint(tmp_path / "m.pth", random_model(LAYOUTS[version]) | more)
    refused(LayoutError, message, tmp_path / "m.pth", to, tmp_path / out)


@pytest.mark.parametrize(("to", "out"), [("gguf", "o.gguf"), ("gguf", "o"), ("web-rwkv", "o.st"), ("web-rwkv", "o")])
def test_programs_that_take_no_adapter(to, out, tmp_path):
    write_checkpoint(tmp_path / "lora.pth", random_lora())
    for options in ({}, {"alpha": 4}):
        refused(LayoutError, "Merge the adapter into its base", tmp_path / "lora.pth", to, tmp_path / out, **options)


STATES = [
    ({1: torch.ones(4, 4, 4)}, "of layers 1 only"),
    ({0: torch.ones(4, 4, 4), 2: torch.ones(4, 4, 4)}, "of layers 0, 2 only"),
    ({0: torch.ones(5)}, r"of shape \[5\]"),
    ({0: torch.ones(4, 4, 5)}, r"of shape \[4, 4, 5\]"),
    ({0: torch.ones(1, 4, 4, 4)}, r"of shape \[1, 4, 4, 4\]"),
    ({0: torch.ones(4, 4, 4), 1: torch.ones(2, 8, 8)}, "the same in all"),
]


@pytest.mark.parametrize(("states", "message"), STATES)
@pytest.mark.parametrize(("to", "out"), [("state", "o.pth"), ("web-rwkv", "o.st"), ("fla", "o.safetensors")])
def test_states_that_are_not_of_one_model(to, out, states, message, tmp_path):
    write_checkpoint(tmp_path / "s.pth", {f"blocks.{i}.att.time_state": t for i, t in states.items()})
    refused(LayoutError, message, tmp_path / "s.pth", to, tmp_path / out)


@pytest.mark.parametrize("content", [random_lora(), {"blocks.0.ln1.weight": torch.ones(16)}])
def test_a_state_of_what_has_none(content, tmp_path):
    write_checkpoint(tmp_path / "x.pth", content)
    refused(LayoutError, "takes a model or a tuned state", tmp_path / "x.pth", "state", tmp_path / "o.pth")
    write_checkpoint(tmp_path / "s.pth", random_state())
    with pytest.raises(RwkvLabError, match="must end in .pth"):
        convert(tmp_path / "s.pth", "state", tmp_path / "o.safetensors")


@pytest.mark.parametrize(("to", "out"), [("state", "o.pth"), ("web-rwkv", "o.st"), ("pth", "o.pth"), ("fla", "o.st")])
def test_states_that_are_no_floats(to, out, tmp_path):
    write_checkpoint(tmp_path / "s.pth", {name: t.to(torch.int32) for name, t in random_state().items()})
    refused(
        LayoutError, "time_state in .* is torch.int32; weights must be floats", tmp_path / "s.pth", to, tmp_path / out
    )


def test_a_model_with_the_states_of_some_layers(tmp_path):
    """transformers would begin the other layers from numbers by chance."""
    state = {"blocks.1.att.time_state": random_state()["blocks.1.att.time_state"]}
    write_checkpoint(tmp_path / "m.pth", random_model() | state)
    for to, out in (("transformers", "o"), ("web-rwkv", "o.st")):
        refused(LayoutError, "states of layers 1 only, and the readers of", tmp_path / "m.pth", to, tmp_path / out)
    assert convert(tmp_path / "m.pth", "fla", tmp_path / "fla").dropped
    notes = convert(tmp_path / "m.pth", "safetensors", tmp_path / "o.safetensors").notes
    assert any("Only the layers 1 of 2 have a tuned state" in note for note in notes)


@pytest.fixture
def adapter(tmp_path):
    """A folder of peft with the names of flash-linear-attention."""
    write_checkpoint(tmp_path / "lora.pth", random_lora())
    return convert(tmp_path / "lora.pth", "fla", tmp_path / "adapter", alpha=4, generation="7.0").out


@pytest.mark.parametrize(("to", "out"), [("pth", "o.pth"), ("safetensors", "o.safetensors"), ("fla", "o")])
@pytest.mark.parametrize("peft_type", ["IA3", "lora", None])
def test_a_folder_of_another_kind_of_adapter(peft_type, to, out, adapter, tmp_path):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"peft_type": peft_type}))
    refused(LayoutError, f"peft_type {peft_type!r} is not read; LORA, MISS, BONE are", adapter, to, tmp_path / out)


def test_adapters_that_are_incomplete_are_not_copied(tmp_path):
    write_checkpoint(tmp_path / "half.pth", {n: t for n, t in random_lora().items() if not n.endswith("value.lora_B")})
    refused(LayoutError, "lora_B is not; .* is incomplete", tmp_path / "half.pth", "pth", tmp_path / "o.pth")


def test_adapters_of_other_models(adapter, tmp_path):
    parts = {"lora_A": torch.ones(2, 16), "lora_B": torch.ones(16, 2)}
    other = {f"model.layers.0.self_attn.q_proj.{part}": t for part, t in parts.items()}
    write_checkpoint(tmp_path / "other.pth", other)
    for options in ({}, {"alpha": 4}):
        message = "no adapter of an RWKV model that is read: .* such as model.layers.0.self_attn.q_proj"
        refused(LayoutError, message, tmp_path / "other.pth", "pth", tmp_path / "o.pth", **options)
    write_checkpoint(tmp_path / "both.pth", random_lora() | other)
    for options in ({}, {"alpha": 4}):
        notes = convert(tmp_path / "both.pth", "pth", tmp_path / "o.pth", overwrite=True, **options).notes
        assert any("1 of 11 layers that the adapter changes are in no RWKV model" in note for note in notes)
