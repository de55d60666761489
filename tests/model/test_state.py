"""States as things of their own: copied, moved, written, remembered."""

from copy import copy, deepcopy
from gc import collect
from pickle import dumps, loads
from weakref import ref

import pytest
import torch
from pairwise import each
from random_rwkv7 import add_random_time_state, make_model, make_tokens

from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint
from rwkv_lab.errors import LayoutError, NumericsError, OutputError, ParameterError
from rwkv_lab.model import (
    RWKV_Dual,
    RWKVMode,
    RWKVState,
    StateCache,
    bits_per_byte,
    generate,
    generate_stream,
    init_state_with_past,
    load_state,
    save_state,
)
from rwkv_lab.model.state import join
from rwkv_lab.peft import LoraLinear

PARTS = ("wkv", "att_shift", "ffn_shift")


def same(one, other) -> bool:
    return all(torch.equal(getattr(one, n), getattr(other, n)) for n in PARTS)


def state_after(model, T=5, B=1, seed=0):
    return model(make_tokens(B, T, seed=seed))[1]


@pytest.mark.parametrize("mode", list(RWKVMode))
def test_no_door_changes_the_state_given_to_it(mode):
    model = make_model()
    model.set_mode(mode)
    state = state_after(model)
    before = state.clone()
    model(make_tokens(1, 7), state=state)
    model.parallel(make_tokens(1, 7), state)
    model.prefill(make_tokens(1, 50), state)
    model.generate_with_streaming("abc", 10, state=state)
    assert same(state, before)


def test_a_clone_shares_nothing_and_detach_cuts_the_graph():
    model = make_model().requires_grad_(True)
    state = model.create_state(3)  # expanded: one memory for three rows
    clone = state.clone()
    clone.wkv[0] += 1
    assert same(model.create_state(3), state) and not clone.wkv[1].any()
    state = state_after(model)
    assert state.wkv.requires_grad and not any(part.requires_grad for part in state.detach().tensors().values())


def test_to_another_dtype_keeps_the_wkv_state_wide():
    model = make_model()
    state = state_after(model).to(dtype=torch.bfloat16)
    assert [getattr(state, n).dtype for n in PARTS] == [torch.float32, torch.bfloat16, torch.bfloat16]
    model.to(torch.bfloat16)(make_tokens(1, 2), state=state)
    wide = state.to(dtype=torch.float64)
    assert {getattr(wide, n).dtype for n in PARTS} == {torch.float64}
    assert state.to("meta").wkv.device.type == "meta" and state.to("meta").att_shift.dtype == torch.bfloat16


def test_states_of_others_are_refused_by_what_is_wrong():
    model = make_model()
    tokens = make_tokens(1, 1)
    for other, words in [
        (make_model(n_layer=3), r"another model.*\[1, 3, 2, 32, 32\].*\[1, 2, 2, 32, 32\]"),
        (make_model(head_size=64), r"another model.*wkv.*\[1, 2, 1, 64, 64\]"),
        (make_model(dtype=torch.float64), "float64.*float32"),
    ]:
        with pytest.raises(ParameterError, match=words):
            model(tokens, state=other.create_state())
        with pytest.raises(ParameterError, match=words):
            model.generate_with_streaming("x", state=other.create_state())
    with pytest.raises(ParameterError, match="2 sequences, the tokens are of 1"):
        model(tokens, state=model.create_state(2))
    with pytest.raises(ParameterError, match="meta"):
        model(tokens, state=model.create_state().to("meta"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_state_comes_back_from_its_file_bit_for_bit(tmp_path, dtype):
    model = make_model(dtype=dtype)
    state = state_after(model, B=3)
    save_state(tmp_path / "s.safetensors", state, model)
    loaded = load_state(tmp_path / "s.safetensors", model)
    assert same(loaded, state) and [getattr(loaded, n).dtype for n in PARTS] == [getattr(state, n).dtype for n in PARTS]
    with pytest.raises(OutputError):
        save_state(tmp_path / "s.safetensors", state, model)


def test_state_files_of_other_models_are_refused(tmp_path):
    model = make_model()
    path = tmp_path / "s.safetensors"
    save_state(path, state_after(model), model)
    for other, words in [(make_model(n_layer=3), "n_layer is 2, here 3"), (make_model(head_size=64), "n_head is 2")]:
        with pytest.raises(LayoutError, match=words):
            load_state(path, other)
        with pytest.raises(ParameterError, match="another model"):
            save_state(tmp_path / "t.safetensors", state_after(model), other)
    write_checkpoint(tmp_path / "m.safetensors", model.state_dict())
    with pytest.raises(LayoutError, match="no state"):
        load_state(tmp_path / "m.safetensors", model)
    with pytest.raises(ParameterError, match=".safetensors"):
        save_state(tmp_path / "s.pth", state_after(model), model)


def test_a_state_is_written_over_where_that_is_asked_for(tmp_path):
    model = make_model()
    save_state(tmp_path / "s.safetensors", model.create_state(), model)
    save_state(tmp_path / "s.safetensors", state_after(model), model, overwrite=True)
    assert same(load_state(tmp_path / "s.safetensors", model), state_after(model))


def test_a_state_file_belongs_to_its_weights(tmp_path, caplog):
    model, other, path = make_model(), make_model(seed=1), tmp_path / "s.safetensors"
    state = state_after(model)
    save_state(path, state, model)
    with pytest.raises(LayoutError, match="other weights.*\n.*other_weights=True"):
        load_state(path, other)
    assert same(load_state(path, other, other_weights=True), state)
    other.load_state_dict(model.state_dict())
    add_random_time_state(other)
    assert same(load_state(path, other), state)
    with torch.no_grad():
        other.blocks[1].ffn.value.weight += 1e-3  # as a LoRA would
    with pytest.raises(LayoutError, match="other weights"):
        load_state(path, other)
    with pytest.raises(LayoutError, match="vocab_size is 257, here 300"):
        load_state(path, make_model(vocab_size=300))
    with open_checkpoint(path) as ck:  # as it was written before
        old = {k: v for k, v in ck.metadata.items() if not k.startswith("weights") and k != "vocab_size"}
    write_checkpoint(tmp_path / "old.safetensors", state.tensors(), old)
    assert same(load_state(tmp_path / "old.safetensors", other), state) and "older version" in caplog.text


@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("into", [torch.float32, torch.bfloat16, torch.float64])
def test_a_state_goes_into_its_model_in_another_dtype(tmp_path, of, into):
    write_checkpoint(tmp_path / "m.safetensors", {n: t.to(of) for n, t in make_model().state_dict().items()})
    for made, read in ((of, into), (into, of)):
        model, path = (
            RWKV_Dual.from_pretrained(tmp_path / "m.safetensors", dtype=made),
            tmp_path / f"{made}.safetensors",
        )
        save_state(path, model.create_state(), model, overwrite=True)
        load_state(path, RWKV_Dual.from_pretrained(tmp_path / "m.safetensors", dtype=read))


def test_a_state_of_another_vocabulary_is_refused():
    model, tokens = make_model(), torch.tensor([[1, 2]])
    other = make_model(vocab_size=300)
    with torch.no_grad():
        states = [other.create_state(), other.prefill(tokens)[1], other.prefill(tokens[:, :1])[1]]
    other.requires_grad_(True)
    for state in [*states, other(tokens)[1], other.create_state().to(torch.device("cpu")).clone().rows([0])]:
        with pytest.raises(ParameterError, match="300 tokens, this one has 257"):
            model(tokens, state)


def test_a_tuned_state_file_goes_in_by_itself(tmp_path):
    tuned, plain = make_model(), make_model()
    add_random_time_state(tuned)
    path = tmp_path / "tuned.pth"
    write_checkpoint(path, {n: t for n, t in tuned.state_dict().items() if n.endswith("time_state")})
    state = plain.create_state(tuned=path)
    assert same(state, tuned.create_state()) and not plain.has_time_state
    assert plain.generate_with_streaming("x", 20, state=state) == tuned.generate_with_streaming("x", 20)
    with pytest.raises(LayoutError, match="layers 0 to 2"):
        make_model(n_layer=3).create_state(tuned=path)


def put(cache, model, *texts):
    for text in texts:
        cache.put(model, text, state_after(model, seed=len(text)), torch.full((257,), float(len(text))))


def test_the_cache_finds_the_longest_beginning():
    model, cache = make_model(), StateCache(10**7)
    put(cache, model, [1], [1, 2, 3], [1, 2, 3, 4, 5, 6], [2, 2, 2, 2])
    n, state, logits = cache.longest_prefix(model, [1, 2, 3, 4, 5])
    assert n == 3 and logits[0] == 3 and same(state, state_after(model, seed=3))
    assert cache.longest_prefix(model, [1, 2])[0] == 1
    assert cache.longest_prefix(model, [1, 2, 3, 4, 5, 6])[0] == 6
    assert cache.longest_prefix(model, [3, 2, 1]) is None
    assert cache.longest_prefix(model, [257 + 1]) is None  # not the bytes of a token, the token


def test_the_cache_gives_out_copies():
    model, cache = make_model(), StateCache(10**7)
    put(cache, model, [1, 2])
    _, state, logits = cache.longest_prefix(model, [1, 2])
    state.wkv.zero_(), logits.zero_()
    assert cache.longest_prefix(model, [1, 2])[1].wkv.any() and cache.longest_prefix(model, [1, 2])[2].any()


def test_the_cache_keeps_within_its_bytes_and_forgets_what_was_used_longest_ago():
    model = make_model()
    one = state_after(model).nbytes + 257 * 4 + 4
    cache = StateCache(3 * one + 2)
    put(cache, model, [1], [2], [3])
    assert len(cache) == 3 and cache.nbytes == 3 * one
    cache.longest_prefix(model, [1, 5])
    put(cache, model, [4])
    assert [cache.longest_prefix(model, [t]) is not None for t in (1, 2, 3, 4)] == [True, False, True, True]
    put(cache, model, [4])  # once more: takes its own place
    assert cache.nbytes == 3 * one and len(cache) == 3
    small = StateCache(one - 1)
    put(small, model, [1])
    assert len(small) == small.nbytes == 0
    cache.clear()
    assert len(cache) == cache.nbytes == 0


def test_a_cache_serves_one_model():
    model, cache = make_model(), StateCache(10**7)
    put(cache, model, [1])
    with pytest.raises(ParameterError, match="another model"):
        cache.longest_prefix(make_model(), [1])
    with pytest.raises(ParameterError, match="max_bytes=0"):
        StateCache(0)


def copies_of(state) -> dict:
    """A state in all the ways in which it comes to be another object."""
    return {
        "itself": state,
        "clone": state.clone(),
        "detach": state.detach(),
        "to": state.to("cpu", torch.float32),
        "expand": state.expand(1),
        "rows": state.rows([0]),
        "join": join([state]),
        "copy": copy(state),
        "deepcopy": deepcopy(state),
    }


def other_weights(model: RWKV_Dual) -> RWKV_Dual:
    other = deepcopy(model)
    with torch.no_grad():
        other.blocks[1].ffn.value.weight += 1e-3
    return other


@pytest.mark.parametrize(
    ("mode", "made_by"),
    each(RWKVMode, ["create_state", "init_state_with_past", "parallel", "step", "generation", "parallel"]),
)
def test_a_model_with_other_weights_refuses_a_state_in_memory(tmp_path, made_by, mode):
    model, tokens = make_model(), make_tokens(1, 1)
    other = other_weights(model)
    model.set_mode(RWKVMode.RNN)
    other.set_mode(mode)
    state = {
        "create_state": lambda: model.create_state(),
        "init_state_with_past": lambda: init_state_with_past(model, make_tokens(1, 9)),
        "parallel": lambda: model.parallel(make_tokens(1, 9))[1],
        "step": lambda: model(tokens)[1],
        "generation": lambda: generate_stream(model, "abc", 3).state,
    }[made_by]()
    for how, one in copies_of(state).items():
        for use in (
            lambda one: other(tokens, one),
            lambda one: other.parallel(tokens, one),
            lambda one: other.prefill(make_tokens(2, 3), one.expand(2), lengths=[1, 3]),
            lambda one: generate(other, "abc", 2, state=one),
            lambda one: bits_per_byte(other, b"a text of some length", 8, one),
            lambda one: save_state(tmp_path / "s.safetensors", one, other),
            lambda one: StateCache(10**6).put(other, [1], one, torch.zeros(257)),
            lambda one: join([other.create_state(), one]),
        ):
            with pytest.raises(ParameterError, match=r"other weights.*\n.*for_other_weights\(\)"):
                use(one)
            use(one.for_other_weights())
            (tmp_path / "s.safetensors").unlink(missing_ok=True)
        torch.testing.assert_close(model(tokens, one)[0], model(tokens, state)[0], msg=how)


def test_a_state_goes_on_where_its_weights_are(tmp_path):
    model, tokens = make_model(), make_tokens(1, 4)
    model.save_pretrained(tmp_path)
    state = init_state_with_past(model, tokens)
    for same_weights in (
        deepcopy(model),
        RWKV_Dual.from_pretrained(tmp_path),
        RWKV_Dual.from_pretrained(tmp_path, dtype="bf16"),
        RWKV_Dual.from_pretrained(tmp_path, dtype="fp64"),
    ):
        _, after = same_weights(tokens, state.to(dtype=same_weights.emb.weight.dtype))
        same_weights(tokens, after)
    with torch.no_grad():
        model.head.weight += 0.1  # a training step: it is still the model that made it
    model(tokens, state)
    model.blocks[0].att.key = LoraLinear.from_linear(model.blocks[0].att.key, 2, 4.0)
    model(tokens, state)


def test_a_state_whose_model_is_gone_or_not_known():
    model, tokens = make_model(), make_tokens(1, 2)
    state = init_state_with_past(make_model(), tokens)
    collect()
    with pytest.raises(ParameterError, match=r"no longer there.*\n.*for_other_weights\(\)"):
        model(tokens, state)
    model(tokens, state.for_other_weights())
    model(tokens, RWKVState(*state.tensors().values()))  # of one's own tensors
    model(tokens, loads(dumps(state)))
    whole = join([RWKVState(*state.tensors().values()), model.create_state()])
    assert whole.made_by is not None and whole.made_by() is model


def test_a_state_does_not_keep_its_model():
    model = make_model()
    state, gone = state_after(model), ref(model)
    del model
    collect()
    assert gone() is None and state.clone().batch_size == 1


def test_a_weight_without_memory_is_not_read_to_compare():
    model, tokens = make_model(), make_tokens(1, 2)
    other = deepcopy(model)
    other.blocks[0].ffn.key.weight.untyped_storage().resize_(8)
    with pytest.raises(ParameterError, match="ffn.key.weight needs .* bytes"):
        other(tokens, state_after(model))
    with pytest.raises(ParameterError, match="ffn.key.weight needs .* bytes"):
        save_state("never.safetensors", other.create_state(), other)


def test_states_with_nan_or_of_unequal_parts_are_refused(tmp_path):
    model = make_model()
    state, path = state_after(model), tmp_path / "s.safetensors"
    broken = state.clone()
    broken.att_shift[0, 0, 0] = float("nan")
    with pytest.raises(NumericsError, match="att_shift of the state holds NaN"):
        save_state(path, broken, model)
    assert not path.exists()
    save_state(path, state, model)
    with open_checkpoint(path) as ck:
        tensors, metadata = {name: ck[name] for name in ck}, dict(ck.metadata)
    for message, change in (
        ("of as many", {"wkv": torch.cat([state.wkv] * 2)}),
        ("one at least", {name: part[:0] for name, part in tensors.items()}),
        ("more .torch.float32. is no part", {"more": torch.zeros(1)}),
        ("wkv .torch.int32. is no part", {"wkv": state.wkv.int()}),
        ("holds NaN", {"wkv": state.wkv * float("inf")}),
    ):
        write_checkpoint(path, tensors | change, metadata, overwrite=True)
        with pytest.raises((LayoutError, NumericsError), match=message):
            load_state(path, model)
