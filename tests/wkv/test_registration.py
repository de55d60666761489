"""The compiled operators as torch sees them: opcheck, torch.compile and torch.export, through operators and models."""

from dataclasses import replace

import pytest
import torch
from models import LAYOUTS, random_model
from test_cpu import OPERATORS, make

from rwkv_lab.checkpoint import write_checkpoint
from rwkv_lab.model import RWKV_Dual
from rwkv_lab.wkv import backends, operators

pytestmark = [
    pytest.mark.skipif("cpu" not in backends(), reason="no C++ compiler"),
    # torch's own: a checker for it, and what its compiler imports
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
TORCH_NAME = {"wkv4": operators.wkv4, "wkv5": operators.wkv6, "wkv6": operators.wkv6, "wkv7": operators.wkv7}


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name, keep):
    inputs = [x.requires_grad_(keep) for x in make(name, 2, 5, 2, 32).values()]
    torch.library.opcheck(TORCH_NAME[name], (*inputs, keep))


@pytest.mark.parametrize("name", OPERATORS)
def test_compiled_without_a_break_it_gives_the_same(name):
    inputs = {z: x.requires_grad_() for z, x in make(name, 2, 9, 1, 32).items()}
    torch._dynamo.reset()
    compiled = torch.compile(OPERATORS[name], fullgraph=True, backend="aot_eager")
    results = []
    for operator in (compiled, OPERATORS[name]):
        y, state = operator(**inputs)
        results.append((y, state, *torch.autograd.grad(y.sum() + state.sum(), list(inputs.values()))))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def make_model(folder, version, n_layer=2):
    write_checkpoint(folder / "m.pth", random_model(replace(LAYOUTS[version], n_layer=n_layer)))
    return RWKV_Dual.from_pretrained(folder / "m.pth").requires_grad_(False)


class Logits(torch.nn.Module):
    """A model as a function of tokens alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model.parallel(tokens)[0]


@pytest.mark.parametrize("version", ["4.0", "5.2", "6.0", "7.0"])
def test_export_goes_through_models(version, tmp_path):  # from T = 3 on: torch sees T - 1 = 1 as a case of its own
    model = make_model(tmp_path, version)
    tokens = torch.arange(12).view(2, 6) % 11
    exported = torch.export.export(
        Logits(model), (tokens,), dynamic_shapes=({1: torch.export.Dim("T", min=3, max=64)},)
    )
    assert any("rwkv_lab.wkv" in str(node.target) for node in exported.graph.nodes)
    longer = torch.arange(22).view(2, 11) % 11
    # Called directly the compiled pass answers, exported torch's operators: each 2e-6 to 3e-6 (RMS) away from float64.
    expected = Logits(model)(longer)
    assert (exported.module()(longer) - expected).square().mean().sqrt() < 1e-5 * expected.square().mean().sqrt()


def test_inductor_goes_through_a_model(tmp_path):
    from torch._inductor import config  # a second, which other tests do without

    model = make_model(tmp_path, "7.0", n_layer=1)  # another layer takes 8 s more
    tokens = torch.arange(12).view(2, 6) % 11
    torch._dynamo.reset()
    compiled = torch.compile(Logits(model), fullgraph=True)
    with config.patch(compile_threads=1):  # none of its own processes, each of which imports torch
        found = compiled(tokens)
    torch.testing.assert_close(found, Logits(model)(tokens), rtol=1e-4, atol=1e-4)
