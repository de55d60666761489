"""RWKV models: one set of weights, run over whole sequences or token by token, with the same answers."""

from rwkv_lab.model.dual import RWKV_Dual, RWKVMode, init_state_with_past
from rwkv_lab.model.evaluate import bits_per_byte
from rwkv_lab.model.state import RWKVState
from rwkv_lab.model.tokenizer import ByteTokenizer

__all__ = ["RWKV_Dual", "RWKVMode", "RWKVState", "ByteTokenizer", "bits_per_byte", "init_state_with_past"]
