"""Every generation against implementations that are not ours: the PyPI package `rwkv`, and transformers for RWKV-4."""

import pytest
import torch
from random_models import load_model, make_layout, make_tokens, random_tensors, relative_rms
from rwkv_package import in_its_order, run_rwkv_package

from rwkv_lab.checkpoint import write_checkpoint
from rwkv_lab.model import RWKV_Dual, RWKVMode

LIMIT = 2e-5  # float32 on both sides, different orders of summation
T = 40
SHAPES = {  # none a power of two but where the head is the model
    "one layer, one head of 64": dict(n_layer=1, n_head=1, head_size=64),
    "one head of 32": dict(n_layer=2, n_head=1, head_size=32),
    "three heads of 32": dict(n_layer=3, n_head=3, head_size=32, dim_ffn=150),
    "three heads of 64": dict(n_layer=2, n_head=3, head_size=64, dim_ffn=224),
}
CASES = [(version, shape, "") for version in ("4.0", "5.0", "5.1", "5.2", "6.0", "7.0") for shape in SHAPES]
# It stops while printing the shape of a tensor with one number, which is what the decay of a one-head 5.0 or 5.1 is.
# Such a 5.1 is also a 5.2 whose channels have one decay; of such a 5.0 the reference is numpy, in test_answers.
CASES = [c for c in CASES if not (c[0] == "5.0" and SHAPES[c[1]]["n_head"] == 1)]
# Its own variants: a bonus stored as it is, and tuned states, which its RWKV-7 does not read.
CASES += [("5.0", "three heads of 32", "time_faaaa"), ("5.1", "three heads of 64", "time_faaaa")]
CASES += [(version, "three heads of 32", "time_state") for version in ("5.0", "5.2", "6.0")]


def tensors_of(version, shape, variant):
    tensors = random_tensors(make_layout(version, **SHAPES[shape]), time_state=variant == "time_state")
    if variant == "time_faaaa":
        tensors = {name.replace("time_first", "time_faaaa"): t for name, t in tensors.items()}
    return tensors


def for_the_package(tensors, layout):
    """The same model, in names and an order that the package understands."""
    if layout.version == "5.1" and layout.n_head == 1:
        per_channel = {n: t.expand(1, layout.head_size) for n, t in tensors.items() if n.endswith("time_decay")}
        bonus = {n: t.exp().expand(1, layout.head_size) for n, t in tensors.items() if n.endswith("time_first")}
        tensors = {n: t for n, t in tensors.items() if n not in bonus} | per_channel
        tensors |= {n.replace("time_first", "time_faaaa"): t for n, t in bonus.items()}
    return in_its_order(tensors)


@pytest.fixture(scope="module")
def theirs(warm, tmp_path_factory):
    """What the package says about every case: (path of the file, numbers)."""
    pytest.importorskip("rwkv", reason="the PyPI package rwkv is not installed")
    folder, tokens, answers = tmp_path_factory.mktemp("rwkv"), make_tokens(1, T)[0].tolist(), {}
    for v7 in (False, True):
        cases = [case for case in CASES if (case[0] == "7.0") == v7]
        paths = [folder / f"{v7}{number}" for number in range(len(cases))]
        for case, path in zip(cases, paths, strict=True):
            tensors = tensors_of(*case)
            write_checkpoint(f"{path}.safetensors", tensors)
            write_checkpoint(f"{path}.pth", for_the_package(tensors, make_layout(case[0], **SHAPES[case[1]])))
        numbers = run_rwkv_package(warm, [(path, tokens) for path in paths], v7)
        answers |= {case: (f"{path}.safetensors", n) for case, path, n in zip(cases, paths, numbers, strict=True)}
    return answers


def state_errors(state, numbers, kind, version):
    """Our state against its list: per layer [att, wkv, ffn], or [att, a, b, p, ffn] for RWKV-4."""
    per_layer = 5 if version == "4.0" else 3
    for layer in range(state.att_shift.shape[1]):
        att, *wkv, ffn = (numbers[f"{kind}{per_layer * layer + i}"] for i in range(per_layer))
        yield relative_rms(state.att_shift[0, layer], att)
        yield relative_rms(state.ffn_shift[0, layer], ffn)
        if version == "4.0":
            yield from (relative_rms(state.wkv[0, layer, i], wkv[i]) for i in range(3))
        elif version == "7.0":
            yield relative_rms(state.wkv[0, layer], wkv[0])
        else:  # it holds the matrices as [H,K,V]
            yield relative_rms(state.wkv[0, layer].mT, wkv[0])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_rwkv_package(theirs, case):
    path, numbers = theirs[case]
    for mode in RWKVMode:
        logits, state = RWKV_Dual.from_pretrained(path, mode=mode)(make_tokens(1, T))
        assert relative_rms(logits[0], numbers["logits"]) < LIMIT
        assert relative_rms(logits[0], numbers["steps"]) < LIMIT
        assert max(state_errors(state, numbers, "state", case[0])) < LIMIT
        assert max(state_errors(state, numbers, "one", case[0])) < LIMIT


_HUGGING_FACE = [
    (".att.", ".attention."),
    (".ffn.", ".feed_forward."),
    ("time_mix_k", "time_mix_key"),
    ("time_mix_v", "time_mix_value"),
    ("time_mix_r", "time_mix_receptance"),
    ("ln0", "pre_ln"),
    ("emb.", "embeddings."),
]


@pytest.mark.filterwarnings("ignore")  # its own affair
@pytest.mark.parametrize("n_layer, n_embd", [(2, 40), (3, 36)])
def test_rwkv_4_of_transformers(tmp_path, n_layer, n_embd):
    """It cannot run one layer (it divides by n_layer - 1), nor dim_att != n_embd (its states have n_embd channels)."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = dict(n_layer=n_layer, n_embd=n_embd, n_head=1, head_size=n_embd)
    model = load_model(tmp_path, "4.0", **sizes)
    config = transformers.RwkvConfig(
        vocab_size=70,
        hidden_size=n_embd,
        intermediate_size=52,
        num_hidden_layers=n_layer,
        tie_word_embeddings=False,
    )
    theirs = transformers.RwkvForCausalLM(config).eval()
    tensors = {}
    for name, tensor in random_tensors(make_layout("4.0", **sizes)).items():
        for ours, its in _HUGGING_FACE:
            name = name.replace(ours, its)
        tensors[name if name.startswith("head") else f"rwkv.{name}"] = tensor
    theirs.load_state_dict(tensors)
    tokens = make_tokens(2, T)
    with torch.no_grad():
        expected = theirs(tokens, use_cache=True)
    for mode in RWKVMode:
        model.set_mode(mode)
        logits, state = model(tokens)
        assert relative_rms(logits, expected.logits) < LIMIT
        ffn, att, *sums = expected.state  # [B,C,L]
        assert relative_rms(state.ffn_shift, ffn.mT) < LIMIT
        assert relative_rms(state.att_shift, att.mT) < LIMIT
        for i in range(3):
            assert relative_rms(state.wkv[:, :, i], sums[i].mT) < LIMIT
