"""What held-out text costs with a tuning, without it, and with parts of it left out."""

import gc
import math
from collections.abc import Callable, Iterable

import torch
from IPython.display import display

from rwkv_lab.analysis.texts import excerpts, held_out_text
from rwkv_lab.analysis.tuning import TunedFile, open_tuned, part_of
from rwkv_lab.checks import Check, NotApplicable
from rwkv_lab.errors import ParameterError
from rwkv_lab.machine import memory_free
from rwkv_lab.model import RWKV_Dual, bits_per_byte
from rwkv_lab.names import split_block
from rwkv_lab.peft import load_adapter
from rwkv_lab.progress import human_bytes
from rwkv_lab.workbench.parameters import input_path
from rwkv_lab.workbench.peft import figures
from rwkv_lab.workbench.run import Run
from rwkv_lab.workbench.tables import Table

_EXCERPTS, _EXCERPT = 16, 512  # of the text held out, and bytes of each
_CTX_LEN = 256  # tokens of each window
_SAME = "the tuning answers here as it does loaded as it was trained: relative RMS difference of logits"
_ROUNDING = 1e-4  # float32: sums in another order, grown by some tens of layers
_LEVELS = 1e-2  # of a base in fewer bits: what lies in the middle of two levels may go to either
_COPIES = 2  # of a model in float32 at a time: the model, and the tensors of it that are being changed


@torch.no_grad()
def show_ablation(run: Run, names: list[str]) -> None:
    """Bits per byte with everything, with nothing, and without each layer's and each kind of matrix's tuning."""
    c = run.config
    with run.timed("leave out"), open_tuned(input_path(c.base), input_path(c.adapter), c.said(0)) as t:
        what = "which layers' tuning matters"
        if not room_for(run, t, what):
            return
        model = _checked_model(run, t)
        text = b"".join(excerpts(held_out_text(c.data), _EXCERPTS, _EXCERPT))
        try:
            full = _bits(model, text)
        except ParameterError as e:  # the vocabulary does not tell its tokenizer
            _not_measured(run, what, str(e))
            return
        without: list[dict[str, float]] = []
        for grouped in (_by_layer(names), _by_part(names)):
            found = {}
            for label, group in grouped.items():
                _put(model, group, t.before)
                found[label] = _bits(model, text)
                _put(model, group, t.after)
            without.append(found)
        again = _bits(model, text)
        _put(model, t.names(), t.before)
        base = _bits(model, text)
    check = Check("bits per byte with all parts put back, less those at first", again - full, 0, again == full)
    run.record.checks.append(check)
    run.record.metrics["bits_per_byte"] = {"with": full, "without": base, "layers": without[0], "parts": without[1]}
    subtitle = (
        f"{run.page.facts[1][1]}\n{full:.3f} bits per byte with it, {base:.3f} without, "
        f"of {len(text):,} bytes here and there of what is held out of {c.data!r}"
    )
    costs = [{label: bits - full for label, bits in found.items()} for found in without]
    figure = figures.costs_of_leaving_out(costs, base - full, subtitle)
    title = "Which layers' tuning matters?"
    caption = "Tensors are set back to the base's, the others stay tuned. Losses need not add up: layers work together."
    run.show_figure("leaving_out", title, caption, figure)
    rows = [("nothing", full, 0.0)] + [(n, b, b - full) for found in without for n, b in found.items()]
    columns = ("left out", "bits per byte", "more than with all of it")
    table = Table("Held-out text without parts of the tuning", columns, [*rows, ("all of it", base, base - full)])
    run.page.tables.append(table)
    display(table)


def tuned_model(t: TunedFile) -> RWKV_Dual:
    """The base with everything that the file changes worked into it, in float32."""
    model = RWKV_Dual.from_pretrained(t.base.path).requires_grad_(False)
    if any(name.endswith(".time_state") for name in t.names()):
        model.add_time_state()
    _put(model, [n for n in t.base.info if t.is_stored(n)], t.before)
    _put(model, t.names(), t.after)
    return model


def room_for(run: Run, t: TunedFile, what: str) -> bool:
    """Whether the model can run here; if not, say what is not measured, and why."""
    needed, free = 4 * _COPIES * sum(info.numel for info in t.base.info.values()), memory_free()
    if needed > free:
        _not_measured(run, what, f"the model needs {human_bytes(needed)} of memory, {human_bytes(free)} are free")
    return needed <= free


def _not_measured(run: Run, what: str, why: str) -> None:
    check = NotApplicable(what, why)
    run.record.checks.append(check)
    print(check)


@torch.no_grad()
def _put(model: RWKV_Dual, names: Iterable[str], values: Callable[[str], torch.Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name in names:
        if name in parameters:  # what nothing reads, such as RWKV-7's v0 of layer 0, has no place in a model
            parameters[name].copy_(values(name).view_as(parameters[name]))


def _bits(model: RWKV_Dual, text: bytes) -> float:
    return bits_per_byte(model, text, _CTX_LEN)


def _checked_model(run: Run, t: TunedFile) -> RWKV_Dual:
    """The tuned model; its logits are laid beside those of the model as its trainer has it."""
    if t.method == "overlay" and t.ck.kind != "model":
        run.record.checks.append(NotApplicable(_SAME, "a part of a model does not run by itself"))
        return tuned_model(t)
    tokens = torch.arange(1, 65)[None] * 7919 % t.layout.vocab_size  # any will do, if both read the same
    trained = _as_trained(t).parallel(tokens)[0].double()
    gc.collect()  # the next model may need the room
    model = tuned_model(t)
    apart = model.parallel(tokens)[0].double() - trained
    relative = float(apart.square().mean().sqrt() / trained.square().mean().sqrt())
    limit = _ROUNDING if t.quant == "none" else _LEVELS
    run.record.checks.append(Check(_SAME, float(f"{relative:.1g}"), limit, relative <= limit))
    return model


def _as_trained(t: TunedFile) -> RWKV_Dual:
    model = RWKV_Dual.from_pretrained(t.ck.path if t.method == "overlay" else t.base.path)
    if t.method == "state":
        model.load_state_file(t.ck.path)
    elif t.adapter:
        load_adapter(model, t.adapter, t.quant)
    return model.requires_grad_(False)


def _by_layer(names: Iterable[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in sorted(names, key=_layer):
        layer = _layer(name)
        groups.setdefault("outside the layers" if layer == math.inf else f"layer {layer}", []).append(name)
    return groups


def _by_part(names: Iterable[str]) -> dict[str, list[str]]:
    """Nothing where there is one kind only: leaving it out leaves out everything."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(part_of(name), []).append(name)
    return groups if len(groups) > 1 else {}


def _layer(name: str) -> float:
    inside = split_block(name)
    return inside[0] if inside else math.inf
