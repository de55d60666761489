"""Statistics of tensors, against numpy."""

import math

import numpy as np
import pytest
import torch

from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint
from rwkv_lab.checkpoint.statistics import statistics


def of(tmp_path, tensor):
    write_checkpoint(tmp_path / "x.safetensors", {"x": tensor}, overwrite=True)
    with open_checkpoint(tmp_path / "x.safetensors") as ck:
        return statistics(ck)["x"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8])
@pytest.mark.parametrize("shape", [(), (5,), (300, 700)])
def test_against_numpy(tmp_path, dtype, shape):
    torch.manual_seed(0)
    tensor = (torch.randn(shape) * 20 + 50).to(dtype)
    found, values = of(tmp_path, tensor), tensor.double().numpy()
    assert (found.min, found.max, found.zeros) == (values.min(), values.max(), (values == 0).sum())
    assert found.mean == pytest.approx(values.mean(), rel=1e-12)
    assert found.std == pytest.approx(values.std(), rel=1e-9, abs=1e-12)
    assert (found.nan, found.inf) == (0, 0)


def test_a_mean_far_from_zero_does_not_swallow_the_spread(tmp_path):
    tensor = torch.tensor([1e9, 1e9 + 1] * 100_000, dtype=torch.float64)
    assert of(tmp_path, tensor).std == pytest.approx(0.5, rel=1e-6)


def test_nan_and_inf_are_counted_and_left_out(tmp_path):
    tensor = torch.arange(200_000, dtype=torch.float32)
    tensor[7], tensor[150_000], tensor[3] = math.nan, math.inf, -math.inf
    found = of(tmp_path, tensor)
    assert (found.nan, found.inf, found.zeros, found.min, found.max) == (1, 2, 1, 0, 199_999)
    assert found.mean == pytest.approx(np.delete(np.arange(200_000.0), [7, 150_000, 3]).mean())
    assert found.absmax == 199_999


def test_nothing_finite(tmp_path):
    found = of(tmp_path, torch.full((3,), math.nan))
    assert found.nan == 3 and math.isnan(found.mean) and math.isnan(found.absmax)
    assert math.isnan(of(tmp_path, torch.empty(0, 4)).min)
