"""The names in a folder that `export_onnx` writes and `OnnxModel` reads."""

from typing import Literal

Weights = Literal["fp32", "fp16", "int8", "int4"]
Logits = Literal["all", "last"]
Recurrence = Literal["scan", "linear_attention"]  # of the sequence graph
Exporter = Literal["dynamo", "legacy"]  # torch's; the old one traces by TorchScript
Attention = Literal["eager", "sdpa"]  # what transformers calls the code that is traced
LINEAR = ("5.0", "5.1", "5.2", "6.0")  # generations that linear_attention is for

SEQUENCE, STEP = "model.onnx", "step.onnx"
INITIAL_STATE, MANIFEST = "initial_state.npz", "export.json"
STATES = ("wkv", "att_shift", "ffn_shift")  # what a graph takes beside tokens, and gives as <name>_out beside logits
AXES = {"tokens": ("batch", "length"), **{name: ("batch",) for name in STATES}}  # that can have any size
CONTRIB = "com.microsoft"  # the domain of operators that onnxruntime alone has

CAUSAL_LM = "rwkv_lab.causal_lm 1"  # the format that a manifest states of a model of Hugging Face


def past_names(layers: int) -> list[str]:
    """What a graph of a causal language model takes beside tokens and mask: keys and values of each layer."""
    return [f"past_key_values.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


_EXAMPLE = """\
from rwkv_lab.export import OnnxModel

model = OnnxModel(".")
print({call})
"""


def axes_of(one_token: bool, logits: Logits) -> dict[str, tuple[str | int, ...]]:
    """The first axes of inputs and outputs, as they must be: a name for one of any size."""
    tokens: tuple[str | int, ...] = ("batch", 1) if one_token else AXES["tokens"]
    states = {f"{name}{end}": AXES[name] for name in STATES for end in ("", "_out")}
    return {"tokens": tokens, "logits": ("batch",) if one_token or logits == "last" else AXES["tokens"], **states}


def readme(version: str, weights: str, has_tokenizer: bool) -> str:
    """README.md of a folder, with the lines that run it there."""
    by_text = 'model.generate("The ", max_new_tokens=50)'
    by_ids = "[token for token, _ in model.stream([1, 2, 3], max_new_tokens=50)]"
    return f"""\
# An RWKV-{version} language model for onnxruntime

Run it in this folder; `pip install 'rwkv_lab[text]' onnxruntime` brings what it needs:

```python
{_EXAMPLE.format(call=by_text if has_tokenizer else by_ids)}```

Weights are stored as {weights}. `{SEQUENCE}` reads a sequence, `{STEP}` one token; both take tokens and the state, and
give logits and the new state, which is float32. `{INITIAL_STATE}` has the state before the first token. `{MANIFEST}`
says what made this folder, and has the SHA-256 of every file.
"""
