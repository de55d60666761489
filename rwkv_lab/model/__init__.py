"""RWKV models: one set of weights, run over whole sequences or token by token, with the same answers.

Names are imported on first use. Every generation is a file here (`registry`), found when the first model is made.
"""

from typing import TYPE_CHECKING

from rwkv_lab.lazy_names import found_on_use

if TYPE_CHECKING:
    from rwkv_lab.model.capture import capture
    from rwkv_lab.model.chat import chat
    from rwkv_lab.model.chat_template import ChatTemplate, Turn, render_turns
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

found_on_use(
    __name__,
    {
        "RWKV_Dual": "rwkv_lab.model.dual",
        "RWKVMode": "rwkv_lab.model.dual",
        "RWKVState": "rwkv_lab.model.state",
        "ByteTokenizer": "rwkv_lab.tokenizer",
        "ChatTemplate": "rwkv_lab.model.chat_template",
        "GenerationStream": "rwkv_lab.model.generation",
        "StateCache": "rwkv_lab.model.state_cache",
        "Turn": "rwkv_lab.model.chat_template",
        "WorldTokenizer": "rwkv_lab.tokenizer",
        "agreement_of_logits": "rwkv_lab.model.weight_only",
        "bits_per_byte": "rwkv_lab.model.evaluate",
        "capture": "rwkv_lab.model.capture",
        "chat": "rwkv_lab.model.chat",
        "generate": "rwkv_lab.model.generation",
        "generate_stream": "rwkv_lab.model.generation",
        "init_state_with_past": "rwkv_lab.model.dual",
        "load_state": "rwkv_lab.model.state_file",
        "load_tokenizer": "rwkv_lab.tokenizer",
        "quantise_weights": "rwkv_lab.model.weight_only",
        "render_turns": "rwkv_lab.model.chat_template",
        "row_seed": "rwkv_lab.model.sampling",
        "save_state": "rwkv_lab.model.state_file",
    },
)
