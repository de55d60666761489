"""Conversion: any format in, any format out."""

import rwkv_lab.convert.gguf_file  # noqa: F401  # makes the container known
from rwkv_lab.convert.convert import convert, run_convert, to_gguf, to_huggingface, to_pth, to_safetensors
from rwkv_lab.convert.hub import Pushed
from rwkv_lab.convert.hub_download import Download, download
from rwkv_lab.convert.hub_push import push_to_hub
from rwkv_lab.convert.logits import compare_logits
from rwkv_lab.convert.plan import ConvertPlan, ConvertResult, ConvertRow, Dropped, Rounding
from rwkv_lab.convert.planning import plan_convert
from rwkv_lab.convert.spec import ConvertOptions, ConvertSpec
from rwkv_lab.convert.targets import target_names
from rwkv_lab.convert.verify import verify_convert
from rwkv_lab.convert.writing import write_convert

__all__ = [
    "ConvertOptions",
    "ConvertPlan",
    "ConvertResult",
    "ConvertRow",
    "ConvertSpec",
    "Download",
    "Dropped",
    "Pushed",
    "Rounding",
    "compare_logits",
    "convert",
    "download",
    "plan_convert",
    "push_to_hub",
    "run_convert",
    "target_names",
    "to_gguf",
    "to_huggingface",
    "to_pth",
    "to_safetensors",
    "verify_convert",
    "write_convert",
]
