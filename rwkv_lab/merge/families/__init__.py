"""The families of merge methods, in the order of panels and messages. A family is a module here and one line below."""

from rwkv_lab.merge.families.adapters import Adapters
from rwkv_lab.merge.families.into_base import IntoBase
from rwkv_lab.merge.families.mixing import Mixing
from rwkv_lab.merge.families.stacking import Stacking
from rwkv_lab.merge.family import FAMILIES, Family, family_of, method_of, register
from rwkv_lab.merge.method import MERGE_METHODS, Method

for _family in (IntoBase(), Adapters(), Mixing(), Stacking()):
    register(_family)

__all__ = ["FAMILIES", "MERGE_METHODS", "Family", "Method", "family_of", "method_of"]
