"""The families of models that can be exported."""

from rwkv_lab.export.families.huggingface import HuggingFace
from rwkv_lab.export.families.rwkv import Rwkv
from rwkv_lab.export.family import Family

FAMILIES: tuple[Family, ...] = (Rwkv(), HuggingFace())
