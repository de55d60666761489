"""RWKV models: one set of weights, run over whole sequences or token by token, with the same answers."""

import pkgutil
from importlib import import_module

from rwkv_lab.model.capture import capture
from rwkv_lab.model.chat import ChatTemplate, Turn, chat, render_turns
from rwkv_lab.model.dual import RWKV_Dual, RWKVMode, init_state_with_past
from rwkv_lab.model.evaluate import bits_per_byte
from rwkv_lab.model.generation import GenerationStream, generate, generate_stream
from rwkv_lab.model.sampling import row_seed
from rwkv_lab.model.state import RWKVState
from rwkv_lab.model.state_cache import StateCache
from rwkv_lab.model.state_file import load_state, save_state
from rwkv_lab.model.weight_only import agreement_of_logits, quantise_weights
from rwkv_lab.tokenizer import ByteTokenizer, WorldTokenizer, load_tokenizer

__all__ = [
    "RWKV_Dual",
    "RWKVMode",
    "RWKVState",
    "ByteTokenizer",
    "ChatTemplate",
    "GenerationStream",
    "StateCache",
    "Turn",
    "WorldTokenizer",
    "agreement_of_logits",
    "bits_per_byte",
    "capture",
    "chat",
    "generate",
    "generate_stream",
    "init_state_with_past",
    "load_state",
    "load_tokenizer",
    "quantise_weights",
    "render_turns",
    "row_seed",
    "save_state",
]

for _module in pkgutil.iter_modules(__path__):  # every generation is a file here, which registers it
    if _module.name.startswith("rwkv"):
        import_module(f"{__name__}.{_module.name}")
