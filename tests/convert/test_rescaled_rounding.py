"""`rescale` where halving takes bits away: counted, and right in the rest."""

import pytest
import torch
from models import LAYOUTS, random_model, snapshot

from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint
from rwkv_lab.convert import convert
from rwkv_lab.errors import NumericsError

NAMES = ("blocks.1.att.output.weight", "blocks.1.ffn.value.weight")
TARGETS = [("transformers", "4.0", "o"), ("world", "6.0", "o"), ("world", "5.2", "o"), ("gguf", "6.0", "o.gguf")]


def saved(folder, version, scale, dtype):
    tensors = {n: t.float() * (scale if n in NAMES else 1) for n, t in random_model(LAYOUTS[version]).items()}
    write_checkpoint(folder / "m.pth", {n: t.to(dtype) for n, t in tensors.items()})
    return folder / "m.pth", {n: tensors[n].to(dtype) for n in NAMES}


@pytest.mark.parametrize(("to", "version", "out"), TARGETS)
@pytest.mark.parametrize(
    ("dtype", "wanted", "scale"),
    [
        (torch.float16, None, 1e-6),
        (torch.float16, "fp16", 1e-6),
        (torch.float32, "fp16", 1e-5),
        (torch.bfloat16, "bf16", 1e-38),
        (torch.float32, "fp32", 1e-38),
    ],
)
def test_values_that_halving_takes_bits_of_are_counted(to, version, out, dtype, wanted, scale, tmp_path):
    path, before = saved(tmp_path, version, scale, dtype)
    result = convert(path, to, tmp_path / out, rescale=1, dtype=wanted)
    assert all(check.passed for check in result.checks)
    with open_checkpoint(tmp_path / out) as ck:
        after = {n: ck[n] for n in NAMES}
    written = {n: (before[n].double() / 2).to(after[n].dtype) for n in NAMES}
    assert all(torch.equal(after[n].flatten(), (written[n] * 2).flatten()) for n in NAMES)
    lost = sum(int((written[n].double() * 2 != before[n].double()).sum()) for n in NAMES)
    theirs = [row.name for row in result.plan.rows if {*row.sources} & {*NAMES}]
    assert lost and sum(r.rounded + r.flushed for r in result.rounding if r.name in theirs) == lost
    assert any("were rounded, halved by rescale=1" in note or "in the new dtype" in note for note in result.notes)


def test_what_would_be_infinite_when_it_is_read_again_is_refused(tmp_path):
    """1e5 halved fits into float16, and 1e5 itself does not."""
    path, _ = saved(tmp_path, "6.0", 4e4, torch.float32)
    before = snapshot(tmp_path)
    with pytest.raises(NumericsError, match=r"blocks\.1\.attention\.output\.weight \(\d+ overflow\)"):
        convert(path, "world", tmp_path / "o", rescale=1, dtype="fp16")
    assert snapshot(tmp_path) == before
