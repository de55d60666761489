"""Uses a model of RWKV-0.1 in every way that a model is used; run where the toy's two files are in place."""

import sys
from pathlib import Path

import torch

from rwkv_lab import RWKV_Dual, RWKVMode, init_state_with_past, merge, open_checkpoint
from rwkv_lab.checkpoint import Layout, expected_tensors, write_checkpoint
from rwkv_lab.model import capture, generate, load_state, quantise_weights, save_state
from rwkv_lab.model.cpu.eligibility import fallback_reason

folder = Path(sys.argv[1])
layout = Layout("0.1", 2, 32, 32, 48, 256, 2, 16)
g = torch.Generator().manual_seed(0)
tensors = {name: 0.3 * torch.randn(shape, generator=g) for name, shape in expected_tensors(layout)[0].items()}
write_checkpoint(folder / "toy.pth", tensors)
with open_checkpoint(folder / "toy.pth") as ck:
    assert ck.kind == "model" and ck.layout.version == "0.1", (ck.kind, ck.reason)
    assert ck.layout.n_head == 2 and ck.layout.head_size == 16

model = RWKV_Dual.from_pretrained(folder / "toy.pth").requires_grad_(False)
tokens = torch.randint(256, (2, 9), generator=g)
whole, state = model(tokens)
model.set_mode(RWKVMode.RNN)
one_by_one, after = model(tokens)
assert whole.isfinite().all() and (one_by_one - whole).abs().max() < 1e-4
assert (after.wkv - state.wkv).abs().max() < 1e-4 and (
    init_state_with_past(model, tokens).wkv - state.wkv
).abs().max() < 1e-4
assert all(fallback_reason(model, path) == "RWKV-0.1 has no compiled form" for path in ("prefill", "step"))
with capture(model, names=["y"]) as captured:
    model(tokens)
assert captured["blocks.1.att.y"].shape == (2, 9, 2, 16)
save_state(folder / "state.safetensors", after, model)
assert torch.equal(load_state(folder / "state.safetensors", model).wkv, after.wkv)
assert len(generate(model, ["a", "bc"], max_new_tokens=3, temperature=0)) == 2

again = RWKV_Dual.from_pretrained(model.save_pretrained(folder / "saved"))
assert all(torch.equal(p, tensors[name]) for name, p in again.named_parameters()) and len([*again.parameters()]) == len(
    tensors
)
model.add_time_state()
model.set_mode(RWKVMode.TRANSFORMER)
assert torch.equal(model(tokens)[0], whole)
quantised = quantise_weights(again)
assert (quantised(tokens)[0] - whole).abs().max() < 0.5

write_checkpoint(folder / "tuned.pth", {name: 1.01 * x for name, x in tensors.items() if "att." in name})
merge(folder / "toy.pth", folder / "tuned.pth", folder / "merged.pth", method="overlay")
print("all is well")
