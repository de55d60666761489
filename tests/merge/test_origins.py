"""Which base tuned files belong to, and LoRAs that are none: what they say themselves, and what their values say."""

import json
from dataclasses import replace

import pytest
import torch
from models import LAYOUTS, SEVEN, random_lora, random_model, random_state
from safetensors.torch import save_file
from tuned_files import write_adapter

from rwkv_lab import merge, open_checkpoint
from rwkv_lab.checkpoint import Layout, write_checkpoint
from rwkv_lab.checkpoint.origin import ORIGIN, Origin, origin_of, same_weights, weights_of
from rwkv_lab.convert import convert
from rwkv_lab.errors import ParameterError
from rwkv_lab.merge import verify_merge
from rwkv_lab.peft import open_adapter, save_adapter, save_pissa_init

BASE = random_model(dtype=torch.float32)
OTHER = BASE | {"blocks.1.ln2.bias": BASE["blocks.1.ln2.bias"] + 0.1}  # one vector of it


def origin(folder, quant="none", training="t") -> dict[str, str]:
    with open_checkpoint(folder / "base.pth") as ck:
        return {ORIGIN: Origin("base.pth", weights_of(ck), "float32", quant, training).text()}


@pytest.fixture
def files(tmp_path):
    """base.pth, and state.pth, lora.pth and tuned.pth, which say that they were trained on it."""
    torch.save(BASE, tmp_path / "base.pth")
    torch.save(OTHER, tmp_path / "other.pth")
    note = origin(tmp_path)
    write_checkpoint(tmp_path / "state.pth", random_state(), note)
    write_checkpoint(tmp_path / "lora.pth", random_lora(full=False), note)
    write_checkpoint(tmp_path / "tuned.pth", random_model(seed=4), note)
    return tmp_path


def given(tuned: str) -> dict:
    return {"alpha": 4} if "lora" in tuned else {}


@pytest.mark.parametrize("tuned", ["state.pth", "lora.pth"])
def test_another_base_is_refused_unless_it_is_allowed(tuned, files):
    for dry_run in (True, False):
        with pytest.raises(ParameterError, match=rf"(?s){tuned} was trained on base.pth.*allow_other_base=True") as e:
            merge(files / "other.pth", files / tuned, files / "o.pth", dry_run=dry_run, **given(tuned))
        assert str(e.value).count("\n") <= 2
    assert not (files / "o.pth").exists()
    result = merge(files / "other.pth", files / tuned, files / "o.pth", allow_other_base=True, **given(tuned))
    assert any(n == f"{tuned} was trained on base.pth; this base has other weights." for n in result.plan.notes)
    assert result.recipe == merge(files / "base.pth", files / tuned, files / "p.pth", **given(tuned)).recipe


def in_shards(folder):
    write_checkpoint(folder / "same", BASE, max_shard_size=9000)


def as_safetensors(folder):
    save_file(BASE, folder / "same")


def cast_to(dtype):
    return lambda folder: torch.save({n: t.to(dtype) for n, t in BASE.items()}, folder / "same")


def flat_and_reversed(folder):
    torch.save({n: t.reshape(-1) if t.numel() == t.shape[-1] else t for n, t in [*BASE.items()][::-1]}, folder / "same")


def wrapped(folder):
    torch.save({f"module._orig_mod.{n}": t for n, t in BASE.items()}, folder / "same")


def converted(folder):
    convert(folder / "base.pth", "fla", folder / "same")


def with_a_state(folder):
    torch.save(BASE | random_state(seed=8), folder / "same")


SAME = [in_shards, as_safetensors, *(cast_to(d) for d in (torch.bfloat16, torch.float16, torch.float64)), with_a_state]


@pytest.mark.parametrize("form", [*SAME, flat_and_reversed, wrapped, converted])
def test_the_same_base_in_another_file_is_known(form, files):
    form(files)
    for tuned in ("state.pth", "lora.pth"):
        notes = merge(files / "same", files / tuned, files / "o.pth", dry_run=True, **given(tuned)).plan.notes
        assert not any("trained on" in n for n in notes)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_a_base_of_sixteen_bits_is_known_in_other_dtypes(stored, tmp_path):
    torch.save({n: t.to(stored) for n, t in BASE.items()}, tmp_path / "base.pth")
    with open_checkpoint(tmp_path / "base.pth") as ck:
        first = weights_of(ck)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        torch.save({n: t.to(stored).to(dtype) for n, t in BASE.items()}, tmp_path / "same.pth")
        with open_checkpoint(tmp_path / "same.pth") as ck:
            assert same_weights(weights_of(ck), first)


@pytest.fixture
def large(tmp_path):
    """A base with an embedding of more values than a fingerprint takes, another whose last row differs, and what was
    trained on the first."""
    values = random_model(replace(SEVEN, vocab_size=999), dtype=torch.float32)
    torch.save(values, tmp_path / "base.pth")
    values["emb.weight"][-1] += 1
    torch.save(values, tmp_path / "last row.pth")
    write_checkpoint(tmp_path / "state.pth", random_state(), origin(tmp_path))
    return tmp_path


def test_a_base_of_which_only_the_last_row_differs_is_another(large):
    notes = merge(large / "base.pth", large / "state.pth", large / "o.pth", dry_run=True).plan.notes
    assert not any("trained on" in n for n in notes)
    with pytest.raises(ParameterError, match="was trained on base.pth"):
        merge(large / "last row.pth", large / "state.pth", large / "o.pth")
    for base in ("base.pth", "last row.pth"):
        result = merge(large / base, large / "state.pth", large / f"o {base}", allow_other_base=True)
        assert result.plan.output_bytes == result.out.stat().st_size


def test_fingerprints_of_earlier_versions_are_still_known(large):
    with open_checkpoint(large / "base.pth") as ck:
        now = weights_of(ck)
    earlier = {name: now[name] for name in ("float32", "float16", "bfloat16")}
    assert len(now) == 6 and same_weights(now, earlier) and same_weights(earlier, now)
    note = {ORIGIN: Origin("base.pth", earlier, "float32", "none", "t").text()}
    write_checkpoint(large / "earlier.pth", random_state(), note)
    merge(large / "base.pth", large / "earlier.pth", large / "o.pth")
    torch.save(OTHER, large / "third.pth")
    with pytest.raises(ParameterError):
        merge(large / "third.pth", large / "earlier.pth", large / "o2.pth")


def test_what_was_made_from_the_base_takes_its_adapters_and_says_so(files):
    first = merge(files / "base.pth", files / "lora.pth", files / "first.pth", alpha=4).out
    write_checkpoint(files / "b.pth", random_lora(full=False, seed=9), origin(files, training="u"))
    second = merge(first, files / "b.pth", files / "second.safetensors", alpha=4)
    assert any("b.pth was trained on base.pth, which this base was made from." in n for n in second.plan.notes)
    assert second.plan.output_bytes == second.out.stat().st_size
    third = merge(second.out, files / "state.pth", files / "third.pth")
    assert any("state.pth was trained on base.pth, which this base" in n for n in third.plan.notes)
    with open_checkpoint(third.out) as ck:
        assert len(json.loads(ck.metadata["rwkv_lab.json"])["bases"]) == 3


@pytest.mark.parametrize(("to", "out"), [("pth", "c.pth"), ("fla", "c"), ("gguf", "c.gguf")])
def test_what_was_converted_still_says_its_base(to, out, files):
    convert(files / "lora.pth", "pth", files / "l.pth", alpha=4)
    convert(files / "state.pth", "safetensors", files / "s.safetensors")
    base = convert(files / "other.pth", to, files / out).outputs[0].path
    for tuned in ("l.pth", "s.safetensors"):
        with pytest.raises(ParameterError, match="was trained on base.pth"):
            merge(base, files / tuned, files / "o.pth")


def test_a_base_that_was_rounded_takes_its_adapters_and_says_so(files):
    layout = Layout("7.0", 2, 32, 32, 64, 32, 2, 16, LAYOUTS["7.0"].ranks)
    torch.save(random_model(layout, torch.float32), files / "base.pth")
    write_checkpoint(files / "s.pth", random_state(layout), origin(files))
    rounded = convert(files / "base.pth", "gguf", files / "q.gguf", dtype="q8_0").outputs[0].path
    notes = merge(rounded, files / "s.pth", files / "o.pth", dry_run=True).plan.notes
    assert "s.pth was trained on base.pth, which this base was made from." in notes
    record = convert(files / "q.gguf", "gguf", files / "again.gguf", dtype="q8_0").outputs[0].path
    assert record.exists()  # a second time too
    with open_checkpoint(rounded) as ck:
        tensors = {n: ck[n] for n in ck}
    torch.save(tensors, files / "restored.pth")
    with pytest.raises(ParameterError, match="was trained on base.pth"):
        merge(files / "restored.pth", files / "s.pth", files / "o.pth")


def test_files_that_do_not_say_get_a_note(files):
    torch.save(random_state(), files / "mine.pth")
    torch.save(random_lora(full=False), files / "yours.pth")
    for tuned, more in (("mine.pth", {}), ("yours.pth", {"alpha": 4})):
        notes = merge(files / "base.pth", files / tuned, files / "o.pth", dry_run=True, **more).plan.notes
        assert any(n == f"{tuned} does not say on which base it was trained." for n in notes)
    for tuned in ("tuned.pth", "other.pth"):
        notes = merge(files / "base.pth", files / tuned, files / "o.pth", dry_run=True).plan.notes
        assert not any("does not say" in n for n in notes)


def test_a_whole_model_of_another_base_goes_in_with_a_note(files):
    result = merge(files / "other.pth", files / "tuned.pth", files / "o.pth", method="task_arithmetic")
    assert any("tuned.pth was trained on base.pth; this base has other weights." in n for n in result.notes)


def test_a_state_that_was_trained_on_a_quantised_base_is_noted(files):
    write_checkpoint(files / "q.pth", random_state(), origin(files, quant="nf4"))
    notes = merge(files / "base.pth", files / "q.pth", files / "o.pth", dry_run=True).plan.notes
    assert any("q.pth was trained on a base stored in nf4" in n for n in notes)


@pytest.mark.parametrize(
    "note", ["", "[]", "{}", '{"base": 1}', "[" * 9999, '{"base":"a","weights":3,"dtype":"","quant":"","training":""}']
)
def test_a_note_that_cannot_be_understood_is_none(note, files):
    write_checkpoint(files / "odd.pth", random_state(), {ORIGIN: note})
    with open_checkpoint(files / "odd.pth") as ck:
        assert origin_of(ck) is None
    merge(files / "base.pth", files / "odd.pth", files / "o.pth")


def test_the_note_goes_along_into_every_format(files):
    with open_adapter(files / "lora.pth", alpha=4) as adapter:
        save_adapter(adapter, files / "folder")
        save_adapter(adapter, files / "again.safetensors")
    for name in ("folder", "again.safetensors"):
        with pytest.raises(ParameterError, match="was trained on base.pth"):
            merge(files / "other.pth", files / name, files / "o.pth")
    write_adapter(files / "p.pth", files / "base.pth", method="pissa", lora_r=2)
    with open_checkpoint(files / "p.pth") as ck:
        tensors, notes = {n: ck[n] for n in ck}, ck.metadata
    write_checkpoint(files / "pissa.pth", tensors, notes | origin(files))
    with open_adapter(files / "pissa.pth") as adapter:
        save_pissa_init(adapter, files / "init.pth")
    with open_checkpoint(files / "init.pth") as ck:
        assert origin_of(ck).base == "base.pth"


# ---------------------------------------------------------------------- PiSSA as a LoRA


@pytest.fixture(params=[1.0, 0.5], ids=["as RWKV-PEFT scales it", "as peft scales it"])
def pissa(request, tmp_path):
    """base.pth, and lora.pth with the names of a LoRA: trained halves of a PiSSA whose start is left out."""
    torch.save(BASE, tmp_path / "base.pth")
    g = torch.Generator().manual_seed(3)
    tensors = {}
    for name, weight in BASE.items():
        if name.startswith("blocks.") and weight.dim() == 2 and name.endswith(".weight"):
            u, s, vh = torch.linalg.svd(weight / request.param)
            halves = {"A": s[:3, None].sqrt() * vh[:3], "B": u[:, :3] * s[:3].sqrt()}
            for half, values in halves.items():
                tensors[f"{name[:-7]}.lora_{half}"] = values + 0.03 * torch.randn(values.shape, generator=g)
    torch.save(tensors, tmp_path / "lora.pth")
    return tmp_path, 3 * request.param


def test_a_pissa_given_as_a_lora_is_asked_about(pissa):
    folder, own = pissa
    for alpha in (own, 3.0):
        with pytest.raises(
            ParameterError, match="lora.pth looks like PiSSA.*(\n.*)*pissa_init=(.*\n)*.*method='lora'"
        ) as e:
            merge(folder / "base.pth", folder / "lora.pth", folder / "o.pth", alpha=alpha)
        assert str(e.value).count("\n") <= 2 and not (folder / "o.pth").exists()
    result = merge(folder / "base.pth", folder / "lora.pth", folder / "o.pth", method="lora", alpha=own)
    assert all(c.passed for c in verify_merge(result))


def test_loras_of_any_size_are_not_taken_for_pissa(tmp_path):
    torch.save(BASE, tmp_path / "base.pth")
    for seed in range(20):
        for size in (0.01, 0.1, 1.0):
            lora = {n: size * t for n, t in random_lora(full=False, seed=seed, dtype=torch.float32).items()}
            torch.save(lora, tmp_path / "lora.pth")
            result = merge(tmp_path / "base.pth", tmp_path / "lora.pth", tmp_path / "o.pth", alpha=4, overwrite=True)
            assert not result.seen


def test_a_pissa_in_some_matrices_of_an_adapter_is_found(pissa):
    folder, own = pissa
    tensors = torch.load(folder / "lora.pth")
    some = {n: t if ".0.ffn." in n or n.endswith("A") else torch.zeros_like(t) for n, t in tensors.items()}
    torch.save(some, folder / "lora.pth")
    with pytest.raises(ParameterError, match="lora.pth looks like PiSSA: in 2 of 2 matrices"):
        merge(folder / "base.pth", folder / "lora.pth", folder / "o.pth", alpha=own)
    g = torch.Generator().manual_seed(5)
    other = {n: t if ".0.ffn.key" in n else 0.05 * torch.randn(t.shape, generator=g) for n, t in tensors.items()}
    torch.save(other, folder / "lora.pth")
    result = merge(folder / "base.pth", folder / "lora.pth", folder / "o.pth", alpha=own)
    assert any(
        "In 1 of" in n and "lora.pth holds what the base does itself (first blocks.0.ffn.key" in n for n in result.notes
    )


@pytest.mark.parametrize("size", [0.33, 0.2])
def test_what_another_program_merged_already_is_noted(size, tmp_path):
    layout = Layout("7.0", 6, 64, 64, 128, 11, 4, 16, LAYOUTS["7.0"].ranks)
    base, lora = random_model(layout, torch.float32), random_lora(layout, full=False, dtype=torch.float32)
    lora = {n: size * t for n, t in lora.items()}
    torch.save(lora, tmp_path / "lora.pth")
    torch.save(base, tmp_path / "plain.pth")
    for name in base:
        half = name.replace(".weight", ".lora_A")
        base[name] = base[name] + lora[half.replace("_A", "_B")] @ lora[half] if half in lora else base[name]
    torch.save(base, tmp_path / "base.pth")
    result = merge(tmp_path / "base.pth", tmp_path / "lora.pth", tmp_path / "o.pth", alpha=3)
    assert any("seems to be in the base already" in n for n in result.notes)
    assert not merge(tmp_path / "plain.pth", tmp_path / "lora.pth", tmp_path / "p.pth", alpha=3).seen


# ---------------------------------------------------------------------- attention alone


@pytest.mark.parametrize("version", ["5.2", "6.0", "7.0"])
def test_an_adapter_of_attention_alone_may_be_of_other_generations(version, tmp_path):
    layout = LAYOUTS[version]
    torch.save(random_model(layout), tmp_path / "base.pth")
    lora = {n: t for n, t in random_lora(layout, full=False).items() if ".att." in n}
    torch.save(lora, tmp_path / "lora.pth")
    notes = merge(tmp_path / "base.pth", tmp_path / "lora.pth", tmp_path / "o.pth", alpha=4, dry_run=True).plan.notes
    assert any("adapts attention alone (6 matrices)" in n and "nothing in it says" in n for n in notes)
    torch.save(random_lora(layout, full=False), tmp_path / "both.pth")
    notes = merge(tmp_path / "base.pth", tmp_path / "both.pth", tmp_path / "o.pth", alpha=4, dry_run=True).plan.notes
    assert not any("attention alone" in n for n in notes)
