"""Opening: any format by its bytes, headers only, a tensor by itself, and nothing outside the folder."""

import json
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from models import SEVEN, random_lora, random_model, random_state, same
from safetensors.torch import save_file

from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint
from rwkv_lab.errors import CorruptFileError, LayoutError, ParameterError, UnsafeFileError

BIG = 40_000_000  # bytes of tensor data of a checkpoint whose headers have a few kB


def save_shards(folder, tensors, suffix):
    """A Hugging Face folder of two shards and their index, by the formats' own libraries."""
    folder.mkdir()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names, weight_map = list(tensors), {}
    for i, part in enumerate((names[::2], names[1::2])):
        shard = f"{stem}-{i + 1:05d}-of-00002.{suffix}"
        chosen = {n: tensors[n] for n in part}
        save_file(chosen, folder / shard) if suffix == "safetensors" else torch.save(chosen, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def save_as(way, folder, tensors):
    if way == "pth":
        torch.save(tensors, folder / "m.pth")
        return folder / "m.pth"
    if way == "safetensors":
        save_file(tensors, folder / "m.safetensors")
        return folder / "m.safetensors"
    if way == "folder of one":
        (folder / "m").mkdir()
        save_file(tensors, folder / "m" / "model.safetensors")
        return folder / "m"
    if way == "folder of one .bin":
        (folder / "m").mkdir()
        torch.save(tensors, folder / "m" / "pytorch_model.bin")
        return folder / "m"
    if way == "our own shards":
        write_checkpoint(folder / "m", tensors, max_shard_size=1000)
        return folder / "m"
    return save_shards(folder / "m", tensors, way.removeprefix("shards of "))


WAYS = [
    "pth",
    "safetensors",
    "folder of one",
    "folder of one .bin",
    "shards of safetensors",
    "shards of bin",
    "our own shards",
]


@pytest.mark.parametrize("way", WAYS)
def test_every_format_gives_the_same_tensors(way, tmp_path):
    tensors = random_model(SEVEN)
    with open_checkpoint(save_as(way, tmp_path, tensors)) as ck:
        assert ck.kind == "model"
        assert replace(ck.layout, evidence=()) == SEVEN
        assert set(ck) == set(tensors) and len(ck) == len(tensors)
        assert all(same(ck[n], t) for n, t in tensors.items())
        assert all((ck.info[n].shape, ck.info[n].dtype) == (t.shape, t.dtype) for n, t in tensors.items())
        assert all(ck.info[n].nbytes == t.nbytes for n, t in tensors.items())
        assert ck.bytes >= sum(t.nbytes for t in tensors.values())
        assert "emb.weight" in ck and "nothing" not in ck
        with pytest.raises(LayoutError, match="holds no tensor"):
            ck["nothing"]


@pytest.mark.parametrize("way", WAYS)
def test_only_headers_until_a_tensor_is_asked_for(way, tmp_path, reads):
    tensors = random_model(SEVEN)
    path = save_as(way, tmp_path, tensors)
    reads.clear()
    with open_checkpoint(path) as ck:
        assert ck.layout and ck.kind == "model" and ck.info and ck.evidence
        data = [(t.file.path.name, t.offset, t.offset + t.span) for t in ck.info.values()]
        hit = [r for r in reads for d in data if r[0] == d[0] and r[1] < d[2] and d[1] < r[2]]
        # The first 512 bytes decide the format, and may hold the beginning of a small file's data.
        assert all(start == 0 and end <= 512 for _, start, end in hit)
        reads.clear()
        name = "blocks.1.ffn.key.weight"
        assert same(ck[name], tensors[name])
        info = ck.info[name]
        assert reads == [(info.file.path.name, info.offset, info.offset + info.nbytes)]


def test_describing_a_file_imports_no_torch(tmp_path):
    """It takes a second, which is long for a look at a file."""
    write_checkpoint(tmp_path / "m.pth", random_model(SEVEN))
    write_checkpoint(tmp_path / "m.safetensors", random_model(SEVEN))
    code = (
        "import sys; from rwkv_lab.checkpoint import file_facts, open_checkpoint\n"
        "for path in sys.argv[1:]:\n"
        "    with open_checkpoint(path) as ck:\n"
        "        print(ck.layout.version, ck.kind, ck.evidence != (), file_facts(ck).bytes == ck.bytes)\n"
        "        print({t.dtype_name for t in ck.info.values()}, sum(t.nbytes for t in ck.info.values()) <= ck.bytes)\n"
        "        print('torch' in sys.modules)"
    )
    files = [tmp_path / "m.pth", tmp_path / "m.safetensors"]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["7.0 model True True", "{'bfloat16'} True", "False"] * 2


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_the_system_reads_little_of_a_big_file(suffix, tmp_path):
    """Counted by the kernel, so that no reader goes unseen."""
    path = tmp_path / f"big.{suffix}"
    write_checkpoint(path, {"emb.weight": torch.zeros(BIG // 4), "x": torch.zeros(10)})
    code = (
        "import sys, torch; from rwkv_lab import open_checkpoint\n"
        "count = lambda: int(open('/proc/self/io').readline().split()[1])\n"
        "before = count(); ck = open_checkpoint(sys.argv[1]); ck.kind, ck.layout\n"
        "opened = count(); ck['x']; one = count(); ck['emb.weight']\n"
        "print(opened - before, one - opened, count() - one)"
    )
    if not os.path.exists("/proc/self/io"):
        pytest.skip("the system does not count what a process reads (/proc/self/io)")
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    opening, small, large = map(int, done.stdout.split())
    assert opening < 100_000 and small < 1_000 and BIG <= large < BIG + 1_000


@pytest.mark.parametrize(
    ("written", "called"), [("safetensors", "m.pth"), ("pth", "m.safetensors"), ("pth", "m.txt"), ("pth", "m")]
)
def test_bytes_decide_the_kind_of_file_and_not_its_name(written, called, tmp_path):
    tensors = random_model(SEVEN)
    save_as(written, tmp_path, tensors).rename(tmp_path / called)
    with open_checkpoint(tmp_path / called) as ck:
        assert ck.format == written and ck.kind == "model"
        assert same(ck["emb.weight"], tensors["emb.weight"])


def test_adapter_folder(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 16}))
    save_file(
        {"base_model.model.blocks.0.att.key.lora_A.weight": torch.ones(2, 4)}, tmp_path / "adapter_model.safetensors"
    )
    with open_checkpoint(tmp_path) as ck:
        assert (ck.format, ck.kind, ck.layout) == ("adapter", "lora", None)
        assert ck.adapter_config["lora_alpha"] == 16


def test_a_wrapped_module_and_an_ordered_dict_and_parameters(tmp_path):
    tensors = OrderedDict((n, torch.nn.Parameter(t)) for n, t in random_model(SEVEN).items())
    torch.save(tensors, tmp_path / "m.pth")
    module = torch.nn.Linear(3, 2)
    torch.save(module.state_dict(), tmp_path / "linear.pth")
    with open_checkpoint(tmp_path / "m.pth") as ck, open_checkpoint(tmp_path / "linear.pth") as linear:
        assert ck.kind == "model" and same(ck["emb.weight"], tensors["emb.weight"].detach())
        assert same(linear["weight"], module.weight.detach()) and linear.kind == "unknown"


def test_entries_that_are_no_tensors_are_kept_apart(tmp_path):
    torch.save({"step": 3, "loss": 0.5, "w": torch.ones(2), "nested": {"a": torch.ones(1)}}, tmp_path / "m.pth")
    with open_checkpoint(tmp_path / "m.pth") as ck:
        assert list(ck) == ["w"] and set(ck.others) == {"step", "loss", "nested"}


def test_a_closed_checkpoint_reads_nothing_from_files_opened_later(tmp_path):
    path = save_as("pth", tmp_path, random_state(SEVEN))
    ck = open_checkpoint(path)
    info = next(iter(ck.info.values()))
    ck.close()
    with open(path, "rb"), pytest.raises(ParameterError, match="was closed"):
        info.read()
    ck.close()


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("called", ["m.pth", "m.bin", "m.safetensors"])
def test_no_pickle_is_ever_run(protocol, called, tmp_path):
    canary = tmp_path / "canary"
    torch.save({"w": torch.ones(2), "evil": Touch(canary)}, tmp_path / called, pickle_protocol=protocol)
    with pytest.raises(UnsafeFileError, match="open"):
        open_checkpoint(tmp_path / called)
    (tmp_path / called).write_bytes(pickle.dumps({"w": Touch(canary)}, protocol=protocol))
    with pytest.raises(UnsafeFileError, match="bare pickle"):
        open_checkpoint(tmp_path / called)
    assert not canary.exists()


def test_whole_modules_and_script_archives_are_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(UnsafeFileError, match="torch.nn.modules.linear.Linear"):
        open_checkpoint(tmp_path / "module.pth")
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    with pytest.raises(CorruptFileError, match="a list, not a dict"):
        open_checkpoint(tmp_path / "list.pth")


def test_the_format_before_zip_is_refused(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(UnsafeFileError, match="bare pickle"):
        open_checkpoint(tmp_path / "old.pth")


@pytest.mark.parametrize("what", ["nothing", "empty folder", "named pipe", "name too long", "link in a circle"])
def test_what_is_no_checkpoint_at_all(what, tmp_path):
    path = tmp_path / ("x" * 300 if what == "name too long" else "x")
    if what == "empty folder":
        path.mkdir()
    elif what == "named pipe":
        os.mkfifo(path)
    elif what == "link in a circle":
        path.symlink_to(path)
    with pytest.raises((CorruptFileError, LayoutError, ParameterError)):
        open_checkpoint(path)


@pytest.fixture
def shards(tmp_path):
    """(folder, its index as a dict, a function that writes a changed index)."""
    folder = save_shards(tmp_path / "m", random_model(SEVEN), "safetensors")
    index = folder / "model.safetensors.index.json"
    return folder, json.loads(index.read_text()), lambda changed: index.write_text(json.dumps(changed))


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "{absolute}", "", ".", "..", "sub/../x.safetensors", "a\0b", "x" * 300, "link"]
)
def test_an_index_cannot_lead_out_of_its_folder(shard, shards, tmp_path, monkeypatch):
    folder, index, write = shards
    outside = tmp_path / "outside.safetensors"
    save_file({"emb.weight": torch.ones(1)}, outside)
    (folder / "link").symlink_to(outside)
    index["weight_map"]["emb.weight"] = shard.format(absolute=outside)
    write(index)
    opened, real = [], os.open
    monkeypatch.setattr(os, "open", lambda path, *rest, **kw: (opened.append(str(path)), real(path, *rest, **kw))[1])
    with pytest.raises(CorruptFileError if len(shard) == 300 else UnsafeFileError):
        open_checkpoint(folder)
    assert [p for p in opened if p.endswith((".safetensors", "link"))] == []


@pytest.mark.parametrize("inside", [".", "runs/7"])
@pytest.mark.parametrize("shared", [False, True])
def test_links_of_the_hugging_face_cache_are_followed(shared, inside, tmp_path):
    repository = tmp_path / "cache" / "models--owner--name"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "abc" / inside
    blobs.mkdir(parents=True)
    real = save_shards(tmp_path / "real", random_model(SEVEN), "safetensors")
    snapshot.mkdir(parents=True)
    for file in real.iterdir():
        blob = blobs / f"hash-of-{file.name}"
        if shared:  # blobs of newer versions are links to what all repositories share
            stored = tmp_path / "cache" / "blobs" / "12" / blob.name
            stored.parent.mkdir(parents=True, exist_ok=True)
            stored.write_bytes(file.read_bytes())
            blob.symlink_to(stored)
        else:
            blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blob)
    with open_checkpoint(snapshot) as ck:
        assert ck.kind == "model"
    (repository / "snapshots").rename(repository / "elsewhere")  # now it is no such cache any more
    with pytest.raises(UnsafeFileError, match="outside its folder"):
        open_checkpoint(repository / "elsewhere" / "abc" / inside)


def test_an_index_that_disagrees_with_its_shards(shards):
    folder, index, write = shards
    shard = index["weight_map"]["emb.weight"]
    other = next(s for s in index["weight_map"].values() if s != shard)
    for changed, said in [
        (index["weight_map"] | {"emb.weight": "missing.safetensors"}, "missing.safetensors, which is not there"),
        (index["weight_map"] | {"emb.weight": other}, "lists emb.weight in"),
        (index["weight_map"] | {"more.weight": shard}, "lists more.weight in"),
        ({n: s for n, s in index["weight_map"].items() if n != "emb.weight"}, "does not list emb.weight"),
        ({"emb.weight": 3}, "no weight_map"),
        ([], "no weight_map"),
    ]:
        write({"weight_map": changed})
        with pytest.raises(LayoutError, match=said):
            open_checkpoint(folder)
    (folder / "model.safetensors.index.json").write_text("[" * 100_000)
    with pytest.raises(CorruptFileError, match="not JSON"):
        open_checkpoint(folder)


def test_one_name_in_two_shards(shards):
    folder, index, _ = shards
    for shard in set(index["weight_map"].values()):
        (folder / shard).unlink()
        save_file({"emb.weight": torch.ones(2)}, folder / shard)
    with pytest.raises(LayoutError, match="one file only"):
        open_checkpoint(folder)


def test_lora_is_not_mistaken_for_a_model(tmp_path):
    with open_checkpoint(save_as("pth", tmp_path, random_lora(SEVEN))) as ck:
        assert (ck.kind, ck.layout) == ("lora", None) and "adapter" in ck.reason
