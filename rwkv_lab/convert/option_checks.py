"""Options of a conversion beside its source and target: what does not go together is refused, and what changes nothing
is named."""

from collections.abc import Iterator

from rwkv_lab.checkpoint import Checkpoint, Layout
from rwkv_lab.checkpoint.foreign_format import ForeignFormat
from rwkv_lab.checkpoint.gguf_types import require_gguf
from rwkv_lab.convert.output import Output
from rwkv_lab.convert.spec import SIZES, ConvertSpec, with_dtype
from rwkv_lab.errors import ParameterError


def completed(spec: ConvertSpec, known: ForeignFormat | None, layout: Layout | None) -> ConvertSpec:
    """The spec with what the target decides filled in.

    Raises:
        ParameterError: options that do not go with the target or the weights.
    """
    if spec.size and layout and (layout.n_layer, layout.n_embd) not in SIZES[spec.size]:
        wanted = " or ".join(f"{n} layers of {c} channels" for n, c in SIZES[spec.size])
        raise ParameterError(
            f"size={spec.size!r}: such a model has {wanted}; the weights have {layout.n_layer} layers of "
            f"{layout.n_embd} channels."
        )
    if spec.generation and layout and spec.generation != layout.version:
        raise ParameterError(f"generation={spec.generation!r}: the weights are RWKV-{layout.version}; leave it out.")
    if spec.rescale and (known is None or not known.rescales):
        raise ParameterError(f"rescale={spec.rescale}: to={spec.to!r} has no place for rescaled weights.")
    if spec.quantised:
        if known is None or not known.quantised:
            raise ParameterError(f"dtype={spec.dtype!r}: to={spec.to!r} has no quantised tensors; bf16, fp16 or fp32.")
        if spec.rescale:
            raise ParameterError(
                f"rescale={spec.rescale} keeps activations in float16 from overflowing; beside {spec.dtype} weights "
                "llama.cpp has them in float32.\nLeave out rescale, or choose a dtype of floats."
            )
        require_gguf(f"dtype={spec.dtype!r}")
    return spec if known is None else with_dtype(spec, known)


def without_effect(output: Output, ck: Checkpoint) -> Iterator[str]:
    """Options that were given and change nothing in this output, in words."""
    spec, container = output.spec, output.container.name
    what = {"adapter": "a folder of an adapter"}.get(container, f"the one file of to={spec.to!r}")
    if spec.tokenizer and (output.layout is None or container not in ("folder", "gguf")):
        yield f"tokenizer={spec.tokenizer!r} changes nothing in the output: {what} holds no tokenizer."
    if spec.max_shard_size != ConvertSpec.model_fields["max_shard_size"].default and container != "folder":
        yield f"max_shard_size={spec.max_shard_size} has no effect: {what} is not sharded."
    of_model = ck.layout is not None and not output.as_adapter
    if spec.alpha is not None and not output.as_adapter:
        yield f"alpha={spec.alpha:g} has no effect: it is of a LoRA, and the source is of kind {ck.kind!r}."
    if spec.generation and not of_model and not (output.as_adapter and output.format):
        why = "under BlinkDL's names none is needed" if output.as_adapter else f"of kind {ck.kind!r}, none is needed"
        yield f"generation={spec.generation!r} has no effect: {why}."
    if spec.size and not of_model:
        yield f"size={spec.size!r} has no effect: it is of whole models, and the source is of kind {ck.kind!r}."
