"""Differences of two checkpoints, against numpy in float64."""

import numpy as np
import pytest
import torch

from rwkv_lab.analysis.deltas import deltas
from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64,) * 2]
)
@pytest.mark.parametrize("shape", [(1,), (3, 7), (257, 300), (1 << 17,)])
def test_against_numpy(tmp_path, dtypes, shape):
    torch.manual_seed(0)
    before = torch.randn(shape).to(dtypes[0])
    after = (before.double() + torch.randn(shape) * 0.01).to(dtypes[1])
    after.view(-1)[0] = before.view(-1)[0]
    write_checkpoint(tmp_path / "a.pth", {"x": before, "same": before})
    write_checkpoint(tmp_path / "b.safetensors", {"x": after, "new": after, "same": before})
    with open_checkpoint(tmp_path / "a.pth") as a, open_checkpoint(tmp_path / "b.safetensors") as b:
        found, new, same = deltas(a, b, ["x", "new", "same"])
    change = np.abs(after.double().numpy() - before.double().numpy())
    assert found.relative == pytest.approx(np.linalg.norm(change) / np.linalg.norm(before.double().numpy()), rel=1e-4)
    assert found.rms == pytest.approx(np.sqrt((change**2).mean()), rel=1e-4)
    assert found.largest == pytest.approx(change.max(), rel=1e-4)
    assert found.numel == change.size and found.histogram[0] >= 1 and not found.new
    edges = 2.0 ** (np.arange(1, 257) - 127)
    assert np.abs(found.histogram[1:] - np.histogram(change[change > 0], edges)[0]).sum() <= 2 + change.size // 1000
    assert new.new and np.isnan(new.relative)
    assert (same.relative, same.largest, same.histogram[0]) == (0.0, 0.0, same.numel)


def test_nothing_of_a_tensor_is_kept(tmp_path):
    big = torch.zeros(1 << 23)  # 32 MiB
    write_checkpoint(tmp_path / "a.pth", {"x": big})
    write_checkpoint(tmp_path / "b.pth", {"x": big + 1})
    import tracemalloc

    with open_checkpoint(tmp_path / "a.pth") as a, open_checkpoint(tmp_path / "b.pth") as b:
        tracemalloc.start()
        deltas(a, b, ["x"])
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 8 << 20
