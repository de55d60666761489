"""What a plan says of its source, in words: what stays behind, and how it differs from a model."""

from collections.abc import Iterator, Mapping

from rwkv_lab.checkpoint import Checkpoint
from rwkv_lab.checkpoint.packed import refuse_packed
from rwkv_lab.convert.left_beside import about_files_beside
from rwkv_lab.convert.output import Output
from rwkv_lab.convert.tokenizer_files import END_IDS
from rwkv_lab.errors import LayoutError
from rwkv_lab.text import counted

_VOCABULARY = "tokenizer.json"  # of a folder: what `tokenizer` takes
_NO_WHOLE_MODEL = ("partial", "unmerged")


def refuse_odd_weights(ck: Checkpoint) -> None:
    """Refuse weights of a whole model, and tuned states, that are no floats.

    Raises:
        LayoutError: names the first, or says how the model is packed.
    """
    refuse_packed(ck.path, ck.info.values(), "A conversion")
    if ck.kind not in ("model", "state"):
        return
    misfit = ck.identity.misfit
    weights = (t for name, t in ck.info.items() if misfit is None or name not in misfit.extra)
    odd = next((t for t in weights if not t.dtype.is_floating_point or t.dtype.itemsize < 2), None)
    if odd is not None:
        raise LayoutError(f"{odd.name} in {ck.path} is {odd.dtype}; weights must be floats of 16 bits or more.")


def about_source(ck: Checkpoint, output: Output) -> list[str]:
    """What the source holds and a conversion does not take along, and how it differs from a model."""
    notes = [*ck.notes, *_not_read(ck.ignored), *_other_end(ck, output)]
    if ck.others:
        notes.append(
            f"{counted(len(ck.others), 'entry that is no tensor stays', 'entries that are no tensors stay')} behind: "
            f"{', '.join(map(str, ck.others))[:80]}."
        )
    notes += [
        f"{counted(n, 'tensor of the source is', 'tensors of the source are')} {kind}, dequantised to float32."
        for kind, n in ck.quantised.items()
    ]
    eps = ck.group_norm_eps
    if eps is not None and abs(eps - 64e-5) > 1e-9:
        notes.append(f"The source states group_norm_eps={eps:.3g}, not 0.00064; only its config.json records that.")
    if ck.kind in _NO_WHOLE_MODEL:
        notes.append(f"The source is no whole model, and is written as it is: {ck.reason}.")
    extra = ck.identity.misfit.extra if ck.kind == "model" and ck.identity.misfit else ()
    if extra and output.format is None:
        notes.append(
            f"{counted(len(extra), 'tensor')} that no RWKV-{ck.layout.version if ck.layout else ''} has are "
            "written as they are, "
            f"first {extra[0]}: RWKV_Dual does not load such a model."
        )
    notes += about_files_beside(ck, output)
    vocabulary = ck.path / _VOCABULARY
    if output.layout and output.container.holds_vocabulary and not output.spec.tokenizer and vocabulary.is_file():
        notes.append(f"{_VOCABULARY} of the source stays behind. To take it along: tokenizer={str(vocabulary)!r}.")
    return notes


def _not_read(ignored: Mapping[str, str]) -> Iterator[str]:
    """A sentence for each reason."""
    for why in dict.fromkeys(ignored.values()):
        first, *others = (name for name, reason in ignored.items() if reason == why)
        more = f" and {len(others)} more of its tensors are" if others else " is"
        yield f"{first} of the source{more} not read: {why}."


def _other_end(ck: Checkpoint, output: Output) -> Iterator[str]:
    """What the source states of the tokens that begin, end and pad a text, where the output states something else."""
    if output.layout is None or not output.container.holds_vocabulary:
        return
    end = output.tokenizer.end_of_text if output.tokenizer is not None else None
    for name in END_IDS:
        stated = ck.config.get(name, ck.metadata.get(f"tokenizer.ggml.{name}"))
        if stated is not None and str(stated) != str(end or 0):
            yield f"The source states {name} {stated}; in the output it is {end or 0}."
