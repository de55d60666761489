"""Adapters that are broken, that belong elsewhere, or that do not say enough: refused, each in words."""

import json
import re
import shutil

import pytest
import torch
from models import snapshot
from random_models import VERSIONS, make_layout
from safetensors.torch import load_file, save_file
from test_adapter_files import X, in_layout_of, written
from trained import CONFIGS, as_if_trained

from rwkv_lab import RWKV_Dual, open_checkpoint
from rwkv_lab.checkpoint import write_checkpoint
from rwkv_lab.errors import CorruptFileError, LayoutError, NumericsError, OutputError, ParameterError, UnsafeFileError
from rwkv_lab.peft import (
    Adapter,
    LoraConfig,
    LoraTarget,
    adapter_of,
    load_adapter,
    open_adapter,
    refuse_overlap,
    save_adapter,
    save_pissa_init,
)

ASKED = {
    "lora": {"alpha": 8},
    "bone": {},
    "hf": {"bat": "hf"},
    "rwkv-peft": {"bat": "rwkv-peft"},
}


def load(base, path, version="7.0", **asked):
    """The base with the adapter; what it was before, it still is when that fails."""
    model = RWKV_Dual.from_pretrained(base(version))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with open_adapter(path, **asked) as adapter:
        try:
            load_adapter(model, adapter)
        except Exception:
            after = model.state_dict()
            assert after.keys() == before.keys() and all(torch.equal(after[n], t) for n, t in before.items())
            raise


# ------------------------------------------------------------------------- what the file does not state


def test_a_missing_alpha_is_refused(tmp_path):
    path = written(tmp_path / "a.pth", in_layout_of("lora"))
    with pytest.raises(ParameterError, match="does not state its alpha.*\n.*pissa_init"):
        open_adapter(path)
    finite, positive = "alpha=.*it must be a finite number or None", "positive number"
    said = {0: positive, -1: positive, float("nan"): finite, float("inf"): finite, "8": finite, True: finite}
    for alpha, words in said.items():
        with pytest.raises(ParameterError, match=words):
            open_adapter(path, alpha=alpha)


@pytest.mark.parametrize("variant", ["hf", "rwkv-peft"])
def test_an_ambiguous_bat_is_refused(tmp_path, variant):
    path = written(tmp_path / "a.pth", in_layout_of(variant))
    with pytest.raises(ParameterError, match='bat="hf".*bat="rwkv-peft"'):
        open_adapter(path)
    with pytest.raises(ParameterError, match="hf, rwkv-peft"):
        open_adapter(path, bat="col")


@pytest.mark.parametrize(("variant", "other"), [("hf", "rwkv-peft"), ("rwkv-peft", "hf")])
def test_the_other_bat_does_not_fit_where_shapes_tell(base, tmp_path, variant, other):
    path = written(tmp_path / "a.pth", in_layout_of(variant))
    with pytest.raises(LayoutError, match=rf"{X} of the base is \[52, 32\].*bat-{other}"):
        load(base, path, bat=other)


def test_pissa_wants_its_start(tmp_path):
    start = written(tmp_path / "init.pth", in_layout_of("init"))
    with pytest.raises(ParameterError, match="pass one"):
        open_adapter(tmp_path / "init.pth", pissa_init=start, residual_base=True)
    with pytest.raises(LayoutError, match="lora_A is not"):
        open_adapter(start, alpha=8)
    path = written(tmp_path / "a.pth", in_layout_of("lora"))
    with pytest.raises(ParameterError, match="its scale is 1"):
        open_adapter(path, alpha=8, pissa_init=start)
    half = {n: t for n, t in in_layout_of("init").items() if X not in n}
    with pytest.raises(LayoutError, match=f"starts for 1 layer, .* adapts 2; nothing for {X}"):
        open_adapter(path, pissa_init=written(tmp_path / "half.pth", half))
    with pytest.raises(LayoutError, match="starts for 0 layers"):
        open_adapter(path, pissa_init=written(tmp_path / "none.pth", {"x": torch.zeros(3)}))
    with pytest.raises(LayoutError, match=r"lora_A \[2, 32\], .* has \[4, 32\](.|\n)*not of one training run"):
        open_adapter(path, pissa_init=written(tmp_path / "rank2.pth", in_layout_of("init", r=2)))
    with pytest.raises(LayoutError, match="is the adapter itself"):
        open_adapter(path, pissa_init=path)


def test_what_the_file_says_is_not_overruled(adapted, tmp_path):
    for name in ("lora", "pissa", "miss", "bat-hf", "bat-rwkv-peft"):
        adapter = adapter_of(adapted("7.0", CONFIGS[name]))
        save_adapter(adapter, tmp_path / f"{name}{'' if name == 'bat-hf' else '.pth'}")
        if name in ("lora", "miss"):
            save_adapter(adapter, tmp_path / f"{name}-folder")
    save_pissa_init(adapter_of(adapted("7.0", CONFIGS["pissa"])), tmp_path / "init_pissa.pth")
    for name, asked, says in [
        ("lora.pth", {"alpha": 7}, "states 6"),
        ("lora.pth", {"use_rslora": True}, "states False"),
        ("lora.pth", {"residual_base": True}, "lora by its note, not PiSSA"),
        ("lora-folder", {"alpha": 7}, "states 6"),
        ("lora-folder", {"residual_base": True}, "plain LoRA"),
        ("pissa.pth", {"pissa_init": tmp_path / "init_pissa.pth"}, "holds what it started from"),
        ("pissa.pth", {"alpha": 7}, "states 4"),
        ("miss.pth", {"alpha": 7}, "MiSS, which has none"),
        ("miss.pth", {"bat": "hf"}, "no bat"),
        ("miss-folder", {"bat": "hf"}, "leave it out"),
        ("miss-folder", {"residual_base": True}, "MiSS"),
        ("bat-hf", {"bat": "rwkv-peft"}, "states 'bat-hf'"),
        ("bat-rwkv-peft.pth", {"bat": "hf"}, "states 'bat-rwkv-peft'"),
    ]:
        with pytest.raises(ParameterError, match=says):
            open_adapter(tmp_path / name, **asked)


# ----------------------------------------------------------------------------------- adapters that do not fit the base


@pytest.mark.parametrize("kind", ASKED)
def test_an_adapter_of_another_model(base, tmp_path, kind):
    """Names that match nothing, another depth, another width."""
    tensors = in_layout_of(kind)
    renamed = {"wrapped." + n: t for n, t in tensors.items()}
    with pytest.raises(LayoutError, match="4 of the 4 tensors.*wrapped.blocks.0.att.key"):
        load(base, written(tmp_path / "a.pth", renamed), **ASKED[kind])
    deeper = {n.replace("blocks.1", "blocks.23"): t for n, t in tensors.items()}
    with pytest.raises(LayoutError, match="blocks.23.ffn.key.weight.*\n.*with 2 layers"):
        load(base, written(tmp_path / "b.pth", deeper), **ASKED[kind])
    path = written(tmp_path / "c.pth", tensors)
    wider = base("7.0", head_size=32)
    with (
        pytest.raises(LayoutError, match=r"blocks.0.att.key of the base is \[64, 64\]"),
        open_adapter(path, **ASKED[kind]) as adapter,
    ):
        load_adapter(RWKV_Dual.from_pretrained(wider), adapter)
    full = tensors | {"blocks.1.ln1.weight": torch.zeros(33)}
    with pytest.raises(LayoutError, match=r"blocks.1.ln1.weight is \[33\], of the base it is \[32\]"):
        load(base, written(tmp_path / "d.pth", full), **ASKED[kind])
    extra = tensors | {"blocks.1.att.surprise": torch.zeros(3)}
    with pytest.raises(LayoutError, match="1 of the 5 tensors.*surprise"):
        load(base, written(tmp_path / "e.pth", extra), **ASKED[kind])


@pytest.mark.parametrize("kind", ASKED)
@pytest.mark.parametrize("version", [v for v in VERSIONS if v != "6.0"])
def test_an_adapter_of_another_generation(base, tmp_path, kind, version):
    tensors = in_layout_of(kind) | {"blocks.0.att.time_maa_x": torch.zeros(1, 1, 32)}
    path = written(tmp_path / "a.pth", tensors)
    with pytest.raises(LayoutError, match=rf"is of RWKV-6.0 \(.*time_maa_x\), the base is RWKV-{version}"):
        load(base, path, version, **ASKED[kind])
    gate = {n.replace("att.key", "att.gate"): t for n, t in in_layout_of(kind).items()}
    if version in ("4.0", "5.0", "7.0"):
        with pytest.raises(LayoutError, match="att.gate"):
            load(base, written(tmp_path / "b.pth", gate), version, **ASKED[kind])


@pytest.mark.parametrize("rank", [33, 64])
def test_a_rank_larger_than_the_layer_in_a_file(base, tmp_path, rank):
    with pytest.raises(LayoutError, match=f"rank {rank}, which is larger"):
        load(base, written(tmp_path / "a.pth", in_layout_of("lora", r=rank)), alpha=8)
    with pytest.raises(LayoutError, match="larger than the layer's 32 inputs"):
        load(base, written(tmp_path / "b.pth", in_layout_of("bone", r=rank)))


# --------------------------------------------------------------------------------------------------- broken adapters


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(f"{X}.lora_A"), f"{X}.lora_B is there, {X}.lora_A is not"),
        (lambda t: t.pop(f"{X}.lora_B"), f"{X}.lora_A is there, {X}.lora_B is not"),
        (lambda t: t.update({f"{X}.lora_A": torch.zeros(5, 32)}), "[5, 32]"),
        (lambda t: t.update({f"{X}.lora_A": torch.zeros(0, 32), f"{X}.lora_B": torch.zeros(52, 0)}), "[0, 32]"),
        (lambda t: t.update({f"{X}.lora_A": torch.zeros(32)}), "[32]"),
        (lambda t: t.update({f"{X}.lora_A": torch.tensor(1.0), f"{X}.lora_B": torch.tensor(1.0)}), "[]"),
        (lambda t: t.update({f"{X}.weight": torch.zeros(52, 32)}), f"{X}.weight stands in"),
        (lambda t: t.update({f"{X}.disha": torch.zeros(4, 52)}), "a LoRA and a MiSS adapter together"),
        (lambda t: t.update({f"{X}.lora_A.weight": torch.zeros(4, 32)}), "the same part"),
        (lambda t: t.update({f"{X}.init_lora_A": torch.zeros(4, 32)}), "init_lora_B is not"),
        (lambda t: t.update({f"{X}.lora_A": torch.zeros(4, 32, dtype=torch.int8)}), "torch.int8"),
        (lambda t: t.update({f"{X}.lora_A": torch.zeros(4, 32, dtype=torch.complex64)}), "torch.complex64"),
        (lambda t: t.update({"blocks.1.ln1.weight": torch.zeros(32, dtype=torch.bool)}), "torch.bool"),
    ],
)
def test_a_lora_that_is_no_whole(tmp_path, change, says):
    tensors = in_layout_of("lora")
    change(tensors)
    with pytest.raises(LayoutError, match=re.escape(says)):
        open_adapter(written(tmp_path / "a.pth", tensors), alpha=8)


@pytest.mark.parametrize("shape", [(52,), (0, 52), (4, 13, 4, 4), (5, 51)])
def test_a_block_of_no_shape(base, tmp_path, shape):
    tensors = in_layout_of("bone") | {f"{X}.disha": torch.zeros(shape)}
    says = f"tensors are empty, first {X}.disha" if 0 in shape else str(list(shape))
    with pytest.raises(LayoutError, match=re.escape(says)):
        load(base, written(tmp_path / "a.pth", tensors))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ASKED)
def test_nan_in_an_adapter(base, tmp_path, kind, value):
    for name in in_layout_of(kind):
        tensors = in_layout_of(kind)
        tensors[name].view(-1)[3] = value
        write_checkpoint(tmp_path / "a.pth", tensors, overwrite=True)
        part = name.replace("disha", "miss_block")
        with pytest.raises(NumericsError, match=re.escape(f"{part} of {tmp_path / 'a.pth'} holds NaN")):
            load(base, tmp_path / "a.pth", **ASKED[kind])


def test_what_is_no_adapter(base, tmp_path):
    with pytest.raises(LayoutError, match="kind 'model'"):
        open_adapter(base("7.0"), alpha=8)
    with pytest.raises(LayoutError, match="no tensor named"):
        open_adapter(written(tmp_path / "a.pth", {"blocks.0.ln1.weight": torch.zeros(32)}), alpha=8)
    (tmp_path / "b.pth").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(UnsafeFileError):
        open_adapter(tmp_path / "b.pth", alpha=8)
    path = written(tmp_path / "c.pth", in_layout_of("lora"))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(CorruptFileError, match="truncated"):
        open_adapter(path, alpha=8)


@pytest.mark.parametrize(
    "note", ["", "[]", "{}", '{"method": "lora"}', '{"method": "lora", "alpha": 0, "use_rslora": 0}']
)
def test_a_note_that_says_nothing(tmp_path, note):
    write_checkpoint(tmp_path / "a.pth", in_layout_of("lora"), {"rwkv_lab.adapter": note})
    with pytest.raises(CorruptFileError, match="its note"):
        open_adapter(tmp_path / "a.pth")


# ------------------------------------------------------------------------------------------------------------ folders


@pytest.fixture
def folder(adapted, tmp_path):
    """A good LoRA folder of Hugging Face's layout, to be broken."""
    config = LoraConfig(lora_r=4, lora_alpha=6, lora_target_modules=["att.key", "ffn.key"], train_parts=["ln"])
    save_adapter(adapter_of(as_if_trained(adapted("7.0", config))), tmp_path / "a")
    return tmp_path / "a"


def edit(folder, **settings):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def test_the_base_is_stored_as_the_adapter_says(base, adapted, tmp_path):
    config = LoraConfig(lora_r=4, lora_alpha=6, lora_target_modules=["att.key"], quant="nf4")
    trained = as_if_trained(adapted("7.0", config))
    tokens = torch.arange(9)[None]
    for name in ("a.pth", "folder"):
        save_adapter(adapter_of(trained), tmp_path / name)
        model = RWKV_Dual.from_pretrained(base("7.0"))
        with open_adapter(tmp_path / name) as adapter:
            with pytest.raises(ParameterError, match="quant='int8' was given, .* states 'nf4'; leave it out"):
                load_adapter(model, adapter, quant="int8")
            load_adapter(model, adapter)
        assert torch.equal(model(tokens)[0], trained(tokens)[0])


@pytest.mark.parametrize("part", ["blocks.0.att.key.lora_A", "ln_out"])
def test_a_folder_with_a_part_twice(folder, part):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if part in n)
    other = name.replace("lora_A.weight", "lora_A.default.weight").removeprefix("base_model.model." * ("ln" in part))
    save_file({**tensors, other: 2 * tensors[name]}, path)
    with pytest.raises(LayoutError, match="are the same"):
        open_adapter(folder)


def test_a_folder_whose_use_rslora_is_a_text(folder):
    edit(folder, use_rslora="false")
    with pytest.raises(LayoutError, match="use_rslora is 'false'; true or false is expected"):
        open_adapter(folder)


def test_a_folder_that_is_half_written(base, folder, tmp_path):
    def copy(name):
        return shutil.copytree(folder, tmp_path / name)

    a = copy("no-weights")
    (a / "adapter_model.safetensors").unlink()
    with pytest.raises(LayoutError, match="holds none of adapter_model.safetensors"):
        open_adapter(a)
    b = copy("no-config")
    (b / "adapter_config.json").unlink()
    with pytest.raises(LayoutError, match="adapter_config.json"):
        open_adapter(b)
    c = copy("short-config")
    text = (c / "adapter_config.json").read_text()
    (c / "adapter_config.json").write_text(text[: len(text) // 2])
    with pytest.raises(CorruptFileError, match="not JSON"):
        open_adapter(c)
    d = copy("short-weights")
    data = (d / "adapter_model.safetensors").read_bytes()
    (d / "adapter_model.safetensors").write_bytes(data[:-1])
    with pytest.raises(CorruptFileError):
        open_adapter(d)
    with open_checkpoint(folder) as ck:
        tensors = {n: ck[n] for n in ck}
    for number, gone in enumerate([("att.key.lora_B",), ("blocks.1.ffn.key.",)]):
        e = copy(f"lost-{number}")
        kept = {n: t for n, t in tensors.items() if not any(g in n for g in gone)}
        write_checkpoint(e / "adapter_model.safetensors", kept, overwrite=True)
        with pytest.raises(LayoutError, match="incomplete"):
            load(base, e)
    f = copy("empty")
    write_checkpoint(f / "adapter_model.safetensors", {}, overwrite=True)
    with pytest.raises(LayoutError, match="adapts no layer"):
        open_adapter(f)


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"lora_alpha": 0}, ParameterError, "lora_alpha 0"),
        ({"lora_alpha": float("nan")}, ParameterError, "lora_alpha nan"),
        ({"lora_alpha": ...}, ParameterError, "lora_alpha None"),
        ({"lora_alpha": "16"}, ParameterError, "'16'"),
        ({"r": 8}, LayoutError, "rank 8"),
        ({"r": ...}, LayoutError, "rank None"),
        ({"rank_pattern": {"att.key": 2}}, LayoutError, "rank 2"),
        ({"rank_pattern": {"(": 2}}, LayoutError, "regular expression"),
        ({"rank_pattern": {r"((\w|\.)*)*!": 2}}, LayoutError, "may take too long. Name the layers"),
        ({"rank_pattern": [2]}, LayoutError, "table"),
        ({"target_modules": [3]}, LayoutError, "list of names"),
        ({"use_dora": True}, LayoutError, "use_dora"),
        ({"lora_bias": True}, LayoutError, "lora_bias"),
        ({"bias": "all"}, LayoutError, "bias"),
        ({"fan_in_fan_out": True}, LayoutError, "fan_in_fan_out"),
        ({"layer_replication": [[0, 1], [0, 2]]}, LayoutError, "layer_replication"),
        ({"trainable_token_indices": [1]}, LayoutError, "trainable_token_indices"),
        ({"target_parameters": ["att.w0"]}, LayoutError, "target_parameters"),
        ({"something_new": 3}, LayoutError, "something_new"),
        ({"init_lora_weights": "olora"}, LayoutError, "olora"),
        ({"init_lora_weights": "pissa"}, ParameterError, "residual_base"),
        ({"peft_type": "LOHA"}, LayoutError, "LOHA"),
        ({"peft_type": ...}, LayoutError, "None"),
        ({"peft_type": "MISS"}, LayoutError, "lora_A.weight is no part of a MiSS adapter"),
    ],
)  # fmt: skip
def test_a_configuration_that_is_not_understood(folder, settings, error, says):
    edit(folder, **settings)
    with pytest.raises(error, match=re.escape(says)):
        open_adapter(folder)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"init_weights": "bat"}, "states rank 6 and init_weights 'bat'"),
        ({"r": 4}, "rank 4"),
        ({"init_weights": "other"}, "'other'"),
        ({"init_weights": "mini", "mini_r": 2, "r": 5}, "rank 5"),
    ],
)
def test_a_miss_configuration_that_does_not_fit(adapted, tmp_path, settings, says):
    save_adapter(adapter_of(adapted("7.0", CONFIGS["miss"])), tmp_path / "a")
    edit(tmp_path / "a", **settings)
    with pytest.raises(LayoutError, match=re.escape(says)):
        open_adapter(tmp_path / "a")


def test_bone_of_the_forerunner(base, adapted, tmp_path):
    """The same as MiSS under another name; but of its bats there were several."""
    for name, blocks in (("miss", CONFIGS["miss"]), ("bat", CONFIGS["bat-hf"])):
        save_adapter(adapter_of(as_if_trained(adapted("7.0", blocks))), tmp_path / name)
        old = shutil.copytree(tmp_path / name, tmp_path / f"{name}-bone")
        with open_checkpoint(old) as ck:
            tensors = {n.replace("miss_block", "bone_block"): ck[n] for n in ck}
        write_checkpoint(old / "adapter_model.safetensors", tensors, overwrite=True)
        edit(old, peft_type="BONE")
    load(base, tmp_path / "miss-bone")
    with pytest.raises(ParameterError, match='bat="hf"'):
        open_adapter(tmp_path / "bat-bone")
    load(base, tmp_path / "bat-bone", bat="hf")


def test_an_unknown_part_in_a_folder(folder):
    with open_checkpoint(folder) as ck:
        tensors = {n: ck[n] for n in ck}
    tensors["base_model.model.blocks.0.att.key.lora_magnitude_vector"] = torch.zeros(32)
    write_checkpoint(folder / "adapter_model.safetensors", tensors, overwrite=True)
    with pytest.raises(LayoutError, match="lora_magnitude_vector"):
        open_adapter(folder)


# -------------------------------------------------------------------------------------------------- several, and saving


def test_two_adapters_with_one_whole_tensor(tmp_path):
    a = open_adapter(written(tmp_path / "a.pth", in_layout_of("lora")), alpha=8)
    b = open_adapter(written(tmp_path / "b.pth", in_layout_of("bone")))
    c = open_adapter(written(tmp_path / "c.pth", {n: t for n, t in in_layout_of("bone").items() if "ln" not in n}))
    with a, b, c:
        refuse_overlap([a, c])
        refuse_overlap([c, b])
        with pytest.raises(LayoutError, match="blocks.1.ln1.weight stands whole in .*a.pth and in .*b.pth"):
            refuse_overlap([c, a, b])


@pytest.mark.parametrize(
    ("name", "target", "says"),
    [
        ("bat-rwkv-peft", "folder", "bat-rwkv-peft.*\n.*pth"),
        ("bat-hf", "a.pth", "bat-hf: save it to a folder"),
        ("miss-mini", "a.safetensors", "mini: save it to a folder"),
    ],
)
def test_layouts_that_have_no_word_for_it(adapted, tmp_path, name, target, says):
    with pytest.raises(ParameterError, match=says):
        save_adapter(adapter_of(adapted("7.0", CONFIGS[name])), tmp_path / target)
    assert snapshot(tmp_path) == {}


def test_what_cannot_be_saved(adapted, base, tmp_path):
    model = adapted("7.0", LoraConfig(lora_r=4, train_parts=["time_state"]))
    with pytest.raises(ParameterError, match="time_state is trained whole.*\n.*pth"):
        save_adapter(adapter_of(model), tmp_path / "folder")
    with pytest.raises(ParameterError, match="no PiSSA"):
        save_pissa_init(adapter_of(model), tmp_path / "init_pissa.pth")
    with pytest.raises(ParameterError, match="no adapters"):
        adapter_of(RWKV_Dual.from_pretrained(base("7.0")))
    with pytest.raises(ParameterError, match="already"):
        load_adapter(model, adapter_of(model))
    good = adapter_of(adapted("7.0", CONFIGS["lora"]))
    one = next(iter(good.targets.values()))
    mixed = Adapter("lora", {"a": one, "b": LoraTarget(one.A, one.B, 3)}, {})
    with pytest.raises(ParameterError, match="alpha differs"):
        save_adapter(mixed, tmp_path / "a.pth")
    with pytest.raises(OutputError, match="is not there"):
        save_adapter(good, tmp_path / "nowhere" / "a.pth")
    assert snapshot(tmp_path) == {}
    for name in ("a.pth", "folder"):
        save_adapter(good, tmp_path / name)
        before = snapshot(tmp_path)
        with pytest.raises(OutputError, match="exists"):
            save_adapter(good, tmp_path / name)
        assert snapshot(tmp_path) == before
        save_adapter(good, tmp_path / name, overwrite=True)
        assert snapshot(tmp_path) == before


def test_a_base_is_checked_by_its_layout(adapted):
    adapter = adapter_of(adapted("7.0", CONFIGS["lora"]))
    shapes = {"blocks.0.att.key.weight": (32, 32)}
    with pytest.raises(LayoutError, match="tensors that the adapter changes are not in the base"):
        adapter.check(shapes, make_layout("7.0"))
