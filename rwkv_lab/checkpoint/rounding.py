"""Weights in 8 and 4 bits, and back: the numbers that packed checkpoints and ONNX graphs hold."""

from __future__ import annotations

from rwkv_lab.lazy_numpy import np

BLOCK = 32  # weights along the input that share a scale in int4
_COLUMNS = 1024  # that int8 computes at a time: whole matrices would be in memory several times
NF4_BLOCK = 64  # weights, row by row, that share one in NF4
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def int8(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`[K,N]` float32 -> int8 `[K,N]` and a scale per column, float32 `[N]`: weight ≈ int8 * scale."""
    values, scales = np.empty(weight.shape, np.int8), np.empty(weight.shape[1], np.float32)
    for at in range(0, weight.shape[1], _COLUMNS):
        columns = slice(at, at + _COLUMNS)
        scale = np.abs(weight[:, columns]).max(axis=0) / 127
        scale[scale == 0] = 1
        values[:, columns] = np.rint(weight[:, columns] / scale)
        scales[columns] = scale
    return values, scales


def from_int8(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """What `int8` left, as the graphs multiply it: float32 `[K,N]`."""
    return values.astype(np.float32) * scale


def int4(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`[K,N]` float32 -> what MatMulNBits reads: codes, two in a byte, the first in the low half `[N,K/32,16]`;
    scales `[N,K/32]`; zero points, two in a byte `[N,ceil(K/64)]`. weight ≈ (code - zero point) * scale."""
    blocks = np.ascontiguousarray(weight.T).reshape(weight.shape[1], -1, BLOCK)  # [N,K/32,32]
    low = np.minimum(blocks.min(-1, keepdims=True), 0)
    high = np.maximum(blocks.max(-1, keepdims=True), 0)
    scale = (high - low) / 15
    scale[scale == 0] = 1
    zero = np.clip(np.rint(-low / scale), 0, 15)
    codes = np.clip(np.rint(blocks / scale + zero), 0, 15).astype(np.uint8)
    return _pairs(codes), scale[..., 0].astype(np.float32), _pairs(zero[..., 0].astype(np.uint8))


def from_int4(codes: np.ndarray, scales: np.ndarray, zero_points: np.ndarray) -> np.ndarray:
    """What `int4` left, as MatMulNBits multiplies it: float32 `[K,N]`."""
    zero = _singles(zero_points)[:, : scales.shape[1], None].astype(np.float32)
    values = (_singles(codes).astype(np.float32) - zero) * scales[..., None]
    return values.reshape(len(values), -1).T


def _pairs(codes: np.ndarray) -> np.ndarray:
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def _singles(pairs: np.ndarray) -> np.ndarray:
    return np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*pairs.shape[:-1], -1)


def from_nf4(codes: np.ndarray, absmax: np.ndarray) -> np.ndarray:
    """The matrix of NF4 codes `[out,in/2]`, two in a byte, the first in its high half; absmax `[out·in/64]`: float32
    `[out,in]`."""
    flat = codes.reshape(-1)
    values = np.array(NF4_LEVELS, np.float32)[np.stack([flat >> 4, flat & 15], axis=-1).reshape(-1)]
    return (values * np.repeat(absmax, NF4_BLOCK)[: values.size]).reshape(codes.shape[0], -1)
