"""The name of an output where none is given."""

from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.checkpoint.foreign_format import FOREIGN_FORMATS
from rwkv_lab.convert.adapters import is_adapter
from rwkv_lab.convert.containers import CONTAINERS
from rwkv_lab.convert.hub_download import source_of
from rwkv_lab.convert.spec import ConvertSpec
from rwkv_lab.convert.targets import PLAIN


def output_name(spec: ConvertSpec, stem: str = "converted") -> str:
    """The stem with what outputs of this source and target end in; nothing where that is a folder.

    Raises:
        CorruptFileError, UnsafeFileError, LayoutError: the source cannot be opened.
        RwkvLabError: as `download`, where it is on the Hub.
    """
    if spec.to in PLAIN:
        return stem + CONTAINERS[spec.to].suffixes[0]
    with source_of(spec, headers=True) as (path, _), open_checkpoint(path) as ck:
        if is_adapter(ck):
            return stem  # a folder of peft
        if ck.kind == "state":
            return f"{stem}.safetensors"
    container = next(f.container for f in FOREIGN_FORMATS.values() if f.target == spec.to)
    return stem + "".join(CONTAINERS[container].suffixes[:1])
