"""An adapter goes in once: it is known again by its values, whatever file they come in, and by its training."""

import json

import pytest
import torch
from models import MATRICES, SEVEN, random_lora, random_model
from safetensors.torch import save_file
from tuned_files import write_adapter

from rwkv_lab import merge, open_checkpoint
from rwkv_lab.checkpoint import write_checkpoint
from rwkv_lab.checkpoint.origin import ORIGIN
from rwkv_lab.checkpoint.provenance import RECORD
from rwkv_lab.convert import convert
from rwkv_lab.errors import ParameterError
from rwkv_lab.merge import verify_merge
from rwkv_lab.merge.adapter_content import closeness, content_of, is_same, same_layers
from rwkv_lab.merge.contained_adapters import adapters_in
from rwkv_lab.model import RWKV_Dual
from rwkv_lab.peft import open_adapter, save_adapter

LORA = {n: 0.2 * t for n, t in random_lora(full=False, dtype=torch.float32).items()}
KINDS = [{"method": "miss"}, {"method": "pissa"}, {"method": "lora", "quant": "int8"}]
DAMAGED = [None, 3, {"blocks.0.att.key": 5}, {"blocks.0.att.key": "?"}, {"blocks.0.att.key": ""}]
UNDO = {"unmerge": True}


@pytest.fixture
def merged(tmp_path):
    """base.pth, a.pth, and m.pth with a.pth in it."""
    torch.save(random_model(dtype=torch.float32), tmp_path / "base.pth")
    torch.save(LORA, tmp_path / "a.pth")
    merge(tmp_path / "base.pth", tmp_path / "a.pth", tmp_path / "m.pth", alpha=4)
    return tmp_path


def cast(dtype):
    return lambda folder: torch.save({n: t.to(dtype) for n, t in LORA.items()}, folder / "again.pth")


def prefixed(folder):
    torch.save({f"model.{n}": t for n, t in LORA.items()}, folder / "again.pth")


def as_safetensors(folder):
    save_file({n: t.half() for n, t in LORA.items()}, folder / "again.pth")


def rebalanced(folder):
    """The same products from other halves."""
    torch.save({n: t * (8.0 if n.endswith("A") else 0.125) for n, t in LORA.items()}, folder / "again.pth")


def as_folder(folder):
    with open_adapter(folder / "a.pth", alpha=4) as adapter:
        save_adapter(adapter, folder / "again")
    (folder / "again").rename(folder / "again.pth")


def with_norms(folder):
    torch.save(LORA | {"blocks.0.ln1.weight": torch.ones(SEVEN.n_embd)}, folder / "again.pth")


def most_of_it(folder):
    torch.save({n: t for n, t in LORA.items() if "ffn.value" not in n}, folder / "again.pth")


def trained_on(folder):
    g = torch.Generator().manual_seed(9)
    torch.save({n: t + 0.001 * torch.randn(t.shape, generator=g) for n, t in LORA.items()}, folder / "again.pth")


FORMS = [cast(torch.float32), cast(torch.bfloat16), cast(torch.float16), cast(torch.float64), prefixed]
FORMS += [as_safetensors, rebalanced, as_folder, with_norms, most_of_it, trained_on]


def given(folder) -> dict:
    return {} if (folder / "again.pth").is_dir() else {"alpha": 4}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_values_in_another_file_are_refused(form, merged):
    form(merged)
    (merged / "a.pth").unlink()
    for dry_run in (True, False):
        with pytest.raises(
            ParameterError, match=r"m.pth contains a.pth already.*again.pth has the values of a.pth"
        ) as e:
            merge(merged / "m.pth", merged / "again.pth", merged / "o.pth", dry_run=dry_run, **given(merged))
        assert str(e.value).count("\n") <= 2
    assert not (merged / "o.pth").exists()


@pytest.mark.parametrize("form", [cast(torch.bfloat16), as_folder, prefixed])
def test_two_files_of_the_same_values_in_one_list_are_refused(form, merged):
    form(merged)
    alpha = [4, None] if (merged / "again.pth").is_dir() else 4
    with pytest.raises(ParameterError, match="a.pth and again.pth are the same adapter"):
        merge(merged / "base.pth", [merged / "a.pth", merged / "again.pth"], merged / "o.pth", alpha=alpha)
    assert not (merged / "o.pth").exists()


def test_others_go_in_and_are_counted(merged):
    torch.save(random_lora(full=False, seed=7), merged / "b.pth")
    result = merge(merged / "m.pth", merged / "b.pth", merged / "o.pth", alpha=4)
    assert all(c.passed for c in (*result.checks, *verify_merge(result)))
    with open_checkpoint(result.out) as ck:
        assert [one["name"] for one in adapters_in(ck)] == ["a.pth", "b.pth"]
    for name in ("a", "b"):
        with pytest.raises(ParameterError, match=f"contains {name}.pth already"):
            merge(result.out, merged / f"{name}.pth", merged / "p.pth", alpha=4)


def test_another_epoch_of_a_training_elsewhere_is_noted(merged):
    g = torch.Generator().manual_seed(9)
    torch.save({n: t + 0.08 * torch.randn(t.shape, generator=g) for n, t in LORA.items()}, merged / "later.pth")
    result = merge(merged / "m.pth", merged / "later.pth", merged / "o.pth", alpha=4)
    assert any("later.pth changes the layers much as a.pth does" in n for n in result.plan.notes)
    torch.save(random_lora(full=False, seed=7), merged / "b.pth")
    result = merge(merged / "m.pth", merged / "b.pth", merged / "o.pth", alpha=4, overwrite=True)
    assert not any("much as" in n for n in result.notes)


def test_what_goes_out_is_known_in_another_file_too(merged):
    cast(torch.float64)(merged)
    merge(merged / "m.pth", merged / "again.pth", merged / "o.pth", alpha=4, parameters=UNDO)
    with open_checkpoint(merged / "o.pth") as ck:
        assert not adapters_in(ck)
    with pytest.raises(ParameterError, match="with scaling"):
        merge(merged / "m.pth", merged / "again.pth", merged / "p.pth", alpha=8, parameters=UNDO)


def converted(to, *more):
    def write(folder):
        made = convert(folder / "m.pth", to, folder / f"m{SUFFIXES[to]}").outputs[0].path
        for again in more:
            made = convert(made, again, folder / f"again{SUFFIXES[again]}").outputs[0].path
        return made

    return write


SUFFIXES = {"safetensors": ".safetensors", "pth": "2.pth", "gguf": ".gguf", "fla": "-fla"}


@pytest.mark.parametrize("chain", [("safetensors",), ("pth",), ("gguf",), ("fla",), ("fla", "pth"), ("gguf", "fla")])
def test_a_converted_model_remembers_what_it_contains(chain, merged):
    base = converted(*chain)(merged)
    with pytest.raises(ParameterError, match="contains a.pth already"):
        merge(base, merged / "a.pth", merged / "o.pth", alpha=4)
    taken_out = merge(base, merged / "a.pth", merged / "o.pth", alpha=4, parameters=UNDO)
    with open_checkpoint(taken_out.out) as ck:
        assert not adapters_in(ck)


@pytest.mark.parametrize("layer", ["blocks.0.att.key", "blocks.1.ffn"])
def test_an_adapter_that_is_in_there_in_part_is_noted_with_the_number(layer, merged):
    part = {n: t for n, t in LORA.items() if layer in n}
    torch.save(part, merged / "part.pth")
    count = len(part) // 2
    said = f"a.pth changes {count} of 10 matrices as part.pth does, which the base contains: there the same change goes"
    base = merge(merged / "base.pth", merged / "part.pth", merged / "n.pth", alpha=4).out
    assert any(said in n for n in merge(base, merged / "a.pth", merged / "o.pth", alpha=4).notes)
    # Where they are left out, nothing goes in twice.
    for more in ({"exclude": [layer]}, {"weights": [{layer: 0}]}):
        result = merge(base, merged / "a.pth", merged / "o.pth", alpha=4, overwrite=True, **more)
        assert not any("goes in twice" in n for n in result.notes)
    for both in (["a.pth", "part.pth"], ["part.pth", "a.pth"]):
        with pytest.raises(ParameterError, match="are the same adapter, which goes in once"):
            merge(merged / "base.pth", [merged / one for one in both], merged / "p.pth", alpha=4)


def test_weights_that_differ_by_tensor_are_counted(merged):
    given = [{"blocks.0.att": 0, "blocks.0": 0.5}]
    notes = merge(merged / "base.pth", merged / "a.pth", merged / "o.pth", alpha=4, weights=given).plan.notes
    assert "a.pth goes in × 1 into 5, × 0 into 3, × 0.5 into 2 of its 10 tensors." in notes


def test_a_mix_remembers_the_values(merged):
    torch.save(random_model(dtype=torch.float32, seed=3), merged / "plain.pth")
    merge(merged / "plain.pth", merged / "m.pth", merged / "mix.pth", method="slerp")
    cast(torch.bfloat16)(merged)
    with pytest.raises(ParameterError, match="contains a.pth already"):
        merge(merged / "mix.pth", merged / "again.pth", merged / "o.pth", alpha=4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_is_known_again(kind, tmp_path):
    torch.save(random_model(dtype=torch.float32), tmp_path / "base.pth")
    adapter = write_adapter(tmp_path / "a.pth", tmp_path / "base.pth", lora_r=2, **kind)
    merge(tmp_path / "base.pth", adapter, tmp_path / "m.pth")
    with open_adapter(adapter) as one:
        save_adapter(one, tmp_path / "folder")
    with pytest.raises(ParameterError, match="contains a.pth already"):
        merge(tmp_path / "m.pth", tmp_path / "folder", tmp_path / "o.pth")


def test_the_plan_says_the_size_of_what_is_written(merged):
    torch.save(random_lora(full=False, seed=7), merged / "b.pth")
    for base, out in (("base.pth", "o.safetensors"), ("m.pth", "o.pth"), ("m.pth", "p.safetensors")):
        result = merge(merged / base, merged / "b.pth", merged / out, alpha=4)
        assert result.plan.output_bytes == result.out.stat().st_size


def test_sketches_tell_changes_apart(merged):
    contents = []
    for seed in range(6):
        torch.save(random_lora(full=False, seed=seed, dtype=torch.float32), merged / "x.pth")
        with open_adapter(merged / "x.pth", alpha=1) as adapter:
            contents.append(content_of(adapter))
    for i, one in enumerate(contents):
        assert is_same(one, one) and same_layers(one, one) == SEVEN.n_layer * len(MATRICES)
        assert not any(is_same(one, other) or closeness(one, other) for other in contents[:i])


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_record_is_no_adapter(content, merged):
    with open_checkpoint(merged / "m.pth") as ck:
        record, tensors = json.loads(ck.metadata["rwkv_lab.json"]), {n: ck[n] for n in ck}
    record["contains"][0]["content"] = content
    write_checkpoint(merged / "n.pth", tensors, {"rwkv_lab.json": json.dumps(record)})
    cast(torch.bfloat16)(merged)
    merge(merged / "n.pth", merged / "again.pth", merged / "o.pth", alpha=4)


def origin(training: str, weights=None) -> str:
    from rwkv_lab.checkpoint.origin import Origin

    return Origin("base.pth", weights or {}, "float32", "none", training).text()


def test_a_later_step_of_the_same_training_is_refused(merged):
    for step, training in ((3, "t1"), (4, "t1"), (5, "t2")):
        lora = random_lora(full=False, seed=step)
        write_checkpoint(merged / f"{step}.pth", lora, {ORIGIN: origin(training)})
    allowed = {"alpha": 4, "allow_other_base": True}
    out = merge(merged / "base.pth", merged / "3.pth", merged / "three.pth", **allowed).out
    with pytest.raises(ParameterError, match=r"contains 3.pth already.*4.pth is of the same training as 3.pth"):
        merge(out, merged / "4.pth", merged / "o.pth", **allowed)
    with pytest.raises(ParameterError, match="3.pth and 4.pth are the same adapter"):
        merge(merged / "base.pth", [merged / "3.pth", merged / "4.pth"], merged / "o.pth", **allowed)
    merge(out, merged / "5.pth", merged / "o.pth", **allowed)


def from_pretrained_and_saved(folder):
    return RWKV_Dual.from_pretrained(folder / "m.pth", dtype="bfloat16").save_pretrained(folder / "saved")


def saved_twice(folder):
    again = RWKV_Dual.from_pretrained(from_pretrained_and_saved(folder).parent)
    return again.save_pretrained(folder / "saved again").parent


def changed_and_saved(folder):
    model = RWKV_Dual.from_pretrained(folder / "m.pth")
    with torch.no_grad():
        model.head.weight.mul_(1.1)
    return model.save_pretrained(folder / "changed")


@pytest.mark.parametrize("write", [from_pretrained_and_saved, saved_twice, changed_and_saved])
def test_what_is_in_a_model_stands_in_files_that_it_is_written_to(write, merged):
    made = write(merged)
    with open_checkpoint(made) as ck:
        assert [one["name"] for one in adapters_in(ck)] == ["a.pth"]
    with pytest.raises(ParameterError, match="contains a.pth already"):
        merge(made, merged / "a.pth", merged / "o.pth", alpha=4)
    if write in (from_pretrained_and_saved, saved_twice):
        merge(made, merged / "a.pth", merged / "o.pth", alpha=4, parameters=UNDO)
    else:  # how much of it is left is unknown
        with pytest.raises(ParameterError):
            merge(made, merged / "a.pth", merged / "o.pth", alpha=4, parameters=UNDO)


def test_a_model_of_no_merge_is_saved_without_a_record(merged):
    file = RWKV_Dual.from_pretrained(merged / "base.pth").save_pretrained(merged / "saved")
    with open_checkpoint(file) as ck:
        assert RECORD not in ck.metadata
