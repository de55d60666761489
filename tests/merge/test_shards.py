"""Files that hold a part of a model: shards are refused by name, other parts are counted."""

import json

import pytest
import torch
from models import LAYOUTS, random_lora, random_model, random_state
from safetensors.torch import save_file

from rwkv_lab import merge
from rwkv_lab.checkpoint import Layout, write_checkpoint
from rwkv_lab.errors import LayoutError

DEEP = Layout("7.0", 4, 16, 16, 64, 11, 4, 4, LAYOUTS["7.0"].ranks)
NAMES = list(random_model(DEEP))


@pytest.fixture
def shards(tmp_path):
    """base.pth, and a fine-tune of it in a folder of shards."""
    torch.save(random_model(DEEP), tmp_path / "base.pth")
    write_checkpoint(tmp_path / "tuned", random_model(DEEP, seed=1), max_shard_size=9000)
    assert len(list((tmp_path / "tuned").glob("*.safetensors"))) > 3
    return tmp_path


@pytest.mark.parametrize("role", ["tuned", "base"])
@pytest.mark.parametrize("index", [True, False])
def test_one_shard_of_several_is_refused_by_its_index_or_its_name(role, index, shards):
    if not index:
        (shards / "tuned" / "model.safetensors.index.json").unlink()
    for shard in sorted((shards / "tuned").glob("*.safetensors")):
        given = [shards / "base.pth", shard] if role == "tuned" else [shard, shards / "base.pth"]
        with pytest.raises(LayoutError, match=f"{role}: .*{shard.name} is one") as e:
            merge(*given, shards / "out.pth", method="overlay")
        assert f"{shards / 'tuned'}" in str(e.value) and str(e.value).count("\n") <= 2
    assert not (shards / "out.pth").exists()


def test_a_shard_of_another_name_is_known_by_the_index_that_lists_it(shards):
    folder = shards / "tuned"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    first = sorted(folder.glob("*.safetensors"))[0]
    first.rename(folder / "first.safetensors")
    index["weight_map"] = {n: f.replace(first.name, "first.safetensors") for n, f in index["weight_map"].items()}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(LayoutError, match="one of the shards that pytorch_model.bin.index.json"):
        merge(shards / "base.pth", folder / "first.safetensors", shards / "out.pth")


@pytest.mark.parametrize("role", ["tuned", "base"])
def test_the_index_given_as_a_file_names_the_folder(role, shards):
    index = shards / "tuned" / "model.safetensors.index.json"
    given = [shards / "base.pth", index] if role == "tuned" else [index, shards / "base.pth"]
    with pytest.raises(LayoutError, match="the index of a model's shards(.|\n)*Pass the folder") as e:
        merge(*given, shards / "out.pth")
    assert f"{shards / 'tuned'}" in str(e.value)


@pytest.mark.parametrize("name", ["adapter-00001-of-00002.pth", "model_part_1_of_2.pth", "shard2of3.pth"])
def test_shards_of_adapters_and_states_are_refused_by_their_name(name, shards):
    for tensors in (random_state(DEEP), random_lora(DEEP, full=False), part(first=3, last=9)):
        torch.save(tensors, shards / name)
        with pytest.raises(LayoutError, match=f"tuned: .*{name} is one shard of [23] by its name"):
            merge(shards / "base.pth", shards / name, shards / "out.pth", alpha=1)


def part(*names: str, first: int = 0, last: int = len(NAMES)) -> dict:
    tuned = random_model(DEEP, seed=1)
    return {n: tuned[n] for i, n in enumerate(NAMES) if (first <= i < last) or n in names}


CUT = NAMES.index("blocks.2.att.k_k")
START_2, END_1 = NAMES.index("blocks.2.ln1.weight"), NAMES.index("blocks.1.ln1.weight")


@pytest.mark.parametrize(
    "tensors",
    [
        part(last=CUT),
        part(first=CUT),
        part(first=NAMES.index("blocks.0.att.k_k"), last=CUT),
        part(last=START_2),
        part(first=START_2),
        part(first=NAMES.index("blocks.1.att.k_k"), last=CUT),
        part(first=NAMES.index("blocks.3.att.k_k")),
        {n: t for n, t in part().items() if n in sorted(NAMES)[20:60]},
    ],
    ids=[
        *("stops in a layer", "begins in a layer", "from the middle to the middle", "stops", "begins"),
        *("two layers in part", "the end of the last layer", "by the alphabet"),
    ],
)
@pytest.mark.parametrize("method", ["auto", "task_arithmetic"])
def test_a_renamed_shard_is_known_by_where_it_stops(tensors, method, tmp_path):
    torch.save(random_model(DEEP), tmp_path / "base.pth")
    save_file(tensors, tmp_path / "renamed.safetensors")
    given = (tmp_path / "base.pth", tmp_path / "renamed.safetensors", tmp_path / "out.pth")
    with pytest.raises(LayoutError, match=r"renamed.safetensors holds \d+ tensors .*blocks .* of 4.*one shard") as e:
        merge(*given, method=method)
    assert "include=['*']" in str(e.value)
    result = merge(*given, method=method, include=["*"])
    assert any(f"covers {len(tensors)} of {len(NAMES)} tensors" in n for n in result.notes)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (part(first=NAMES.index("blocks.1.ln1.weight"), last=START_2), "blocks 1 of 4"),
        ({n: t for n, t in part().items() if "blocks.1." in n or "blocks.2." in n}, "blocks 1 to 2 of 4"),
        ({n: t for n, t in part().items() if ".ln" in n or "blocks.3." in n}, "blocks 0 to 3 of 4"),
        ({n: t for n, t in part().items() if "att.key" in n}, "blocks 0 to 3 of 4"),
        ({n: t for n, t in part().items() if "att.key" in n and ".1." not in n}, "blocks 0, 2 to 3 of 4"),
        ({n: t for n, t in part().items() if n != "emb.weight"}, "blocks 0 to 3 of 4, ln_out.weight"),
        (part("head.weight", last=0), "head.weight"),
        ({n: t for n, t in part().items() if "blocks.1.ffn" in n}, "blocks 1 of 4"),
        ({n: t for n, t in part().items() if ".ffn." in n}, "blocks 0 to 3 of 4"),
        ({n: t for n, t in part().items() if n[:4] in ("emb.", "ln_o", "head")}, "emb.weight"),
    ],
)
def test_a_partial_fine_tune_goes_in_and_is_counted(tensors, says, tmp_path):
    torch.save(random_model(DEEP), tmp_path / "base.pth")
    torch.save(tensors, tmp_path / "tuned-3-of-5.pth")
    for method in ("auto", "slerp"):
        result = merge(tmp_path / "base.pth", tmp_path / "tuned-3-of-5.pth", tmp_path / f"{method}.pth", method=method)
        count = f"covers {len(tensors)} of {len(NAMES)} tensors of the base ({says}"
        assert any(count in note for note in result.plan.notes), result.plan.notes


def test_a_whole_model_gives_no_note_on_parts_whatever_it_is_called(tmp_path):
    torch.save(random_model(DEEP), tmp_path / "base.pth")
    name = tmp_path / "model-00001-of-00001.safetensors"
    save_file(random_model(DEEP, seed=1), name)
    assert not any("covers" in n for n in merge(tmp_path / "base.pth", name, tmp_path / "o.pth").notes)
    name = name.rename(tmp_path / "model-00001-of-00003.safetensors")
    merge(tmp_path / "base.pth", name, tmp_path / "p.pth")


def test_a_base_that_is_cut_says_what_it_may_be(tmp_path):
    torch.save(part(last=CUT), tmp_path / "base.pth")
    torch.save(random_state(DEEP), tmp_path / "state.pth")
    with pytest.raises(LayoutError, match="one shard of several"):
        merge(tmp_path / "base.pth", tmp_path / "state.pth", tmp_path / "o.pth")
