"""What `convert` can be asked for: the two containers of BlinkDL's own names, and every foreign format."""

from rwkv_lab.checkpoint import Layout
from rwkv_lab.checkpoint.foreign_format import FOREIGN_FORMATS, ForeignFormat
from rwkv_lab.errors import LayoutError

PLAIN = ("safetensors", "pth")  # BlinkDL's names, every generation
STATE = "state"  # the tuned state of a model alone, as RWKV-PEFT saves it and RWKV-Runner loads it
# What `to_huggingface` writes: the layout of the repositories that people publish such models in.
HUGGING_FACE = {
    "4.0": "transformers",
    "5.0": "transformers",
    "5.1": "transformers",
    "5.2": "world",
    "6.0": "world",
    "7.0": "fla",
}


def target_names() -> list[str]:
    """The names that `convert(to=…)` takes."""
    return list(dict.fromkeys([*(f.target for f in FOREIGN_FORMATS.values()), *PLAIN, STATE]))


def format_for(target: str, layout: Layout) -> ForeignFormat | None:
    """The foreign format of a target for such a model; None for BlinkDL's own names.

    Raises:
        LayoutError: the target does not have this generation, or its readers cannot take these dimensions.
    """
    if target in PLAIN:
        return None
    formats = [f for f in FOREIGN_FORMATS.values() if f.target == target]
    found = next((f for f in formats if layout.version in f.versions), None)
    if found is None:
        versions = sorted({version for f in formats for version in f.versions})
        others = [t for t in target_names() if t in PLAIN or _takes(t, layout.version)]
        raise LayoutError(
            f"to={target!r} takes RWKV-{', '.join(versions)}; this is RWKV-{layout.version}.\n"
            f"It can be written as {', '.join(others)}."
        )
    why = found.refused(layout)
    if why:
        raise LayoutError(f"to={target!r} ({found.described}) cannot hold this model: {why}.")
    return found


def _takes(target: str, version: str) -> bool:
    return any(f.target == target and version in f.versions for f in FOREIGN_FORMATS.values())


def hugging_face_target(layout: Layout) -> str:
    """The target of `to_huggingface` for this generation.

    Raises:
        LayoutError: there is none.
    """
    target = HUGGING_FACE.get(layout.version)
    if target is None or not _takes(target, layout.version):
        raise LayoutError(
            f"There is no Hugging Face layout of RWKV-{layout.version} here; convert it to safetensors or pth."
        )
    return target
