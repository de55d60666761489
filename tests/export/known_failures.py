"""Models that today's torch, transformers or onnxruntime fail to write as ONNX or to run, unless a setting is changed.

`write` is a writer for recovery. `one_by_one` goes through models in one process, since importing takes longest.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rwkv_lab.errors import ONNXExportError, TracerWarningError
from rwkv_lab.export.attempt import all_text
from rwkv_lab.export.diagnosis import Settings, changes, diagnose

C = 8
ASKED: Settings = {
    "onnx_exporter": "dynamo",
    "onnx_opset_version": 20,
    "onnx_dynamic_axes": True,
    "example_length": 5,
    "cache_as_tensors": True,
    "example_dtype": "float32",
}


class Checkpointed(nn.Module):
    """With gradient checkpointing."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(C, C)

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.linear, x, use_reentrant=True)


class Branching(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x * 0


class Looping(nn.Module):
    """A recurrence as a loop of Python."""

    def forward(self, x):
        state, out = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            state = state * 0.5 + x[:, t]
            out.append(state)
        return torch.stack(out, 1)


class Eigenvalues(nn.Module):
    def forward(self, x):
        return torch.linalg.eigvalsh(x.transpose(1, 2) @ x)


class Caching(nn.Module):
    def __init__(self, as_tensors: bool):
        super().__init__()
        self.as_tensors = as_tensors

    def forward(self, x):
        from transformers import DynamicCache

        keys, values = x[:, None] * 2, x[:, None] + 1
        if self.as_tensors:
            return x, keys, values
        cache = DynamicCache()
        cache.update(keys, values, 0)
        return x, cache


class Scaling(nn.Module):
    def forward(self, x):
        return x * x


class Attending(nn.Module):
    """Asks for a causal mask as the models of transformers do: of one token `is_causal` is no bool."""

    def forward(self, x):
        is_causal, x = x.shape[1] > 1 and not self.training, x[:, None]
        return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=is_causal)[:, 0]


class Qwen(nn.Module):
    """The smallest Qwen3 of transformers, from embeddings on."""

    def __init__(self):
        from transformers import Qwen3Config, Qwen3Model

        super().__init__()
        sizes = dict(hidden_size=C, intermediate_size=C, num_hidden_layers=1, num_attention_heads=1, head_dim=C)
        config = Qwen3Config(vocab_size=8, **sizes, num_key_value_heads=1)
        self.model = Qwen3Model(config)

    def forward(self, x):
        return self.model(inputs_embeds=x, use_cache=False).last_hidden_state


MODELS: dict[str, tuple[Any, Settings]] = {  # what fails, and the settings with which it does
    "gradient checkpointing": (Checkpointed, {"onnx_exporter": "legacy"}),
    "branch on a value": (Branching, {}),
    "example of one token": (Attending, {"example_length": 1}),
    "loop": (Looping, {"onnx_exporter": "legacy"}),
    "operator": (Eigenvalues, {}),
    "cache": (Caching, {"cache_as_tensors": False}),
    "bfloat16": (Scaling, {"example_dtype": "bfloat16"}),
    "rotary embedding": (Qwen, {"onnx_opset_version": 23}),
}


def write(settings: Settings, folder: Path, *, which: str) -> list[float]:
    """Write a model, run it at sizes that were not traced, and return how far each result is from the model's."""
    kind, _ = MODELS[which]
    torch.manual_seed(0)
    model = (kind(settings["cache_as_tensors"]) if kind is Caching else kind()).eval()
    dtype = getattr(torch, settings["example_dtype"])
    example = torch.ones(2, settings["example_length"], C, dtype=dtype, requires_grad=kind is Checkpointed)
    folder.mkdir()
    path, names = folder / "model.onnx", {0: "batch", 1: "length"}
    axes = names if settings["onnx_dynamic_axes"] else {}
    given: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"], "verbose": False}
    given["opset_version"] = settings["onnx_opset_version"]
    if settings["onnx_exporter"] == "legacy":
        given |= {"dynamo": False, "dynamic_axes": {"x": axes}}
    else:
        given |= {"dynamo": True, "dynamic_shapes": (axes or None,)}
    torch.onnx.export(model.to(dtype), (example,), str(path), **given)
    shapes = ((3, 7), (1, 1)) if axes else (tuple(example.shape[:2]),)
    return [_error(model, path, settings["onnx_opset_version"], shape) for shape in shapes]


def _error(model: nn.Module, path: Path, opset: int, shape: tuple[int, ...]) -> float:
    import onnx
    import onnxruntime

    written = onnx.load(str(path)).opset_import[0].version
    if written != opset:
        raise ONNXExportError(f"model.onnx is of opset {written}, not {opset} as asked for.")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    x = np.random.default_rng(0).normal(size=(*shape, C)).astype(np.float32)
    found = onnxruntime.InferenceSession(str(path), options).run(None, {"x": x})[0]
    expected = model(torch.from_numpy(x))
    expected = expected[0] if isinstance(expected, tuple) else expected
    if found.shape != expected.shape:
        raise TracerWarningError(f"the length of y is fixed at {found.shape[1]}; it must be any.")
    return float(np.abs(found - expected.detach().numpy()).max())


def one_by_one(names: list[str], folder: Path) -> dict[str, Any]:
    """By model: the text of its error, and the errors of the results with the one fix, None where there is none."""
    found = {}
    for which in names:
        settings, text, errors = ASKED | MODELS[which][1], "", None
        try:
            errors = write(settings, folder / which, which=which)
        except Exception as e:
            text = all_text(e)
            failure = diagnose(text, settings)
            torch._dynamo.reset()
            if failure and changes(failure.fix, settings):
                errors = write(settings | failure.fix, folder / f"{which}, fixed", which=which)
        found[which] = {"text": text, "errors": errors}
        torch._dynamo.reset()
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(json.dumps(one_by_one(sys.argv[2:], Path(sys.argv[1]))))
