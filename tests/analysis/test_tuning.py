"""A tuned file beside its base: the values that it gives are those of the model that was trained."""

import pytest
import torch
from random_models import make_layout, write_model
from tuned_files import ADAPTERS, write_state, write_tuned

from rwkv_lab.analysis.tuning import TuningOptions, check_tuning, open_tuning, select_tensors, tensor_part
from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint
from rwkv_lab.errors import LayoutError, NumericsError, ParameterError
from rwkv_lab.merge import merge

WORDS = {
    "lora": "a LoRA of rank 3 on 12 matrices",
    "lora-besides": "a LoRA of rank 3 on 2 matrices",
    "pissa-nf4": "a PiSSA adapter of rank 3 on 12 matrices",
    "bat-int8": "a MiSS adapter of rank 4 on 12 matrices",
    "state": "a tuned state",
    "model": "a fine-tune of the whole model",
    "norms": "a fine-tune of a part of the model",
}


@pytest.mark.parametrize("kind", WORDS)
def test_what_is_added_to_the_base_is_what_a_merge_adds(kind, base, tmp_path):
    path = write_tuned(tmp_path / "t.pth", base, kind)
    result = merge(base, path, tmp_path / "m.pth", precision="float64")
    with open_tuning(base, path) as t, open_checkpoint(result.out) as merged:
        assert str(t) == WORDS[kind] and t.changed_names() == t.names()
        for name in t.names():
            expected, found = merged[name].double(), t.after(name)
            torch.testing.assert_close(found, expected.view_as(found), rtol=1e-6, atol=1e-7)
            if t.quant == "none":
                added = t.after(name) - t.before(name)
                torch.testing.assert_close(t.delta(name), added, rtol=0, atol=1e-12)


def test_a_base_in_fewer_bits_is_taken_as_training_had_it(base, tmp_path):
    with open_tuning(base, write_tuned(tmp_path / "t.pth", base, "bat-int8")) as t, open_checkpoint(base) as ck:
        for name in ("blocks.0.att.key.weight", "blocks.1.ffn.value.weight"):
            off = (t.before(name) - ck[name].double()).abs().max()
            assert t.is_quantised(name) and 0 < off < 0.02 * ck[name].abs().max()
        assert not t.is_quantised("head.weight")


def test_states_of_all_layers(base, tmp_path):
    path = write_state(tmp_path / "s.pth", base)
    with open_tuning(base, path) as t, open_checkpoint(path) as ck:
        assert t.state_names == list(ck.info) and torch.equal(t.state(t.after)[1], ck[t.state_names[1]].double())
        assert not t.state(t.before).any()
        write_checkpoint(tmp_path / "one.pth", {t.state_names[0]: ck[t.state_names[0]]})
    with open_tuning(base, write_tuned(tmp_path / "l.pth", base, "lora")) as t:
        assert t.state_names == []


def test_options_that_a_file_does_not_state(base, tmp_path):
    path = write_tuned(tmp_path / "t.pth", base, "lora")
    with open_checkpoint(path) as ck:
        write_checkpoint(tmp_path / "silent.pth", {n: ck[n] for n in ck})
    with pytest.raises(ParameterError, match="alpha="):
        check_tuning(tmp_path / "silent.pth", TuningOptions())
    check_tuning(tmp_path / "silent.pth", TuningOptions(), direction_only=True)
    with (
        open_tuning(base, tmp_path / "silent.pth", TuningOptions(alpha=ADAPTERS["lora"]["lora_alpha"])) as silent,
        open_tuning(base, path) as known,
        open_tuning(base, tmp_path / "silent.pth", direction_only=True) as direction,
    ):
        name = known.names()[0]
        assert torch.equal(silent.delta(name), known.delta(name))
        torch.testing.assert_close(5 * direction.delta(name), known.delta(name), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("state", TuningOptions(alpha=2.0), "are of adapters"),
        ("lora", TuningOptions(parameters={"unmerge": True}), "nothing is merged"),
        ("lora", TuningOptions(parameters={"alhpa": 1}), "alhpa"),
        ("lora", TuningOptions(alpha=2.0), "alpha"),
    ],
)
def test_options_that_do_not_fit_are_refused(base, tmp_path, kind, options, words):
    path = write_tuned(tmp_path / "t.pth", base, kind)
    with pytest.raises(ParameterError, match=words):
        check_tuning(path, options)


def test_files_that_do_not_go_together_are_refused(base, tmp_path):
    other = write_model(tmp_path / "other.safetensors", make_layout("7.0", n_layer=3))
    more = write_tuned(tmp_path / "more.pth", other, "state")
    with pytest.raises(LayoutError, match="layers"), open_tuning(base, more):
        pass
    with pytest.raises(ParameterError, match="same file"), open_tuning(base, base):
        pass


def test_a_tuning_that_changes_nothing_and_one_with_nan_are_refused(base, tmp_path):
    with open_tuning(base, write_tuned(tmp_path / "t.pth", base, "lora", size=0.0)) as t:
        with pytest.raises(ParameterError, match="t.pth changes nothing"):
            t.changed_names()
    with open_checkpoint(write_state(tmp_path / "s.pth", base)) as ck:
        states = {n: ck[n] for n in ck}
    states["blocks.1.att.time_state"][0, 0, 0] = torch.nan
    write_checkpoint(tmp_path / "nan.pth", states)
    with open_tuning(base, tmp_path / "nan.pth") as t, pytest.raises(NumericsError, match="nan.pth"):
        t.changed_names()


def test_parts_and_selections():
    names = ["emb.weight", "blocks.0.ln1.bias", "blocks.0.att.ln_x.weight", "blocks.11.att.key.weight", "ln_out.bias"]
    assert [tensor_part(n) for n in names] == ["emb", "ln", "ln", "att.key", "ln"]
    assert tensor_part("blocks.0.att.w1") == "att, the rest"
    assert tensor_part("blocks.0.att.time_state") == "att.time_state"
    assert select_tensors(names, []) == names
    assert select_tensors(names, ["key", "ln_out.*"]) == [names[3], names[4]]
    with pytest.raises(ParameterError, match="targets: the pattern 'att.kye' matches none"):
        select_tensors(names, ["key", "att.kye"])
