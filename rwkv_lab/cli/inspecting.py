"""Says what files are, from their headers alone, without a notebook."""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rwkv_lab.errors import RwkvLabError
from rwkv_lab.progress import human_bytes
from rwkv_lab.text import counted

if TYPE_CHECKING:
    from rwkv_lab.checkpoint import Checkpoint


_OF_NO_USE = ("unknown", "unsupported", "unusable", "converted")  # kinds that no job takes


def show_files(paths: Sequence[str], every_tensor: bool) -> int:
    """Describe each file; the exit code: 1 where one is refused or is not recognised.

    Args:
        every_tensor: list all of them, with dtype and shape.
    """
    from rwkv_lab.checkpoint import open_checkpoint

    failed = False
    for path in paths:
        try:
            with open_checkpoint(path) as ck:
                print("\n".join(_described(ck)))
                if every_tensor:
                    print("\n".join(_tensors(ck)))
                failed |= ck.kind in _OF_NO_USE
        except RwkvLabError as e:
            print(f"{type(e).__name__}: {e}", file=sys.stderr)
            failed = True
    return 1 if failed else 0


def _described(ck: "Checkpoint") -> Iterator[str]:
    from rwkv_lab.checkpoint.packed import in_few_bits

    dtypes = Counter(t.dtype_name for t in ck.info.values())
    values = sum(t.numel for t in ck.info.values())
    yield str(ck.path)
    yield f"  kind     {ck.kind}{f': {ck.reason}' if ck.reason else ''}"
    if ck.layout:
        yield f"  model    {ck.layout}"
    yield f"  format   {ck.format}, {counted(len(ck.files), 'file')}, {human_bytes(ck.bytes)}"
    yield f"  tensors  {len(ck)}, {values:,} values: {', '.join(f'{n} {d}' for d, n in dtypes.most_common())}"
    if few := in_few_bits(ck.info.values()):
        yield f"  packed   {few}"
    misfit = ck.identity.misfit
    for what in ("missing", "wrong", "extra") if misfit else ():
        names = list(getattr(misfit, what))
        if names:
            yield f"  {what:<8} {len(names)}: {', '.join(map(str, names[:5]))}{' …' if len(names) > 5 else ''}"
    for line in ck.evidence[:3]:
        yield f"  evidence {line}"


def _tensors(ck: "Checkpoint") -> Iterator[str]:
    for name, t in ck.info.items():
        yield f"  {name}  {t.dtype_name}  {' × '.join(map(str, t.shape))}"
