"""What the cells of modes.ipynb call, in their order. Each shows its part, and notes it for result and report."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from IPython.display import display

from rwkv_lab.analysis.agreement import (
    Execution,
    ModeRow,
    agreement_checks,
    check_hand_off,
    check_memory,
    compare_modes,
    growth_checks,
    in_dtype,
)
from rwkv_lab.analysis.dynamics import measure_dynamics
from rwkv_lab.analysis.mismatch import explain_failures, first_mismatch
from rwkv_lab.analysis.texts import tokens_to_read
from rwkv_lab.checkpoint import FileFacts, Layout, file_facts, open_checkpoint
from rwkv_lab.checkpoint.packed import parts_of
from rwkv_lab.checkpoint.whole_model import whole_model
from rwkv_lab.checks import Check
from rwkv_lab.dtypes import long_name, to_dtype
from rwkv_lab.errors import LayoutError
from rwkv_lab.model import RWKV_Dual
from rwkv_lab.text import counted
from rwkv_lab.wkv import backends as all_backends
from rwkv_lab.workbench.estimate import (
    figure_seconds,
    forward_seconds,
    in_words,
    loading_seconds,
    memory_in_words,
    stepping_seconds,
)
from rwkv_lab.workbench.modes import figures
from rwkv_lab.workbench.parameters import input_path
from rwkv_lab.workbench.run import Run
from rwkv_lab.workbench.steps import Step, show_verdict
from rwkv_lab.workbench.tables import Table

_FIGURES = 5


@dataclass(frozen=True)
class Subject:
    """What is looked at: a model in float64, and the tokens that it reads in every mode."""

    name: str  # of the file
    model: RWKV_Dual
    tokens: torch.Tensor  # [B,T]
    source: str  # where the tokens come from, in words


def preview(run: Run) -> None:
    """Show what would be compared, and about how long it takes, and note nothing.

    Raises:
        RwkvLabError: as `load`.
    """
    display(Table("The plan", ("", ""), _planned(run)[2]))


def _planned(run: Run) -> tuple[list[FileFacts], Layout, list[tuple[str, object]]]:
    """(the inputs, the layout of the model, the plan in words), from headers."""
    config = run.config
    with open_checkpoint(input_path(config.model)) as ck:
        layout = whole_model(ck)
        inputs, needed = [file_facts(ck)], check_memory(ck)
        values = sum(t.numel for t in ck.info.values())
    if config.compare_with:
        with open_checkpoint(input_path(config.compare_with)) as other:
            inputs.append(file_facts(other))
            if str(other.layout) != str(layout):
                both = f"{inputs[0].path.name}: {layout}\n{other.path.name}: {other.layout}"
                raise LayoutError(f"These models cannot be compared:\n{both}")
    backends = {name: config.backends or all_backends(to_dtype(name)) for name in config.dtypes}
    runs = 2 * sum(map(len, backends.values()))
    size = (config.length, config.batch, values, layout.n_layer)
    seconds = sum(_seconds_of(size, to_dtype(dtype), names) for dtype, names in backends.items())
    # Half of the text and all of it, token by token, for the states that are handed over.
    seconds += 1.5 * stepping_seconds(*size, to_dtype(config.dtypes[0]), backends[config.dtypes[0]][-1])
    seconds += sum(loading_seconds(one.bytes) for one in inputs) + figure_seconds(_FIGURES)
    return (
        inputs,
        layout,
        [
            ("model", f"{inputs[0].path.name}: {layout}"),
            ("tokens", f"{counted(config.batch, 'sequence')} of {config.length}"),
            ("runs", f"{runs}: in parallel and token by token, {', '.join(config.dtypes)}, each beside float64"),
            ("backends", ", ".join(dict.fromkeys(name for names in backends.values() for name in names))),
            ("memory", memory_in_words(needed)),
            ("time", in_words(seconds)),
        ],
    )


def _seconds_of(size: tuple[int, int, int, int], dtype: torch.dtype, backends: Sequence[str]) -> float:
    """About the seconds of all runs in a dtype, and of the one in float64 that they are compared with.

    Args:
        size: tokens, sequences, values of the model and its layers.
    """
    runs = sum(forward_seconds(*size, dtype, name) + stepping_seconds(*size, dtype, name) for name in backends)
    return runs + forward_seconds(*size, torch.float64, "reference")


def load(run: Run) -> Subject:
    """Say what the model is, what it will read and about how long that takes, and load it.

    Raises:
        RwkvLabError: the file cannot be opened, or is no whole model.
        DeviceError: there is too little memory.
        LayoutError: the model to compare with has another layout.
    """
    run.begin_again()
    config = run.config
    with run.timed("load"):
        run.record.inputs, layout, plan = _planned(run)
        name = run.record.inputs[0].path.name
        display(Table("The plan", ("", ""), plan))
        model = _dense(input_path(config.model))
        tokens, source = tokens_to_read(model, config.batch, config.length)
    version = model.layout.version
    run.record.metrics |= {"layout": str(layout), "version": version, "tokens": source}
    run.page.headline = f"{name}, an RWKV-{version}, in every mode, backend and dtype."
    run.page.facts = [
        ("model", f"{name}: {layout}"),
        ("tokens", f"{counted(config.batch, 'sequence')} of {config.length}: {source}"),
        *(fact for fact in plan if fact[0] not in ("model", "tokens", "time")),
    ]
    for path in filter(None, (config.model, config.compare_with)):
        _note_packed(run, input_path(path))
    print(f"tokens: {source}")
    return Subject(name, model, tokens, source)


def _dense(path: Path) -> RWKV_Dual:
    """A model in float64. Packed weights are taken with the values that they stand for: long texts would be multiplied
    in 8 bits else, whose rounding hides whether modes agree."""
    return RWKV_Dual.from_pretrained(path, dtype=torch.float64, weights="dense").requires_grad_(False)


def _note_packed(run: Run, path: Path) -> None:
    with open_checkpoint(path) as ck:
        packed = any(parts_of(info) for info in ck.info.values())
    if packed:
        run.record.notes.append(
            f"{path.name} has weights in 8 or 4 bits. The modes are compared with the same values in floating point; "
            "how a text of 16 tokens or more is read in integers is not part of that."
        )


def compare(run: Run, subject: Subject) -> list[ModeRow]:
    """Run every mode, backend and dtype; a table, a heat map, and two checks for each."""
    with run.timed("compare"):
        rows = compare_modes(
            subject.model,
            subject.tokens,
            dtypes=[to_dtype(name) for name in run.config.dtypes],
            backends=run.config.backends or None,
        )
    run.record.metrics["rows"] = [_as_metrics(row) for row in rows]
    run.record.checks += agreement_checks(rows)
    run.page.summary = _summary(rows)
    errors = ("logits", "state", "limit", "logits apart", "state apart", "limit apart")
    table = Table(
        "Mode × backend × dtype",
        ("mode", "backend", "dtype", *errors, "verdict"),
        [_as_cells(row) for row in rows],
        "Relative RMS errors: beside float64 with the same rounded weights, and (apart) beside the first mode "
        "on the same backend in the same dtype. Of the state the worst part counts.",
    )
    run.page.tables.append(table)
    display(table)
    figure = figures.agreement_matrix(rows, _subtitle(run, subject))
    caption = "The larger error of logits and final state. A run passes where it keeps both limits, left and right."
    if len(rows) < len({(row.mode, row.backend) for row in rows}) * len({row.dtype for row in rows}):
        caption += " Grey: the backend does not compute in that dtype."
    run.show_figure("agreement", "Agreement of modes, backends and dtypes", caption, figure)
    return rows


def show_growth(run: Run, subject: Subject, rows: Sequence[ModeRow]) -> None:
    """The error at every position, and a check that it does not grow without bound."""
    run.record.checks += growth_checks(rows)
    figure = figures.error_growth(rows, _subtitle(run, subject))
    caption = "Running means over a thirty-second of the text. A run whose error is exactly 0 has no line."
    run.show_figure("growth", "Error along the text", caption, figure)


def hand_off(run: Run, subject: Subject) -> None:
    """Read a beginning in parallel, go on token by token: is it the same as one pass over all?"""
    dtype = run.config.dtypes[0]
    with run.timed("hand-off"):
        checks = check_hand_off(in_dtype(subject.model, to_dtype(dtype)), subject.tokens)
    run.record.checks += checks
    for check in checks:
        print(check)


def locate_mismatches(run: Run, subject: Subject, rows: Sequence[ModeRow]) -> list[str]:
    """For every mode and backend that failed, where its mismatch starts: layer, operator, token."""
    with run.timed("bisect"):
        failures = explain_failures(subject.model, subject.tokens, rows)
    found = [(failure.row.name, failure.beside, failure.where) for failure in failures]
    run.record.metrics["mismatches"] = [f"{name} beside {beside}: {where}" for name, beside, where in found]
    if found:
        table = Table("Where the mismatch starts", ("run", "beside", "in words"), found)
        run.page.tables.insert(0, table)
        run.page.headline += f" {found[0][0]} is wrong: {found[0][2].splitlines()[0]}"
        display(table)
    else:
        print("Every run that could be made agrees: there is no mismatch to look for.")
    return [where for _, _, where in found]


def compare_files(run: Run, subject: Subject) -> None:
    """Where a second checkpoint of the same layout parts from the model, in words; both in float64, in one mode."""
    if not run.config.compare_with:
        print("compare_with is empty: there is no second model to compare with.")
        return
    path = input_path(run.config.compare_with)
    with run.timed("compare files"):
        other = _dense(path)
        found = first_mismatch(Execution(subject.model), Execution(other), subject.tokens)
    words = f"{path.name} beside {subject.name}: {found or 'both compute the same.'}"
    run.record.metrics["compared"] = words
    run.page.facts.append(("compared with", words))
    run.record.checks.append(
        Check("where the two models part", found.name if found else "nowhere", "nowhere", found is None)
    )
    print(words)


def explore(run: Run, subject: Subject) -> None:
    """How long channels remember, how large states get along the text, and what one layer's state looks like."""
    text = subject.tokens[:1]
    subtitle = _subtitle(run, replace(subject, tokens=text))
    with run.timed("explore"):
        found = measure_dynamics(subject.model, text)
    caption = (
        "After its half-life, half of what a channel holds is left (RWKV-7 may take it out earlier). Colour: which "
        "share of the layer's channels, and of tokens where decays depend on them, lies there."
    )
    run.show_figure("decays", "How long channels remember", caption, figures.half_lives(found.log_decays, subtitle))
    of_means = found.layer is None
    what = "RMS of the remembered mean a/b" if of_means else "RMS of the state's entries"
    figure = figures.state_sizes(found.positions, found.sizes, what, subtitle)
    run.show_figure("states", "State sizes along the text", "Read in pieces; the state is kept between them.", figure)
    if of_means:
        title, axes = "What is in the state? The remembered mean a/b, after the last token", ("layer", "channel", "")
    else:
        title = f"What is in the state? Every head of layer {found.layer}, after the last token"
        axes = "value index", "key index", "head"
    figure = figures.state_images(found.images, title, subtitle, *axes)
    caption = "One scale for all; the colours end at the 99.5th percentile of the absolute values."
    run.show_figure("heads", "Images of the state", caption, figure)


def _subtitle(run: Run, subject: Subject) -> str:
    B, T = subject.tokens.shape
    return f"{run.page.facts[0][1]}\n{counted(B, 'sequence')} of {counted(T, 'token')}, {subject.source}"


def _summary(rows: Sequence[ModeRow]) -> str:
    """How many runs agree, and by how much the worst is off."""
    ran = [row for row in rows if not row.problem]
    if not ran:
        return "No run could be compared."
    passed = sum(row.verdict == "PASS" for row in ran)
    worst = max(ran, key=lambda row: max(row.logits_error, row.state_error) / row.accuracy)
    error = max(worst.logits_error, worst.state_error)
    return (
        f"{passed} of {len(ran)} runs agree; nearest to its limit is {worst.name}: relative RMS error {error:.2g}, "
        f"limit {worst.accuracy:g}."
    )


def _as_cells(row: ModeRow) -> tuple:
    numbers = (row.logits_error, row.state_error, row.accuracy, row.logits_apart, row.state_apart, row.limit)
    return (row.mode.value, row.backend, long_name(row.dtype), *(_short(x) for x in numbers), row.verdict)


def _short(x: float) -> str:
    return "0" if x == 0 else "–" if math.isnan(x) else f"{x:.1e}"


def _as_metrics(row: ModeRow) -> dict[str, object]:
    names = ("logits_error", "state_error", "accuracy", "logits_apart", "state_apart", "limit", "verdict")
    where: dict[str, object] = {"mode": row.mode.value, "backend": row.backend, "dtype": long_name(row.dtype)}
    return where | {name: getattr(row, name) for name in names} | {"growth": row.growth if len(row.curve) else None}


STEPS = (
    Step(load, "subject"),
    Step(compare, "rows"),
    Step(show_growth),
    Step(hand_off),
    Step(locate_mismatches, "places"),
    Step(compare_files),
    Step(explore),
    Step(show_verdict),
)
MUST_PASS = True
