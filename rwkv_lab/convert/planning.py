"""Plans a conversion: every tensor of the output with its source, from headers alone."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from importlib.resources import files
from pathlib import Path

from rwkv_lab.arguments import checked
from rwkv_lab.checkpoint import Checkpoint, FileFacts, Layout, TensorInfo, file_facts, open_checkpoint, tensors_of
from rwkv_lab.checkpoint.dimensions import Shape
from rwkv_lab.checkpoint.foreign_format import (
    FORMAT_NOTE,
    GROUP_NORM_EPS,
    HALVED,
    RESCALED,
    ForeignFormat,
    Place,
    PlacedRow,
    general_name,
    placed_rows,
)
from rwkv_lab.checkpoint.gguf_types import BY_NAME
from rwkv_lab.checkpoint.numerics import round_to
from rwkv_lab.checkpoint.output_checks import check_free_space, check_output
from rwkv_lab.checkpoint.packed import refuse_packed
from rwkv_lab.checkpoint.source import BLOCK
from rwkv_lab.checkpoint.stream import WORKERS, OutTensor
from rwkv_lab.checkpoint.unchanged import file_states
from rwkv_lab.convert.about_source import about_source, refuse_odd_weights
from rwkv_lab.convert.adapters import about_copy, adapter_output, is_adapter
from rwkv_lab.convert.containers import CONTAINERS, Content
from rwkv_lab.convert.hub_download import Download, source_of
from rwkv_lab.convert.hub_push import plan_push
from rwkv_lab.convert.left_beside import own_template
from rwkv_lab.convert.made_from import made_from
from rwkv_lab.convert.option_checks import completed, without_effect
from rwkv_lab.convert.output import Output, Tensors, copied
from rwkv_lab.convert.output_checks import check_convert_output
from rwkv_lab.convert.plan import ConvertPlan, ConvertRow, Dropped
from rwkv_lab.convert.spec import ConvertOptions, ConvertSpec
from rwkv_lab.convert.states import about_state, is_state_output, refuse_states_of_some_layers, state_output
from rwkv_lab.convert.targets import PLAIN, STATE, format_for
from rwkv_lab.convert.tokenizer_files import END_IDS, generation_config, model_tokenizer, tokenizer_files
from rwkv_lab.errors import LayoutError
from rwkv_lab.lazy_torch import torch
from rwkv_lab.paths import to_path
from rwkv_lab.peft.rwkv_peft_layout import NOTE
from rwkv_lab.text import counted
from rwkv_lab.tokenizer import Tokenizer

_STREAMED = ("copy", "cast", "quantised")  # actions that take a tensor block by block


@checked
def plan_convert(spec: ConvertSpec, out: str | Path, options: ConvertOptions | None = None) -> ConvertPlan:
    """Work out what a conversion with this spec will do. Read are headers and, for the fingerprint, the first 4 KiB of
    tensors that carry no checksum. The source stays open in the plan.

    Args:
        out: path of the output: a folder for Hugging Face's formats, a file for the others.
        options: how it will be written; what they forbid is refused here.
    Raises:
        ParameterError, LayoutError, OutputError, CorruptFileError, UnsafeFileError: what cannot be converted, or not
            to there.
    """
    options = options or ConvertOptions.read({})
    path = to_path(out, "out").absolute()
    if spec.repo_id:  # before a download of gigabytes
        check_output(path, [], options.allowed_dir, options.overwrite)
    push_notes = plan_push(options)
    with ExitStack() as stack, source_of(spec, headers=options.dry_run) as (source, downloaded):
        ck = stack.enter_context(open_checkpoint(source))
        plan = _plan(ck, spec, path, options, downloaded, push_notes)
        stack.pop_all()
    return plan


def _plan(
    ck: Checkpoint,
    spec: ConvertSpec,
    out: Path,
    options: ConvertOptions,
    downloaded: Download | None,
    push_notes: Sequence[str],
) -> ConvertPlan:
    output = _output(ck, spec, out)
    check_convert_output(out, output.container, ck, options)
    _refuse_collisions(output.content)
    source, tensors = _facts(ck, downloaded), [tensor for _, tensor in output.content]
    notes = made_from(output, ck, source, downloaded) | dict(output.file_notes)
    content = Content(tensors, notes, output.others, output.spec.max_shard_size, output.layout, output.tokenizer)
    if output.container.holds_vocabulary:
        content = replace(content, chat_template=own_template(ck))
    size, memory = output.container.size(content), _memory_needed(ck, output.content)
    disk_free, memory_free = check_free_space(out, size, memory, "the conversion")
    return ConvertPlan(
        spec=output.spec,
        options=options,
        out=out,
        layout=output.layout,
        kind=ck.kind,
        as_adapter=output.as_adapter,
        format=output.format,
        container=output.container,
        source=source,
        rows=tuple(row for row, _ in output.content),
        dropped=tuple(output.dropped),
        output_bytes=size,
        disk_free=disk_free,
        memory_needed=memory,
        memory_free=memory_free,
        notes=(
            *(downloaded.notes if downloaded else ()),
            *output.notes,
            *output.container.notes(content),
            *without_effect(output, ck),
            *about_source(ck, output),
            *push_notes,
        ),
        checkpoint=ck,
        states=file_states(ck),
        content=content,
    )


def check_source(ck: Checkpoint, spec: ConvertSpec) -> None:
    """Refuse a source that the target does not take, from its header and without torch; `plan_convert` refuses more.

    Raises:
        ParameterError, LayoutError: says why.
    """
    refuse_unreadable(ck)
    refuse_packed(ck.path, ck.info.values(), "A conversion")
    if ck.kind == "model" and ck.layout is not None and spec.to != STATE:
        completed(spec, format_for(spec.to, ck.layout), ck.layout)


def _facts(ck: Checkpoint, downloaded: Download | None) -> FileFacts:
    """Of the source; the fingerprint is not known yet where that takes tensors that have not been downloaded."""
    facts = file_facts(ck)
    unknown = downloaded is not None and downloaded.left and any(t.crc32 is None for t in ck.stored.values())
    return replace(facts, fingerprint="records:" + "?" * 64) if unknown else facts


def _output(ck: Checkpoint, spec: ConvertSpec, out: Path) -> Output:
    """What goes into the output, by what the source is."""
    if is_state_output(ck, spec, out):
        output = state_output(ck, spec)
        completed(spec, None, ck.layout)
        return output
    as_it_is = spec.to in PLAIN and out.suffix and ck.adapter_config is None and ck.foreign_format is None
    if is_adapter(ck) and (not as_it_is or spec.alpha):
        output = adapter_output(ck, spec, out)
        completed(spec, None, None)
        return output
    layout = _layout_of(ck, spec)
    known = format_for(spec.to, layout) if layout else None
    if known is not None and layout is not None:
        refuse_states_of_some_layers(ck, known, layout)
    spec = completed(spec, known, layout)
    container = CONTAINERS[spec.to if known is None else known.container]
    refuse_odd_weights(ck)
    if known is None or layout is None:
        if layout and spec.tokenizer:  # reports continue text with it
            model_tokenizer(spec.tokenizer, layout.vocab_size)
        kept = {NOTE: ck.metadata[NOTE]} if NOTE in ck.metadata else {}  # of an adapter
        notes = about_copy(ck) if is_adapter(ck) else about_state(ck, spec.to)
        return Output(spec, container, _plain(ck, spec.output_dtype), layout=layout, notes=notes, file_notes=kept)
    content, dropped = _by_table(ck, spec, known, layout)
    notes, others = [*known.notes(layout), *_about_quantised(spec, content, known)], {}
    tokenizer, why_none = model_tokenizer(spec.tokenizer, layout.vocab_size)
    if container.is_folder:
        others = _others(ck, known, layout, spec, [tensor for _, tensor in content], tokenizer)
        notes += [f"No tokenizer is written: pass tokenizer=…. {why_none}"] if tokenizer is None else []
    named = {FORMAT_NOTE: known.name} if container.name == "safetensors" else {}
    return Output(spec, container, content, known, layout, dropped, notes, others, tokenizer, file_notes=named)


def _about_quantised(spec: ConvertSpec, content: Tensors, known: ForeignFormat) -> list[str]:
    """How much is quantised, and matrices that were to be and are not, in words."""
    if not spec.quantised:
        return []
    made = [row for row, _ in content if row.quantised]
    values = sum(math.prod(row.shape) for row in made)
    matrices = counted(len(made), "matrix", "matrices")
    said = f"Quantised to {spec.quantised}: {matrices}, {values:,} values; the other tensors are cast."
    names = {row.name for row, _ in content if general_name(row.name)[0] in known.quantised and not row.quantised}
    if not names:
        return [said]
    return [
        said,
        f"{counted(len(names), 'matrix keeps', 'matrices keep')} float16: their rows are no multiple of "
        f"{BY_NAME[spec.quantised].elements} values "
        f"({', '.join(sorted(names)[:3])}).",
    ]


def _layout_of(ck: Checkpoint, spec: ConvertSpec) -> Layout | None:
    """Of a whole model; None of what only `PLAIN` targets take.

    Raises:
        LayoutError: neither.
    """
    refuse_unreadable(ck)
    if ck.kind == "model":
        return ck.layout
    if "it is shard" in ck.reason:
        raise LayoutError(f"{ck.path} cannot be converted: {ck.reason}.")
    if spec.to not in PLAIN:
        raise LayoutError(
            f"to={spec.to!r} takes whole models; {ck.path} is of kind {ck.kind!r}: {ck.reason}.\n"
            f"It can be written as {' or '.join(PLAIN)}."
        )
    return None


def refuse_unreadable(ck: Checkpoint) -> None:
    """Refuse what no target takes.

    Raises:
        LayoutError: says what it is.
    """
    if ck.kind in ("converted", "unsupported", "unknown", "unusable"):
        raise LayoutError(f"{ck.path} cannot be converted: {ck.reason}.")


def _plain(ck: Checkpoint, dtype: torch.dtype | None) -> Tensors:
    """Every tensor under BlinkDL's name."""
    content = []
    for name, info in ck.info.items():
        wanted = dtype if dtype and info.dtype.is_floating_point else info.dtype
        content.append(copied(name, (name,), info, info.shape, wanted))
    return content


def _by_table(ck: Checkpoint, spec: ConvertSpec, known: ForeignFormat, layout: Layout) -> tuple[Tensors, list[Dropped]]:
    """Every tensor under the format's name, and those that it has no place for.

    Raises:
        LayoutError: a tensor that the table does not have.
    """
    required, optional = tensors_of(layout, ck.info)
    shapes, dropped = required | optional, [Dropped(n, why) for n in ck.info if (why := known.why_dropped(n))]
    left = {name: info for name, info in ck.info.items() if not known.why_dropped(name)}
    content = []
    for placed in placed_rows(known, left, layout.n_layer):
        at = Place(placed.layer, layout.head_size, spec.rescale)
        infos = [left.pop(name) for name in placed.ours]
        made = _transformed(placed, infos, [shapes[name] for name in placed.ours], at, spec.output_dtype, known)
        content.append(_quantised(*made, spec.quantised) if placed.row.theirs in known.quantised else made)
    if left:
        raise LayoutError(
            f"{len(left)} tensors of {ck.path} have no place in {known.described}: {', '.join(list(left)[:5])}.\n"
            "Remove them, or write safetensors or pth."
        )
    return content + [_zeros(name, shape, known, spec) for name, shape in known.unread(layout).items()], dropped


def _zeros(name: str, shape: Shape, known: ForeignFormat, spec: ConvertSpec) -> tuple[ConvertRow, OutTensor]:
    """A tensor that the format's readers ask for and make no use of."""
    dtype = known.dtype_of(name, shape, spec.output_dtype or torch.float32)
    tensor = OutTensor(name, shape, dtype, compute=lambda: [torch.zeros(shape, dtype=dtype, device="cpu").flatten()])
    return ConvertRow(name, (), "zeros: asked for, not used", shape, dtype, tensor.nbytes), tensor


def _quantised(row: ConvertRow, tensor: OutTensor, kind: str) -> tuple[ConvertRow, OutTensor]:
    """The same in blocks of a type, where it is asked for and rows are whole blocks."""
    from rwkv_lab.convert.quantised import fits, quantised  # bring torch and kernels, which few plans need

    if not kind or not fits(tensor.shape, kind):
        return row, tensor
    made = quantised(tensor, kind)
    action = "quantised" if row.action in _STREAMED else f"{row.action}; quantised"
    return replace(row, action=action, dtype=made.dtype, nbytes=made.nbytes, quantised=kind), made


def _transformed(
    placed: PlacedRow,
    infos: list[TensorInfo],
    shapes: list[Shape],
    at: Place,
    dtype: torch.dtype | None,
    known: ForeignFormat,
) -> tuple[ConvertRow, OutTensor]:
    """A tensor of the format from one or several of ours, in BlinkDL's shapes whatever the source's are."""
    forward = placed.row.transform.forward
    ours = [torch.empty(shape, dtype=info.dtype, device="meta") for shape, info in zip(shapes, infos, strict=True)]
    theirs = forward(ours, at)
    shape = tuple(theirs.shape)
    wanted = known.dtype_of(placed.theirs, shape, dtype or theirs.dtype)
    if (theirs is ours[0] or theirs._base is ours[0]) and theirs.is_contiguous() and theirs.numel() == ours[0].numel():
        return copied(placed.theirs, placed.ours, infos[0], shape, wanted)

    action = placed.row.transform.described
    row = ConvertRow(placed.theirs, placed.ours, action, shape, wanted, math.prod(shape) * wanted.itemsize)
    if placed.row.transform is HALVED:
        halved = partial(_halved, infos[0], at, wanted)
        return row, OutTensor(placed.theirs, shape, wanted, compute=halved, gathered=infos[0].gathered)

    def compute() -> Iterator[torch.Tensor]:
        values = [info.read().reshape(shape) for info, shape in zip(infos, shapes, strict=True)]
        yield forward(values, at).contiguous().flatten()

    held = 2 * sum(info.nbytes for info in infos) + max(info.gathered for info in infos)
    return row, OutTensor(placed.theirs, shape, wanted, compute=compute, gathered=held)


def _halved(info: TensorInfo, at: Place, wanted: torch.dtype) -> Iterator[torch.Tensor]:
    """The values of a tensor that is halved so often, in float64: what the output's dtype cannot hold of them is found
    when they are rounded to it. Those that would be infinite when they are read again are not halved, and found too."""
    for piece in info.blocks():
        exact = piece.double()
        yield torch.where(round_to(exact, wanted).isinf(), exact, HALVED.forward([exact], at))


def _refuse_collisions(content: Tensors) -> None:
    owner: dict[str, tuple[str, ...]] = {}
    for row, _ in content:
        if row.name in owner:
            raise LayoutError(f"{', '.join(owner[row.name])} and {', '.join(row.sources)} would both be {row.name}.")
        owner[row.name] = row.sources


def _others(
    ck: Checkpoint,
    known: ForeignFormat,
    layout: Layout,
    spec: ConvertSpec,
    tensors: Sequence[OutTensor],
    tokenizer: Tokenizer | None,
) -> dict[str, bytes]:
    """The files of a folder beside those of tensors."""
    written = files("rwkv_lab.convert") / "written"
    others = generation_config(tokenizer) | {name: (written / name).read_bytes() for name in known.code}
    others |= tokenizer_files(tokenizer, spec.tokenizer, own_template(ck))
    if known.config is not None:
        bytes_of = Counter[torch.dtype]()
        for t in tensors:
            bytes_of[t.dtype] += t.nbytes
        config = known.config(layout, bytes_of.most_common(1)[0][0]) | known.details(list(ck.info))
        if tokenizer is not None and tokenizer.end_of_text is not None:
            config |= {name: tokenizer.end_of_text for name in END_IDS if name in config}
        if GROUP_NORM_EPS in config and ck.group_norm_eps is not None:
            config[GROUP_NORM_EPS] = ck.group_norm_eps
        if spec.rescale:
            config |= {RESCALED: spec.rescale, "rescale_every": spec.rescale}
        others["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    return others


def _memory_needed(ck: Checkpoint, content: Tensors) -> int:
    """Upper bound of the anonymous memory: each thread's blocks, and the one tensor that is transformed whole."""
    gathered = max((t.gathered for t in [*ck.info.values(), *(t for _, t in content)]), default=0)
    return memory_of_blocks() + gathered


def memory_of_blocks() -> int:
    """Bytes of anonymous memory of a conversion that transforms no tensor whole, at most."""
    return WORKERS * 46 * BLOCK
