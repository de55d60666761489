"""Mixes at the edges of their arithmetic: weights that cancel or are too large, deltas that turn from each other."""

import pytest
import torch
from models import random_model, same

from rwkv_lab import merge
from rwkv_lab.errors import ParameterError
from rwkv_lab.merge import verify_merge
from rwkv_lab.merge.mixing.model_stock import ratio
from rwkv_lab.merge.mixing.ties import elect

NAME = "blocks.0.att.key.weight"


@pytest.fixture
def run(tmp_path):
    """Mixes base with base + delta for each delta; gives the output's tensors, after `verify_merge` passed."""

    def mixed(base, *deltas, **more):
        models = [base, *({n: t + d for n, t in base.items()} for d in deltas)]
        paths = [tmp_path / f"{i}.pth" for i in range(len(models))]
        for path, tensors in zip(paths, models, strict=True):
            torch.save(tensors, path)
        result = merge(paths[0], paths[1:], tmp_path / "out.pth", overwrite=True, **more)
        if more.get("dry_run"):
            return None
        # Without the effect: some of these leave the base as it is.
        checks = [*result.checks[:2], *verify_merge(result)]
        assert all(c.passed for c in checks), [str(c) for c in checks if not c.passed]
        return torch.load(tmp_path / "out.pth", weights_only=True)

    return mixed


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_weights_that_cancel_but_for_rounding_are_no_divisor(method, precision, run):
    base = random_model(dtype=torch.float32)
    more = {"method": method, "precision": precision, "parameters": {"density": 1.0}}
    found = run(base, 1.0, 2.0, -1.0, weights=[1.1, 2.2, -3.3], **more)  # all three weighted deltas are positive
    for name, t in base.items():  # 1.1 + 4.4 + 3.3: the sum, as where the weights' sum is exactly 0
        torch.testing.assert_close(found[name], t + 8.8, rtol=1e-6, atol=1e-6)
    found = run(base, 1.0, -1.0, weights=[1.0, -0.999], **more)  # a sum of 1e-3 is one
    for name, t in base.items():
        torch.testing.assert_close(found[name], t + 1999, rtol=1e-6, atol=1e-6)


def test_a_small_weight_alone_is_a_divisor_beside_large_ones():
    base = torch.zeros(2)
    found = elect([torch.tensor([1.0, 0.0]), torch.tensor([0.0, -3.0])], base, 1.0, [1e-9, -1e9], True)
    assert torch.equal(found, torch.tensor([1.0, -3.0]))


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_a_mean_by_weights_that_cancel_is_refused_at_every_scale(method, run):
    base = random_model()
    for scale in (1e-12, 1.0, 1e12):
        weights = [1.1 * scale, 2.2 * scale, -3.3 * scale]
        deltas = (0.1, 0.2) if method == "linear" else (0.1, 0.2, 0.3)
        with pytest.raises(ParameterError, match="add up to"):
            run(base, *deltas, method=method, weights=weights, parameters={"normalize": True}, dry_run=True)
    run(base, 0.1, method="linear", weights=[1e-12, 3e-12])


def test_deltas_that_turn_from_each_other_leave_the_base(run):
    base = random_model(dtype=torch.float32)
    g = torch.Generator().manual_seed(0)
    up = 0.1 * torch.randn(base[NAME].shape, generator=g)
    down = -up + 0.01 * torch.randn(up.shape, generator=g)

    def blocks():
        yield torch.zeros(up.numel()), [up.flatten(), down.flatten()]

    assert ratio(blocks) == 0.0
    found = run(base, 0.1, -0.1001, method="model_stock")
    assert all(same(found[n], t) for n, t in base.items())

    def alike():
        yield torch.zeros(3), [torch.tensor([1.0, 2.0, 3.0])] * 2

    assert ratio(alike) == pytest.approx(1.0, abs=1e-12) and ratio(alike) <= 1.0


TOO_LARGE = [
    ({"method": "linear", "weights": [1e308, 1e308, 1]}, r"weights=.*1e\+308"),
    ({"method": "linear", "weights": [3e38, 3e38, 3e38]}, "add up to more than float32 holds"),
    ({"method": "linear", "weights": [1, 1e39, 1], "parameters": {"normalize": False}}, r"1e\+39"),
    ({"method": "task_arithmetic", "weights": [3e38, 3e38], "parameters": {"normalize": True}}, "add up to more"),
    ({"method": "task_arithmetic", "weights": [1e39, 1]}, r"weights=.*1e\+39"),
    ({"method": "task_arithmetic", "alpha": 1e39}, r"alpha=1e\+39"),
    ({"method": "task_arithmetic", "alpha": 1e30, "weights": [1e30, 1]}, r"alpha 1e\+30 times weight 1e\+30"),
    ({"method": "dare_linear", "alpha": -1e39}, r"alpha=-1e\+39"),
    ({"method": "ties", "alpha": 1e39}, r"alpha=1e\+39"),
    ({"method": "ties", "weights": [3e38, 3e38]}, "add up to more"),
    ({"method": "dare_ties", "weights": [1e39, 1]}, r"1e\+39"),
    ({"method": "ties", "alpha": 10**400}, "at most"),
    ({"method": "ties", "parameters": {"alpha": {"gradient": [0, 10**400]}}}, "numbers of float32"),
]


@pytest.mark.parametrize(("given", "said"), TOO_LARGE)
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_what_float32_cannot_hold_is_refused_by_the_plan(given, said, precision, run):
    with pytest.raises(ParameterError, match=said) as caught:
        run(random_model(), 0.1, 0.2, dry_run=True, precision=precision, **given)
    assert str(caught.value).count("\n") < 3
