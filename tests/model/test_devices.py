"""Devices that are not there, fail or have too little memory: the message, and the same call on another device.

The meta device plays the part of one that fails: it is there in every torch, and here it raises what CUDA would.
"""

import pytest
import torch
from random_models import load_model, make_layout, make_tokens, write_model

from rwkv_lab.errors import DeviceError, ParameterError
from rwkv_lab.model import RWKV_Dual, RWKVMode

NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore lines")
BROKEN = RuntimeError("CUDA error: an illegal memory access was encountered\nmore lines")


@pytest.fixture
def path(tmp_path):
    return write_model(tmp_path / "m.pth", make_layout("6.0"))


def fail_on_meta(monkeypatch, error):
    """Loading onto the meta device raises."""
    to_empty = torch.nn.Module.to_empty

    def failing(self, *, device, recurse=True):
        if torch.device(device).type == "meta":
            raise error
        return to_empty(self, device=device, recurse=recurse)

    monkeypatch.setattr(torch.nn.Module, "to_empty", failing)


@pytest.mark.parametrize(
    "error, words",
    [
        (NO_MEMORY, r"meta ran out of memory.*\n.*bfloat16.*ctx_len.*\n.*fallback=\"cpu\""),
        (
            BROKEN,
            r"meta failed: CUDA error: an illegal.*\n.*device=\"cpu\".*fallback=\"cpu\".*\n.*CUDA_LAUNCH_BLOCKING",
        ),
    ],
)
def test_a_device_that_fails_while_loading(monkeypatch, path, error, words):
    fail_on_meta(monkeypatch, error)
    with pytest.raises(DeviceError, match=words) as caught:
        RWKV_Dual.from_pretrained(path, device="meta")
    assert len(str(caught.value).splitlines()) <= 3
    with pytest.warns(RuntimeWarning, match="^meta .*Going on with device='cpu'"):
        model = RWKV_Dual.from_pretrained(path, device="meta", fallback="cpu")
    expected = RWKV_Dual.from_pretrained(path)(make_tokens(1, 5))[0]
    assert model.get_device().type == "cpu" and torch.equal(model(make_tokens(1, 5))[0], expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, so asking for one does not fail")
def test_a_device_that_is_not_there(path):
    with pytest.raises(DeviceError, match="cuda failed"):
        RWKV_Dual.from_pretrained(path, device="cuda")
    with pytest.warns(RuntimeWarning, match="cuda failed.*'cpu'"):
        assert RWKV_Dual.from_pretrained(path, device="cuda", fallback="cpu").get_device().type == "cpu"
    for names in (dict(device="cdua"), dict(fallback="cdua")):
        with pytest.raises(ParameterError, match="'cdua'"):
            RWKV_Dual.from_pretrained(path, **names)


@pytest.mark.parametrize("mode", list(RWKVMode))
@pytest.mark.parametrize("error", [NO_MEMORY, BROKEN])
def test_a_device_that_fails_later(monkeypatch, path, error, mode):
    model = RWKV_Dual.from_pretrained(path, mode=mode)
    tokens = make_tokens(2, 5)
    _, state = model(tokens)
    expected, _ = model(tokens, state=state)
    forward, calls = type(model.blocks[1]).forward, []

    def failing(self, *args):
        if not calls:
            calls.append(1)
            raise error
        return forward(self, *args)

    monkeypatch.setattr(type(model.blocks[1]), "forward", failing)
    with pytest.raises(DeviceError, match="^cpu "):
        model(tokens, state=state)
    calls.clear()
    model.fallback = torch.device("cpu:0")
    with pytest.warns(RuntimeWarning, match="^cpu .*'cpu:0'"):
        logits, _ = model(tokens, state)
    assert torch.equal(logits, expected)


def test_other_errors_are_not_taken_for_the_devices(monkeypatch, path):
    model = RWKV_Dual.from_pretrained(path, fallback="cpu")
    monkeypatch.setattr(model.blocks[0].att, "forward", lambda *args: torch.ones(2, 3) @ torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        model(make_tokens(1, 2))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("version", ["4.0", "5.2", "6.0", "7.0"])
def test_cuda_gives_what_the_cpu_gives(tmp_path, version):
    model = load_model(tmp_path, version)
    expected, _ = model(make_tokens(2, 70))
    model = model.cuda()
    for mode in RWKVMode:
        model.set_mode(mode)
        logits, _ = model(make_tokens(2, 70))
        torch.testing.assert_close(logits.cpu(), expected, rtol=1e-3, atol=1e-3)
