"""What the numbers in a GGUF file mean: types of the values in its header, and of its tensors.

Facts of ggml's own documentation: a quantised tensor is a run of blocks, each with its elements and their scale.
"""

import struct
from dataclasses import dataclass

from rwkv_lab.errors import ParameterError

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # 3 only adds files in big-endian order
ALIGNMENT = 32  # bytes, of every tensor, unless general.alignment says otherwise

BOOL, STRING, ARRAY = 7, 8, 9
SCALARS = {  # number of a type of value -> how struct reads it
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    BOOL: struct.Struct("<B"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
UINT32, INT32, FLOAT32 = 4, 5, 6


@dataclass(frozen=True)
class TensorType:
    """How the elements of a tensor lie in a file."""

    number: int
    name: str  # ggml's
    elements: int  # of a block; 1 where they are not quantised
    nbytes: int  # of a block
    dtype: str | None = None  # torch's name of it; of elements that are not quantised

    def bytes_of(self, numel: int) -> int:
        """Bytes of so many elements."""
        return numel // self.elements * self.nbytes


TYPES = {
    t.number: t
    for t in (
        TensorType(0, "F32", 1, 4, "float32"),
        TensorType(1, "F16", 1, 2, "float16"),
        TensorType(30, "BF16", 1, 2, "bfloat16"),
        TensorType(28, "F64", 1, 8, "float64"),
        TensorType(24, "I8", 1, 1, "int8"),
        TensorType(25, "I16", 1, 2, "int16"),
        TensorType(26, "I32", 1, 4, "int32"),
        TensorType(27, "I64", 1, 8, "int64"),
        TensorType(2, "Q4_0", 32, 18),
        TensorType(3, "Q4_1", 32, 20),
        TensorType(6, "Q5_0", 32, 22),
        TensorType(7, "Q5_1", 32, 24),
        TensorType(8, "Q8_0", 32, 34),
        TensorType(10, "Q2_K", 256, 84),
        TensorType(11, "Q3_K", 256, 110),
        TensorType(12, "Q4_K", 256, 144),
        TensorType(13, "Q5_K", 256, 176),
        TensorType(14, "Q6_K", 256, 210),
        TensorType(16, "IQ2_XXS", 256, 66),
        TensorType(17, "IQ2_XS", 256, 74),
        TensorType(18, "IQ3_XXS", 256, 98),
        TensorType(19, "IQ1_S", 256, 50),
        TensorType(20, "IQ4_NL", 32, 18),
        TensorType(21, "IQ3_S", 256, 110),
        TensorType(22, "IQ2_S", 256, 82),
        TensorType(23, "IQ4_XS", 256, 136),
        TensorType(29, "IQ1_M", 256, 56),
        TensorType(34, "TQ1_0", 256, 54),
        TensorType(35, "TQ2_0", 256, 66),
        TensorType(39, "MXFP4", 32, 17),
    )
}
BY_NAME = {t.name: t for t in TYPES.values()}
BY_DTYPE = {t.dtype: t for t in TYPES.values() if t.dtype is not None}


def require_gguf(what: str) -> None:
    """Refuse a job that the package gguf is missing for.

    Raises:
        ParameterError: it is not installed.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as e:
        raise ParameterError(f"{what} needs the package gguf.\nInstall it: pip install 'rwkv_lab[convert]'") from e
