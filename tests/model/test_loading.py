"""Files into models and back."""

import gc
import subprocess
import weakref
from pathlib import Path

import pytest
import torch
from random_models import VERSIONS, load_model, make_layout, random_tensors, write_model
from random_rwkv7 import add_random_time_state, make_model, make_tokens, relative_rms

from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint
from rwkv_lab.errors import LayoutError, NumericsError, OutputError, ParameterError
from rwkv_lab.model import RWKV_Dual, RWKVMode


@torch.no_grad()  # with gradients torch's modules run, without them the compiled ones: one way for both
def logits_of(model):
    return model(make_tokens(2, 20, model.layout.vocab_size))[0]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("n_embd, head_size, tuned", [(32, 32, True), (64, 16, False)])
def test_dimensions_come_from_the_tensors(tmp_path, suffix, n_embd, head_size, tuned):
    model = make_model(n_embd, head_size=head_size, vocab_size=300)
    if tuned:
        add_random_time_state(model)
    path = tmp_path / f"m{suffix}"
    write_checkpoint(path, model.state_dict())
    loaded = RWKV_Dual.from_pretrained(path, mode=RWKVMode.RNN)
    assert loaded.mode is RWKVMode.RNN and loaded.has_time_state == tuned
    loaded.set_mode(RWKVMode.TRANSFORMER)
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_saved_folder_opens_again(tmp_path):
    model = make_model()
    written = model.save_pretrained(tmp_path / "new" / "folder")
    assert written.parent == tmp_path / "new" / "folder"
    assert torch.equal(logits_of(RWKV_Dual.from_pretrained(written.parent)), logits_of(model))
    with pytest.raises(OutputError):
        model.save_pretrained(written.parent)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_is_converted_but_states_stay_exact(tmp_path, dtype):
    model = make_model()
    add_random_time_state(model)
    write_checkpoint(tmp_path / "m.pth", model.state_dict())
    loaded = RWKV_Dual.from_pretrained(tmp_path / "m.pth", dtype=dtype)
    assert loaded.emb.weight.dtype == dtype
    assert torch.equal(loaded.create_state().wkv.float(), model.create_state().wkv)


def test_files_of_others_squeezed_prefixed_and_with_layer_0_value_residual(tmp_path):
    model = make_model(32, head_size=32, n_layer=2)
    expected = logits_of(model)
    tensors = {f"model.{name}": t.squeeze() for name, t in model.state_dict().items()}
    for name in ("v0", "v1", "v2"):  # unused in layer 0, yet some files have them
        tensors[f"model.blocks.0.att.{name}"] = tensors[f"model.blocks.1.att.{name}"]
    write_checkpoint(tmp_path / "m.pth", dict(reversed(tensors.items())))
    loaded = RWKV_Dual.from_pretrained(tmp_path / "m.pth")
    assert torch.equal(logits_of(loaded), expected)
    loaded.save_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as ck:
        assert {f"model.{name}" for name in ck.info} == set(tensors)


def test_group_norm_eps_is_the_users_choice(tmp_path):
    model = make_model()
    write_checkpoint(tmp_path / "m.pth", model.state_dict())
    assert torch.equal(logits_of(RWKV_Dual.from_pretrained(tmp_path / "m.pth", group_norm_eps=64e-5)), logits_of(model))
    other = RWKV_Dual.from_pretrained(tmp_path / "m.pth", group_norm_eps=0.1)
    assert relative_rms(logits_of(other), logits_of(model)) > 1e-3


def test_a_state_file_takes_effect(tmp_path):
    tuned, plain = make_model(), make_model()
    add_random_time_state(tuned)
    states = {name: t for name, t in tuned.state_dict().items() if name.endswith("time_state")}
    write_checkpoint(tmp_path / "state.pth", states)
    plain.load_state_file(tmp_path / "state.pth")
    assert torch.equal(logits_of(plain), logits_of(tuned))
    write_checkpoint(tmp_path / "whole.pth", tuned.state_dict())
    again = make_model()
    again.load_state_file(tmp_path / "whole.pth")
    assert torch.equal(logits_of(again), logits_of(tuned))


def test_state_files_that_do_not_fit_are_refused(tmp_path):
    model = make_model()  # two layers, [2,32,32]
    good = {f"blocks.{i}.att.time_state": torch.zeros(2, 32, 32) for i in range(2)}
    first = "blocks.0.att.time_state"
    for number, (tensors, error, words) in enumerate(
        [
            ({first: good[first]}, LayoutError, "of 1 layer "),
            (good | {"blocks.2.att.time_state": good[first]}, LayoutError, "3 layers"),
            (good | {first: torch.zeros(1, 64, 64)}, LayoutError, r"blocks.0.*\[1, 64, 64\].*\[2, 32, 32\]"),
            (good | {first: torch.full((2, 32, 32), float("nan"))}, NumericsError, "blocks.0"),
            ({"emb.weight": torch.zeros(3, 3)}, LayoutError, "holds no tuned state"),
        ]
    ):
        path = tmp_path / f"{number}.pth"
        write_checkpoint(path, tensors)
        with pytest.raises(error, match=words):
            model.load_state_file(path)
    assert not model.has_time_state


def test_models_that_cannot_run_are_refused(tmp_path):
    tensors = make_model().state_dict()
    cases = {
        "state.pth": ({"blocks.0.att.time_state": torch.zeros(1, 64, 64)}, "no whole model"),
        "missing.pth": ({n: t for n, t in tensors.items() if n != "blocks.1.att.k_a"}, "blocks.1.att.k_a"),
        "shape.pth": (tensors | {"blocks.1.ln2.bias": torch.zeros(63)}, "blocks.1.ln2.bias"),
    }
    for name, (content, words) in cases.items():
        write_checkpoint(tmp_path / name, content)
        with pytest.raises(LayoutError, match=words):
            RWKV_Dual.from_pretrained(tmp_path / name)


def test_variants_that_do_not_run_are_refused_by_name(tmp_path):
    tensors = random_tensors(make_layout("6.0"))
    write_checkpoint(tmp_path / "a.pth", tensors | {"blocks.0.att.gate_w1": torch.zeros(3, 3)})
    with pytest.raises(LayoutError, match="RWKV-6a"):
        RWKV_Dual.from_pretrained(tmp_path / "a.pth")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("sizes", [{}, dict(n_layer=1, n_head=1, head_size=24)], ids=["two heads", "one head"])
def test_every_generation_is_told_from_its_tensors(tmp_path, version, suffix, sizes):
    """In any order, behind a prefix, and with all dimensions of size 1 squeezed away."""
    layout = make_layout(version, **sizes)
    tensors = random_tensors(layout)
    write_checkpoint(tmp_path / f"a{suffix}", tensors)
    squeezed = {f"model.{name}": t.squeeze() for name, t in reversed(tensors.items())}
    write_checkpoint(tmp_path / f"b{suffix}", squeezed)
    one, other = (RWKV_Dual.from_pretrained(tmp_path / f"{name}{suffix}") for name in "ab")
    assert (one.layout.version, one.layout.n_head, one.layout.ranks) == (version, layout.n_head, layout.ranks)
    assert torch.equal(logits_of(one), logits_of(other))
    one.save_pretrained(tmp_path / "folder")
    assert torch.equal(logits_of(RWKV_Dual.from_pretrained(tmp_path / "folder")), logits_of(other))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("version", VERSIONS)
def test_saving_and_loading_keeps_every_bit(tmp_path, version, dtype):
    model = load_model(tmp_path, version, dtype, time_state=version != "4.0")
    model.save_pretrained(tmp_path / "folder")
    with open_checkpoint(tmp_path / "folder") as ck:
        assert {name: (t.shape, t.dtype) for name, t in ck.info.items()} == {
            name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()
        }
    again = RWKV_Dual.from_pretrained(tmp_path / "folder", dtype=dtype)
    for (name, saved), loaded in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert saved.dtype == loaded.dtype and saved.view(torch.uint8).equal(loaded.view(torch.uint8)), name


def test_what_float16_cannot_hold_is_refused(tmp_path):
    tensors = random_tensors(make_layout("6.0"))
    tensors["head.weight"][3, 4] = 70000
    write_checkpoint(tmp_path / "m.pth", tensors)
    with pytest.raises(NumericsError, match="head.weight holds 7e.04"):
        RWKV_Dual.from_pretrained(tmp_path / "m.pth", dtype=torch.float16)
    with pytest.raises(ParameterError, match="torch.int8"):
        RWKV_Dual.from_pretrained(tmp_path / "m.pth", dtype=torch.int8)


@pytest.mark.parametrize("weights", ["stored", "int8"])
@pytest.mark.parametrize("version", ["4.0", "5.2", "6.0", "7.0"])
def test_memory_is_free_as_soon_as_a_model_is_let_go(tmp_path, version, weights):
    """The next one may need it; a search for cycles would take a tenth of a second where much is imported."""
    path = write_model(tmp_path / "m.pth", make_layout(version, n_head=2, head_size=32, dim_ffn=128, vocab_size=257))
    gc.disable()
    try:
        with torch.no_grad():
            model = RWKV_Dual.from_pretrained(path, weights=weights)
            _, state = model.prefill(torch.tensor([[1, 2, 3]]))
            model(torch.tensor([[3]]), state)
            model.generate_with_streaming("a", 3, 0.7, 0.9, seed=0)
        kept = [weakref.ref(model), *(weakref.ref(p) for p in model.parameters())]
        del model, state
        assert not [x for x in kept if x() is not None]
    finally:
        gc.enable()


_PEAK = """
import re, sys, torch
from rwkv_lab.model import RWKV_Dual

def now(what):
    return 1024 * int(re.search(what + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

torch.set_num_threads(1)
RWKV_Dual.from_pretrained(sys.argv[1])  # all code is in memory now
open("/proc/self/clear_refs", "w").write("5")  # forgets the peak so far
before = now("VmRSS")
model = RWKV_Dual.from_pretrained(sys.argv[2], dtype=getattr(torch, sys.argv[3]))
print((now("VmHWM") - before) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells peak memory this way")
@pytest.mark.parametrize(
    "suffix, stored, dtype", [(".pth", "bfloat16", "float32"), (".safetensors", "float32", "bfloat16")]
)
def test_loading_needs_no_more_memory_than_the_model(warm, tmp_path, suffix, stored, dtype):
    """Peak resident memory while loading; half of this model is its embedding and head, as in small real ones.

    A process takes 2 to 6 MB besides, whatever the size: the model has to be large beside that.
    """
    write_model(tmp_path / f"small{suffix}", make_layout("6.0"))
    tensors = random_tensors(make_layout("6.0", n_head=8, head_size=64, dim_ffn=3600, vocab_size=16000))
    write_checkpoint(tmp_path / f"m{suffix}", {name: t.to(getattr(torch, stored)) for name, t in tensors.items()})
    command = [warm.python, "-c", _PEAK, tmp_path / f"small{suffix}", tmp_path / f"m{suffix}", dtype]
    done = subprocess.run(command, env=warm.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.1
