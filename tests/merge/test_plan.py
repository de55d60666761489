"""The plan comes from headers, says exactly what will be, and the same merge gives the same file."""

import hashlib
import os
import subprocess
import sys

import pytest
import torch
from models import SEVEN, random_lora, random_model, random_state, snapshot
from safetensors.torch import save_file

from rwkv_lab import merge, open_checkpoint
from rwkv_lab.checkpoint import Layout, write_checkpoint
from rwkv_lab.errors import OutputError, ParameterError
from rwkv_lab.merge import verify_merge


@pytest.fixture
def files(tmp_path):
    for name, tensors in {"base": random_model(), "state": random_state(), "lora": random_lora()}.items():
        torch.save(tensors, tmp_path / f"{name}.pth")
        save_file(tensors, tmp_path / f"{name}.safetensors")
    return tmp_path


@pytest.mark.parametrize("out", ["out.pth", "out.safetensors"])
@pytest.mark.parametrize("tuned", ["state", "lora"])
def test_a_dry_run_reads_headers_and_writes_nothing(tuned, out, files, reads):
    before = snapshot(files)
    data = {}
    for name in ("base.pth", f"{tuned}.pth"):
        with open_checkpoint(files / name) as ck:
            data[name] = [(t.offset, t.offset + t.span) for t in ck.info.values()]
    reads.clear()
    given = (files / "base.pth", files / f"{tuned}.pth", files / out)
    result = merge(*given, alpha=1.0, dry_run=True)
    assert [r for r in reads if r[2] > 512 and any(max(r[1], a) < min(r[2], b) for a, b in data[r[0]])] == []
    assert snapshot(files) == before and result.outputs == () and result.checks == ()
    done = merge(*given, alpha=1.0)
    assert done.plan.rows == result.plan.rows and done.plan.output_bytes == given[2].stat().st_size
    assert done.recipe == result.recipe and done.inputs == result.inputs


def test_a_dry_run_on_safetensors_reads_a_sample_of_each_tensor_at_most(tmp_path, reads):
    """They carry no checksums, so the fingerprint takes the first 4 KiB of each."""
    base = random_model() | {"extra.large": torch.zeros(1_000_000)}
    save_file(base, tmp_path / "base.safetensors")
    save_file(random_state(), tmp_path / "state.safetensors")
    given = (tmp_path / "base.safetensors", tmp_path / "state.safetensors", tmp_path / "o.pth")
    result = merge(*given, dry_run=True, allow_extra=["extra.*"])
    assert sum(end - start for _, start, end in reads) < 60_000 < 4_000_000 < result.plan.output_bytes


def test_rows_say_what_happens_to_each_tensor(files):
    base, out = files / "base.pth", files / "out.pth"
    plan = merge(base, files / "state.pth", out, dry_run=True).plan
    assert plan.method == "state" and plan.layout.version == "7.0" and plan.layout.n_layer == SEVEN.n_layer
    actions = {r.name: (r.action, r.source, r.dtype) for r in plan.rows}
    assert actions["emb.weight"] == ("copy", "base", torch.bfloat16)
    assert actions["blocks.0.att.time_state"] == ("add", "tuned", torch.float32)
    assert [r.name for r in plan.changed] == [f"blocks.{i}.att.time_state" for i in range(2)]
    assert [r.name for r in plan.rows][: len(random_model())] == list(random_model())
    plan = merge(base, files / "lora.pth", out, alpha=1.0, dtype="fp16", dry_run=True).plan
    actions = {r.name: (r.action, r.source, r.dtype) for r in plan.rows}
    assert actions["blocks.0.att.key.weight"] == ("lora", "base + tuned", torch.float16)
    assert actions["blocks.0.ln1.weight"] == ("overlay", "tuned", torch.float16)
    assert actions["emb.weight"] == ("cast", "base", torch.float16)
    assert all(r.nbytes == torch.Size(r.shape).numel() * 2 for r in plan.rows)
    torch.save(random_model(seed=1), files / "tuned.pth")
    plan = merge(base, files / "tuned.pth", out, alpha=0.5, dry_run=True).plan
    assert {r.action for r in plan.rows} == {"blend"}
    assert plan.disk_free > 0 and 0 < plan.memory_needed < plan.memory_free


@pytest.mark.parametrize("out", ["o.pth", "o.safetensors"])
@pytest.mark.parametrize("tuned", ["state.pth", "lora.safetensors"])
def test_the_same_merge_gives_the_same_file(tuned, out, files, tmp_path, monkeypatch):
    given = {"alpha": 1.0}
    first = merge(files / "base.pth", files / tuned, files / out, **given)
    content, beside = (files / out).read_bytes(), first.outputs[1].path.read_bytes()
    (tmp_path / "elsewhere").mkdir()
    for name in ("base.pth", tuned):
        os.rename(files / name, tmp_path / "elsewhere" / name)
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr("rwkv_lab.checkpoint.stream.WORKERS", 1)
    again = merge("base.pth", tuned, out, **given)
    assert (tmp_path / "elsewhere" / out).read_bytes() == content
    assert again.outputs[1].path.read_bytes() == beside
    again = merge("base.pth", tuned, out, overwrite=True, **given)
    assert (tmp_path / "elsewhere" / out).read_bytes() == content
    assert all(c.passed for c in verify_merge(again))


def test_fingerprints_of_whole_files(files):
    result = merge(files / "base.pth", files / "state.pth", files / "o.pth", hash="sha256")
    for facts in result.inputs:
        assert facts.fingerprint == "sha256:" + hashlib.sha256(facts.path.read_bytes()).hexdigest()
        assert facts.bytes == facts.path.stat().st_size
    assert result.plan.output_bytes == (files / "o.pth").stat().st_size


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_permissions_follow_the_umask(mask, files):
    before = os.umask(mask)
    try:
        result = merge(files / "base.pth", files / "state.pth", files / "o.pth")
    finally:
        os.umask(before)
    assert {f.path.stat().st_mode & 0o777 for f in result.outputs} == {0o666 & ~mask}


def test_an_older_output_is_replaced_only_when_told(files):
    given = (files / "base.pth", files / "state.pth", files / "o.pth")
    merge(*given)
    with pytest.raises(OutputError, match="exists"):
        merge(*given, alpha=0.5)
    merge(*given, alpha=0.5, overwrite=True)
    assert torch.load(files / "o.pth", weights_only=True)["blocks.0.att.time_state"].abs().max() < 3


def test_a_link_as_the_output_is_replaced_and_not_followed(files, tmp_path):
    (files / "elsewhere.pth").write_text("precious")
    (files / "o.pth").symlink_to("elsewhere.pth")
    merge(files / "base.pth", files / "state.pth", files / "o.pth", overwrite=True)
    assert (files / "elsewhere.pth").read_text() == "precious" and not (files / "o.pth").is_symlink()


@pytest.mark.parametrize("way", ["inside", "link into", "link out of", "dotted"])
def test_the_allowed_folder(way, files):
    allowed, other = files / "allowed", files / "other"
    allowed.mkdir()
    other.mkdir()
    (files / "into").symlink_to(allowed)
    (allowed / "out").symlink_to(other)
    out, fits = {
        "inside": (allowed / "o.pth", True),
        "link into": (files / "into" / "o.pth", True),
        "link out of": (allowed / "out" / "o.pth", False),
        "dotted": (allowed / ".." / "o.pth", False),
    }[way]
    given = (files / "base.pth", files / "state.pth", out)
    if fits:
        merge(*given, allowed_dir=allowed)
        return
    with pytest.raises(OutputError, match="outside"):
        merge(*given, allowed_dir=allowed)
    with pytest.raises(ParameterError, match="not a folder"):
        merge(*given, allowed_dir=files / "nothing")


def test_shards_are_inputs_too(tmp_path):
    write_checkpoint(tmp_path / "base", random_model(), max_shard_size=9000)
    torch.save(random_state(), tmp_path / "state.pth")
    shard = next((tmp_path / "base").glob("*00002-of*"))
    before = snapshot(tmp_path)
    with pytest.raises(OutputError, match="is the input"):
        merge(tmp_path / "base", tmp_path / "state.pth", shard, overwrite=True)
    assert snapshot(tmp_path) == before


def test_memory_does_not_grow_with_the_tensors(files, warm):
    """Peak of a process that blends two models of 100 MB, by the system's own count, after a small merge warmed it."""
    layout = Layout("4.0", 1, 64, 64, 64, 200_000, 0, 0)
    for seed, name in enumerate(("large", "tuned")):
        write_checkpoint(files / f"{name}.pth", random_model(layout, torch.float32, seed))
    torch.save(random_model(seed=1), files / "small.pth")
    code = (
        "import os, sys; from rwkv_lab import merge; os.chdir(sys.argv[1])\n"
        "peak = lambda: int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])\n"
        "warm = merge('base.pth', 'small.pth', 'warm.pth', alpha=0.5).plan.memory_needed; before = peak()\n"
        "planned = merge('large.pth', 'tuned.pth', 'out.pth', alpha=0.5).plan.memory_needed\n"
        "print(peak() - before, planned, warm)"
    )
    if sys.platform != "linux":
        pytest.skip("the system does not tell a process its peak of memory (/proc/self/status)")
    done = subprocess.run(
        [warm.python, "-c", code, files], env=warm.environment, capture_output=True, text=True, check=True
    )
    grown, planned, small = map(int, done.stdout.split())
    assert (files / "out.pth").stat().st_size > 100_000_000
    assert grown * 1024 < planned == small < 110_000_000  # the plan is a bound, and the same for any size
