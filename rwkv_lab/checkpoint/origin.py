"""Which base a tuned file belongs to, as rwkv_lab notes it in adapters, states and fine-tunes that it trains.

A base is known again by its values, whatever file they lie in: some values of every tensor, rounded to each of three
dtypes and hashed. A cast rounds values to what the original rounds to as well, so that one of the hashes at least is
the same; a fine-tune has others in all of them. There are hashes of the first values and, of files whose values can be
read where they are, of values from the whole tensor, which tell bases apart of which only later rows differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from rwkv_lab.checkpoint.open import Checkpoint
from rwkv_lab.checkpoint.provenance import records_of
from rwkv_lab.checkpoint.source import TensorInfo
from rwkv_lab.dtypes import to_dtype
from rwkv_lab.lazy_torch import no_grad, torch

ORIGIN = "rwkv_lab.origin"  # its name in a file's metadata
_ROUNDED_TO = ("float32", "float16", "bfloat16")
_VALUES, _PIECES = 512, 8  # of each tensor; as many pieces of it if they are spread
_SPREAD = "spread "  # before the name of a dtype

Weights = Mapping[str, str]  # dtype that values were rounded to -> hash


@dataclass(frozen=True)
class Origin:
    """Where a tuned file comes from."""

    base: str  # name of the base's file
    weights: Weights  # of the base, as of `weights_of`
    dtype: str  # that the base was held in while it was trained on
    quant: str  # how its matrices were stored: "none", "int8", "nf4", …
    training: str  # the same for every output of one training, however many steps it took

    def text(self) -> str:
        """As it stands in a file's metadata."""
        return json.dumps(asdict(self))


def origin_of(ck: Checkpoint) -> Origin | None:
    """What a file states; None of files by others, or where it cannot be understood."""
    try:
        found = json.loads(ck.metadata[ORIGIN])
        origin = Origin(**{name: found[name] for name in Origin.__dataclass_fields__})
    except (KeyError, ValueError, TypeError, RecursionError):
        return None
    texts = (origin.base, origin.dtype, origin.quant, origin.training)
    if not isinstance(origin.weights, dict) or not all(isinstance(text, str) for text in texts):
        return None
    return origin


@no_grad
def weights_of(ck: Checkpoint) -> dict[str, str]:
    """What a whole model is known again by. Read are some values of every tensor; states (`time_state`) are left out,
    since a model with one has the same weights."""
    found = hashes_of((name, t.shape, partial(_first_values, t)) for name, t in ck.info.items())
    if not _can_be_spread(ck):
        return found
    spread = hashes_of((name, t.shape, partial(_spread_values, t)) for name, t in ck.info.items())
    return found | {_SPREAD + name: one for name, one in spread.items()}


def blank_weights(ck: Checkpoint) -> Weights:
    """As long as `weights_of`, and nothing is read."""
    names = [*_ROUNDED_TO, *(_SPREAD + name for name in _ROUNDED_TO if _can_be_spread(ck))]
    return dict.fromkeys(names, "0" * 64)


def bases_of(ck: Checkpoint) -> list[Weights]:
    """The models that a model was made from by merging and converting, one after the other, as its record says."""
    bases = []
    for record in records_of(ck):
        listed = record.get("bases")
        bases += [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    return bases


def lineage(base: Checkpoint, weights: Weights) -> list[Weights]:
    """What an output's record lists as its bases: this one, as of `weights`, and those before; none of a state."""
    return [weights, *bases_of(base)] if base.kind != "state" else []


def hashes_of(tensors: Iterable[tuple[str, Sequence[int], Callable[[], torch.Tensor]]]) -> dict[str, str]:
    """A hash of (name, shape, what gives its values) of tensors in any order, for each dtype that values are rounded
    to. Dimensions of one and states (`time_state`) do not count."""
    heads, values = [], []
    for tensor, shape, values_of in sorted(tensors, key=lambda t: t[0]):
        if not tensor.endswith(".time_state"):
            heads.append(f"{tensor} {[size for size in shape if size != 1]};".encode())
            values.append(values_of().float())
    counts = [len(one) for one in values]
    flat = torch.cat([torch.empty(0, dtype=torch.float32, device="cpu"), *values])
    return {name: _hash_of(heads, counts, flat.to(to_dtype(name))) for name in _ROUNDED_TO}


def _hash_of(heads: Sequence[bytes], counts: Sequence[int], flat: torch.Tensor) -> str:
    """Of each head, and so many of the values behind it."""
    digest, at, data = hashlib.sha256(), 0, flat.view(torch.uint8).numpy().data
    for head, count in zip(heads, counts, strict=True):
        digest.update(head)
        digest.update(data[at : (at := at + count * flat.itemsize)])
    return digest.hexdigest()


def same_weights(a: Weights, b: Weights) -> bool:
    """Whether two models have the same values, up to a cast. Where only one has hashes of spread values, as files of
    earlier versions have none, the first values decide."""
    spread = [name for name in a if name.startswith(_SPREAD) and name in b]
    return any(a[name] == b.get(name) for name in spread or a)


def _can_be_spread(ck: Checkpoint) -> bool:
    """Whether every value can be read without the others."""
    return all(t.plain for name, t in ck.info.items() if not name.endswith(".time_state"))


def _first_values(info: TensorInfo) -> torch.Tensor:
    count = min(_VALUES, info.numel)
    if not count:
        return torch.empty(0, device="cpu")
    if not info.plain:
        return next(iter(info.blocks()))[:count].float()
    return _read(info, [0], count)


def _spread_values(info: TensorInfo) -> torch.Tensor:
    """Of pieces at equal distances, the first and the last value among them; all of a small tensor."""
    if info.numel <= _VALUES:
        return _first_values(info)
    size = _VALUES // _PIECES
    return _read(info, [i * (info.numel - size) // (_PIECES - 1) for i in range(_PIECES)], size)


def _read(info: TensorInfo, starts: Sequence[int], count: int) -> torch.Tensor:
    """So many values from each of these places on."""
    size = count * info.dtype.itemsize
    data = bytearray(len(starts) * size)
    for i, start in enumerate(starts):
        info.file.read_into(memoryview(data)[i * size : (i + 1) * size], info.offset + start * info.dtype.itemsize)
    return torch.frombuffer(data, dtype=info.dtype).float()
