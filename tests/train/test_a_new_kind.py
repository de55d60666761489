"""A kind of adapter more is one file in rwkv_lab/peft/kinds, a kind of training one in rwkv_lab/train/kinds."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GAIN = '''"""A gain per output: the row o of the weight times 1 + g[o]."""

from dataclasses import dataclass, replace

import torch
from torch import nn

from rwkv_lab.errors import ParameterError
from rwkv_lab.peft.adapter import InMemory, Target, Values
from rwkv_lab.peft.config import AdapterKind, register
from rwkv_lab.peft.linear import AdaptedLinear


class GainLinear(AdaptedLinear):
    adapter_names = ("gain",)

    def _make_adapter(self):
        self.gain = nn.Parameter(torch.zeros(self.out_features, dtype=torch.float32, device=self._device()))

    def forward(self, x):
        return (super().forward(x) * (1 + self.gain)).to(x.dtype)

    def merged_weight(self):
        return self._base() * (1 + self.gain.detach())[:, None]


@dataclass(frozen=True)
class GainTarget(Target):
    gain: Values  # [out]
    rank = 1

    @property
    def tensors(self):
        return {"gain": self.gain}

    def settings(self):
        return {}

    def misfit(self, shape):
        return "" if tuple(self.gain.shape) == tuple(shape[:1]) else f"a gain {list(self.gain.shape)}"

    def _rows(self, like, first_row):
        return (1 + self.gain.read().to(like)[first_row : first_row + len(like)])[:, None]

    def adapted_rows(self, residual, first_row=0):
        return residual * self._rows(residual, first_row)

    def restored_rows(self, merged, first_row=0):
        return merged / self._rows(merged, first_row)

    def prepared(self, weight, dtype):
        return replace(self, gain=InMemory(self.gain.read().to(dtype) * weight))


class Gain(AdapterKind):
    method, described, layer_type = "gain", "a gain", GainLinear

    def check(self, config):
        pass

    def new_layer(self, linear, config):
        return GainLinear.from_linear(linear)

    def target(self, layer):
        return GainTarget(InMemory(layer.gain))

    def trained_layer(self, linear, target):
        layer = GainLinear.from_linear(linear)
        with torch.no_grad():
            layer.gain.copy_(target.gain.read())
        return layer

    def file_part(self, name):
        return (name.removesuffix(".gain"), "gain") if name.endswith(".gain") else None

    def check_note(self, note):
        pass

    def read_file(self, ck, layers, note, options):
        return {x: GainTarget(parts["gain"]) for x, parts in layers.items()}, "gain"

    def file_content(self, adapter):
        return adapter.tensors(), {"method": "gain", "quant": adapter.quant}

    def folder_part(self, name):
        return None

    def read_folder(self, ck, config, layers, options):
        raise NotImplementedError

    def folder_content(self, adapter):
        raise ParameterError("Hugging Face's peft has no gains. Save it as a .pth or .safetensors.")


register(Gain())
'''
TRAIN = """
import torch
from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.errors import ParameterError
from rwkv_lab.peft import apply_peft, LoraConfig, adapter_of, load_adapter, merged_state_dict, open_adapter
from rwkv_lab.train import TrainSpec, compared_kinds, open_trained, plan_training, train
from rwkv_lab.train.verify import verify_training
torch.set_num_threads(1)
short = dict(base="base.pth", data="texts", steps=20, batch_size=4, ctx_len=16, lr=0.01, targets=["ffn.key"])
plan = plan_training("gain", **short)
result = train("gain", "out.pth", samples=False, quant="nf4", **short)
assert plan.count == result.trained and result.bits_after < result.bits_before, result
spec = TrainSpec.read(dict(kind="gain", quant="nf4") | short)
assert all(check.passed for check in verify_training(spec, result)), verify_training(spec, result)
with open_checkpoint("out.pth") as ck, open_adapter("out.pth") as adapter:
    assert ck.kind == "gain" and adapter.method == "gain" and adapter.quant == "nf4"
model = open_trained(spec, "out.pth")
name = next(iter(adapter_of(model).targets))
layer, target = model.get_submodule(name), adapter_of(model).targets[name]
rows = target.adapted_rows(layer._base())
assert torch.equal(merged_state_dict(model)[name + ".weight"], rows) and not torch.equal(rows, layer._base())
try:
    train("gain", "folder", samples=False, **short)
except ParameterError as e:
    print(e)
print(*compared_kinds())
"""
NORMS = '''"""Training of all LayerNorms and nothing else."""

import math

from rwkv_lab.train.kinds.whole import WholeModel
from rwkv_lab.train.spec import Defaults, register


class Norms(WholeModel):
    def make_model(self, spec):
        model = super().make_model(spec)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".ln" in f".{name}")
        return model

    def planned(self, spec, layout, shapes):
        return [(name, shape, math.prod(shape)) for name, shape in shapes.items() if ".ln" in f".{name}"]


register(Norms("norms", Defaults("python", 20, batch_size=2, ctx_len=16, lr=1e-3, final_lr=0.1), needs_base=True))
'''
TRAIN_NORMS = """
import torch
from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.train import TrainSpec, plan_training, train
from rwkv_lab.train.verify import verify_training
torch.set_num_threads(1)
short = dict(base="base.pth", data="texts")
result = train("norms", "norms.pth", samples=False, **short)
assert plan_training("norms", **short).count == result.trained and len(result.losses) == 20
assert all(check.passed for check in verify_training(TrainSpec.read(dict(kind="norms") | short), result))
with open_checkpoint("norms.pth") as a, open_checkpoint("base.pth") as b:
    print(*{name.split(".")[-2] for name in a if not torch.equal(a[name], b[name])})
"""
KINDS = "from rwkv_lab.train import KINDS; print(*KINDS)"


@pytest.fixture(scope="module")
def tree(tmp_path_factory, small, texts) -> Path:
    """A copy of the project with a kind more of both, a model and texts."""
    tree = tmp_path_factory.mktemp("project")
    for folder in ("rwkv_lab", "kernels"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "rwkv_lab" / "peft" / "kinds" / "gain.py").write_text(GAIN)
    (tree / "rwkv_lab" / "train" / "kinds" / "norms.py").write_text(NORMS)
    shutil.copy(small, tree / "base.pth")
    shutil.copytree(texts, tree / "texts")
    return tree


def python(tree: Path, program: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_an_adapter_is_trained_saved_recognised_and_loaded(tree):
    refusal, compared = python(tree, TRAIN).splitlines()
    assert refusal == "Hugging Face's peft has no gains. Save it as a .pth or .safetensors."
    assert compared.split() == ["lora", "pissa", "miss", "gain", "state"]


def test_a_training_trains_what_it_names(tree):
    assert set(python(tree, TRAIN_NORMS).split()) == {"ln0", "ln1", "ln2", "ln_x", "ln_out"}


def test_without_their_files_they_are_gone(tree):
    assert python(tree, KINDS).split() == ["pretrain", "full", "state", "lora", "pissa", "miss", "gain", "norms"]
    (tree / "rwkv_lab" / "peft" / "kinds" / "gain.py").unlink()
    (tree / "rwkv_lab" / "train" / "kinds" / "norms.py").unlink()
    assert python(tree, KINDS).split() == ["pretrain", "full", "state", "lora", "pissa", "miss"]
