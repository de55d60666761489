"""Models and states changed at random in every way that torch allows: compiled code gives what torch gives, or refuses.

`RWKV_LAB_CHANGES=2000` makes that many changes instead of a hundred.
"""

import contextlib
import copy
import os

import pytest
import random_changes as changes
import torch
from random_models import VERSIONS, load_model, make_tokens
from torch.utils.flop_counter import FlopCounterMode

from rwkv_lab.errors import KernelError, RwkvLabError
from rwkv_lab.model import RWKVMode, RWKVState, quantise_weights
from rwkv_lab.model.cpu import eligibility
from rwkv_lab.wkv import use_backend

COUNT = int(os.environ.get("RWKV_LAB_CHANGES", "100"))
PARTS = 5
# Sums in another order. In 16 bits both forms round, at different places; what is really wrong is much further away.
APART = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}
SIZES = [
    dict(n_layer=3, n_head=2, head_size=16),
    dict(n_layer=1, n_head=1, head_size=32, vocab_size=33),
    dict(n_layer=2, n_head=3, head_size=8, dim_ffn=37),
]


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


CONTEXTS = {
    **{"nothing": contextlib.nullcontext, "inference mode": torch.inference_mode, "no gradients": torch.no_grad},
    **{f"default {d}": lambda d=d: default_dtype(d) for d in (torch.bfloat16, torch.float16, torch.float64)},
    "meta as default": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "counting": lambda: FlopCounterMode(display=False),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model of a generation, size and dtype, made once; the caller copies it."""
    made, folder = {}, tmp_path_factory.mktemp("models")

    def model(version, sizes, dtype, bits):
        key = version, sizes, dtype, bits
        if key not in made:
            made[key] = load_model(folder, version, dtype=dtype, **SIZES[sizes])
            if bits:
                # Rounded activations may differ by a whole step where sums differ in their last bit.
                quantise_weights(made[key], f"int{bits}", in_place=True, activations="float32")
        return copy.deepcopy(made[key])

    return model


def outcome(call):
    try:
        logits, state = call()
    except Exception as error:
        return error
    return {"logits": logits, **state.tensors()}


def difference(found, expected) -> str:
    """What of an outcome is not as it should be; "" where all is."""
    if isinstance(found, Exception):
        if isinstance(found, RwkvLabError) and not isinstance(found, KernelError) or isinstance(expected, Exception):
            return "" if str(found).strip() else "an error that says nothing"
        return f"raises {type(found).__name__}: {found}"
    if isinstance(expected, Exception):
        return f"gives a value where torch raises {type(expected).__name__}: {expected}"
    for name, x in found.items():
        right = expected[name]
        if x.shape != right.shape or x.dtype != right.dtype:
            return f"{name} is {x.dtype} {list(x.shape)}, torch's {right.dtype} {list(right.shape)}"
        limit = APART.get(right.dtype, 1e-3) if name == "logits" else max(APART.values())
        x, right = x.detach().double(), right.detach().double()
        if not torch.equal(x.isfinite(), right.isfinite()):
            return f"{name} is not finite where torch's is, or the other way round"
        x, right = x.nan_to_num(0, 0, 0), right.nan_to_num(0, 0, 0)
        if (x - right).norm() > limit * right.norm() + 1e-30:
            return f"{name} is {float((x - right).norm() / right.norm()):.1e} apart"
    return ""


def trial(seed: int, models) -> str:
    """One change; what went wrong, or ""."""
    rng = changes.seeded(seed)
    version, sizes = rng.choice(VERSIONS), rng.randrange(len(SIZES))
    dtype = rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16])
    bits = rng.choice([0, 0, 0, 0, 8, 4])
    model, V = models(version, sizes, dtype, bits), SIZES[sizes].get("vocab_size", 70)
    model.set_mode(rng.choice(list(RWKVMode)))
    eligibility._LARGE = rng.choice([1 << 24, -1])
    B, T = rng.choice([(1, 1), (1, 39), (2, 1), (3, 7), (2, 2)])
    tokens, state = make_tokens(B, T, V, seed), None
    for _ in range(rng.randrange(3)):  # often all is ready and in use
        state = model(make_tokens(B, 3, V, seed), state)[1]
    context = rng.choice(list(CONTEXTS)) if rng.random() < 0.4 else "nothing"
    done, undo, refused, changed = [context], None, False, False
    for _ in range(rng.choice([0, 1, 1, 1, 2])):
        if state is not None and rng.random() < 0.3:
            change = rng.choice(changes.STATE)
            with contextlib.suppress(RuntimeError):  # integers are not halved in place
                state = change(state, rng)
        elif not changed:  # changes of models may not fit on each other
            refused, changed = rng.random() < 0.1, True
            change = rng.choice(changes.REFUSED if refused else changes.MODEL)
            with contextlib.suppress(Exception):  # torch allows it not, as for packed modules, which have no weight
                undo = change(model, rng)
        else:
            break
        done.append(change.__name__)
    what = f"seed {seed}: {version} {dtype} int{bits} {SIZES[sizes]} {model.mode.name} {B}x{T}, {', '.join(done)}: "
    try:
        with CONTEXTS[context]():
            found = [outcome(lambda: model(tokens, state)) for _ in range(2)]
            if refused:
                wrong = next(("not refused" for x in found if not isinstance(x, RwkvLabError)), "")
                return wrong and what + wrong
            with use_backend("reference"):
                expected = outcome(lambda: model(tokens, state))
        wrong = next(filter(None, (difference(x, expected) for x in found)), "")
        return wrong and what + wrong
    finally:
        if undo:
            undo()


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    monkeypatch.setattr(eligibility, "_LARGE", eligibility._LARGE)
    yield
    torch.set_num_threads(1)


@pytest.mark.filterwarnings("ignore")  # torch's own, of what is done to it here
@pytest.mark.parametrize("part", range(PARTS))
def test_compiled_code_gives_what_torch_gives_or_refuses(models, part):
    torch.set_num_threads(1 + part % 2)
    wrong = [said for seed in range(part, COUNT, PARTS) if (said := trial(seed, models))]
    assert not wrong, "\n".join(wrong[:20])


def test_every_change_is_one(models):
    """Each of them does what it says to a model that is not packed, so that the trials do not test nothing."""
    for change in changes.MODEL + changes.REFUSED:
        for seed in range(3):
            with torch.no_grad():
                undo = change(models("7.0", 0, torch.float32, 0), changes.seeded(seed))
            if undo:
                undo()


def test_a_difference_is_found(models):
    model, tokens = models("7.0", 0, torch.float32, 0), make_tokens(1, 3)
    right = outcome(lambda: model(tokens))
    assert difference(right, right) == ""
    assert "apart" in difference(right | {"logits": right["logits"] * 1.01}, right)
    assert "finite" in difference(right | {"wkv": right["wkv"] * torch.nan}, right)
    assert "float64" in difference(right | {"wkv": right["wkv"].double()}, right)
    assert "gives a value" in difference(right, ValueError("no"))
    assert "raises KeyError" in difference(KeyError("x"), right)
    assert isinstance(model(tokens)[1], RWKVState)
