"""What the cells of merge.ipynb call, in their order. Each shows its part, and notes it for result and report."""

import math
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from IPython.display import display

from rwkv_lab.analysis.behaviour import Behaviour, compare_behaviour
from rwkv_lab.analysis.deltas import deltas
from rwkv_lab.analysis.texts import Reading
from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.machine import memory_free
from rwkv_lab.merge import (
    MERGE_METHODS,
    MergePlan,
    MergeResult,
    open_inputs,
    plan_merge,
    verify_merge,
    write_merge,
)
from rwkv_lab.merge.adapter_set import ANY, read_adapters
from rwkv_lab.merge.effect import MergeEffect, in_percent
from rwkv_lab.merge.families import family_of
from rwkv_lab.merge.inputs import open_tuned
from rwkv_lab.plotting import bits_bars
from rwkv_lab.progress import human_bytes
from rwkv_lab.text import counted
from rwkv_lab.workbench.estimate import OF_FILES, figure_seconds, file_seconds, in_words, running_seconds
from rwkv_lab.workbench.merge import figures
from rwkv_lab.workbench.run import Run
from rwkv_lab.workbench.steps import Step, show_verdict
from rwkv_lab.workbench.tables import Table

_DRY = "dry_run=True: nothing was merged, so there is nothing to show here."
_PASSES = 8  # copies of inputs and output in the time of writing and proving a merged state; others take twice that
_WRITTEN = 400  # tokens, about, that each model writes
_FIGURES = 4
_ROLES = {"base": "base", "tuned": "tuned", "init": "PiSSA's start"}


def plan(run: Run) -> MergePlan:
    """Begin the run: show what the merge will do, from headers alone.

    Raises:
        RwkvLabError: what `merge` refuses.
    """
    run.begin_again()
    with run.timed("plan"):
        made = preview(run)
    run.record.inputs = list(made.inputs)
    run.record.notes += made.notes
    run.record.metrics |= {
        "method": made.method,
        "tensors": len(made.rows),
        "tensors_changed": len(made.changed),
        "output_bytes": made.output_bytes,
        "disk_free": made.disk_free,
        "memory_needed": made.memory_needed,
        "memory_free": made.memory_free,
    }
    run.page.headline = f"Planned, nothing written: {_what(made)}."
    run.page.facts = _facts(made)
    run.page.tables = [plan_table(made)]
    return made


def preview(run: Run) -> MergePlan:
    """Show what a merge with these parameters would do, and note nothing.

    Raises:
        RwkvLabError: what `merge` refuses.
    """
    spec = run.config.spec()
    options = run.config.options().changed(overwrite=run.may_overwrite())
    with open_inputs(spec) as inputs:
        made = plan_merge(inputs, spec, run.output_path("merged.pth"), options)
    reading = run.config.reading(run.config.data)
    reading.check(made.layout.vocab_size)  # what is not there is refused now
    time = ("time", in_words(_seconds(made, reading), OF_FILES))
    display(Table("The plan", ("", ""), [*_facts(made), time]), plan_table(made))
    return made


def carry_out(run: Run, plan: MergePlan) -> MergeResult | None:
    """Merge as planned; None after `dry_run`.

    Raises:
        ParameterError: parameters or inputs that have changed since the plan was made.
        RwkvLabError: what `merge` refuses; no output is there then.
    """
    run.refuse_changed()
    if run.config.dry_run:
        print(_DRY)
        return None
    result = write_merge(plan)
    run.record.seconds |= {"merge": result.seconds["merge"]}
    run.record.inputs, run.record.outputs = list(result.inputs), list(result.outputs)
    effect, found = result.effect, [*result.seen, *result.effect.notes()]
    run.record.notes += found
    run.record.metrics |= {
        "targets": len(effect.tensors),
        "targets_changed": len(effect.tensors) - len(effect.unchanged),
    } | _change(effect)
    run.page.facts += [("effect", note) for note in found] or [("effect", _effect(result))]
    print(*found or [_effect(result)], sep="\n")
    run.page.headline = f"{result.out.name}, {human_bytes(result.outputs[0].bytes)}: {_what(plan)}."
    rows = [(str(f.path), f.bytes, f.fingerprint) for f in result.outputs]
    display(Table("Written", ("file", "bytes", "fingerprint"), rows))
    return result


def show_what_moved(run: Run, result: MergeResult | None) -> None:
    """Heat map and histogram of merged - base, over the tensors that the plan changes."""
    if result is None:
        print(_DRY)
        return
    names = [row.name for row in result.plan.changed]
    if not names:
        print("No tensor changed.")
        return
    with run.timed("figures"):
        with open_checkpoint(result.base) as base, open_checkpoint(result.out) as merged:
            moved = deltas(base, merged, names)
        copies = {d.name: d.rms * d.numel**0.5 for d in moved}
        run.record.metrics |= _change(result.effect.with_copies(copies))
        rest = len(result.plan.rows) - len(names)
        subtitle = f"{_what(result.plan)}" + (
            f"; {counted(rest, 'other tensor is', 'other tensors are')} those of the base" if rest else ""
        )
        figure = figures.moved_per_layer(moved, result.plan.layout.n_layer, subtitle)
        caption = "Each cell is one tensor, on a logarithmic scale; grey did not change."
        if any(d.new for d in moved) and not all(d.new for d in moved):
            caption += " + marks tensors that the base does not have."
        run.show_figure("what_moved", "What moved, by layer and matrix", caption, figure)
        figure = figures.delta_histogram(moved, subtitle)
        caption = "Weights by the absolute value of their change; the axis is logarithmic, the bins double in width."
        run.show_figure("deltas", "Histogram of the changes", caption, figure)
    if result.effect.tensors:
        figure = figures.arrived(result.effect, result.plan.layout.n_layer, subtitle)
        caption = "Of tensors that are copied all of the change arrives; of unchanged ones nothing."
        run.show_figure("effect", "How much of the asked-for change arrived", caption, figure)
    rows = [(d.name, "new" if d.new else d.relative, d.rms, d.largest) for d in moved]
    note = "relative: ‖merged − base‖ / ‖base‖; rms and largest are of the entries of merged − base."
    run.page.tables.append(Table("How far each tensor moved", ("tensor", "relative", "rms", "largest"), rows, note))


def compare_models(run: Run, result: MergeResult | None) -> Behaviour | None:
    """Run base and merged model on text that neither was trained on, and let them write; None after `dry_run`."""
    if result is None:
        print(_DRY)
        return None
    with run.timed("models"):
        behaviour = compare_behaviour(result, run.config.reading(run.config.data))
    run.page.samples = behaviour.samples
    if behaviour.bits:
        run.record.metrics["bits_per_byte"] = behaviour.bits
        run.page.summary = behaviour.summary
        print(behaviour.summary)
        run.record.metrics["measured"] = {n: asdict(m) for n, m in behaviour.measured.items()}
        run.page.facts.append(("held-out text", behaviour.described))
        figure = bits_bars(behaviour.bits, f"{_what(result.plan)}\n{behaviour.described}")
        caption = "Bits the model needs for each byte of text that it was not trained on; lower is better."
        run.show_figure("bits_per_byte", "Bits per byte of held-out text", caption, figure)
    for sample in behaviour.samples:
        display(Table(f"After the prompt {sample.prompt!r}", list(sample.texts), [list(sample.texts.values())]))
    if behaviour.unread:
        run.page.facts.append(("held-out text", behaviour.unread))
        run.page.summary = f"{run.page.summary} {behaviour.unread}".strip()
        print(behaviour.unread)
    return behaviour


def prove(run: Run, result: MergeResult | None, behaviour: Behaviour | None) -> None:
    """Re-open what was written, recompute it independently, and print a PASS or FAIL line for each check."""
    if result is None or behaviour is None:
        print(_DRY)
        return
    with run.timed("proof"):
        run.record.checks = [*result.checks, *verify_merge(result), *behaviour.checks]
    show_verdict(run)


def plan_table(made: MergePlan) -> Table:
    """One row per tensor of the output, those that change first."""
    changed = set(made.changed)
    rows = [
        (r.name, r.action, r.source, " × ".join(map(str, r.shape)), str(r.dtype).removeprefix("torch."), r.nbytes)
        for r in sorted(made.rows, key=lambda r: r not in changed)
    ]
    kept = f"Kept out by include and exclude: {', '.join(made.skipped[:10])}" if made.skipped else ""
    if len(made.skipped) > 10:
        kept += f" and {len(made.skipped) - 10} more"
    return Table("Plan, tensor by tensor", ("tensor", "action", "source", "shape", "dtype", "bytes"), rows, kept)


def _facts(made: MergePlan) -> list[tuple[str, object]]:
    recipe = made.spec.recipe()
    actions = Counter(r.action for r in made.rows)
    options = {k: v for k, v in recipe.items() if v is not None and k not in ("method", "parameters")}
    options |= recipe["parameters"]
    return [
        *((_ROLES[f.role], f"{f.path.name}, {human_bytes(f.bytes)}") for f in made.inputs),
        ("output", made.out.name),
        ("model", str(made.layout)),
        ("method", f"{made.method}: {_help(made)}"),
        *_adapters(made),
        ("settings", ", ".join(f"{name} {value}" for name, value in options.items())),
        ("tensors", ", ".join(f"{count} × {action}" for action, count in actions.most_common())),
        ("size", f"{made.output_bytes:,} bytes; {human_bytes(made.disk_free)} are free on that disk"),
        ("memory", f"{human_bytes(made.memory_needed)} at most; {human_bytes(made.memory_free)} are free"),
        *(("note", note) for note in made.notes),
    ]


def _seconds(made: MergePlan, reading: Reading) -> float:
    """About the seconds of merging, looking at what was written, and running base, result and what was merged."""
    goes_into = bool(family_of(made.method).kinds)  # else models are mixed
    moved = sum(f.bytes for f in made.inputs) + made.output_bytes
    files = file_seconds((_PASSES if made.method in ("state", "overlay") else 2 * _PASSES) * moved)
    values = sum(math.prod(row.shape) for row in made.rows)
    if 4 * values > memory_free():  # then no model is run
        return files + figure_seconds(_FIGURES)
    models, read = 3 if goes_into else 2 + len(made.spec.tuned), reading.tokens(made.layout.vocab_size)
    running = running_seconds(models, made.output_bytes, values, made.layout.n_layer, read, _WRITTEN)
    return files + figure_seconds(_FIGURES) + running


def _effect(result: MergeResult) -> str:
    """What the merge did, in a sentence."""
    effect, count = result.effect, len(result.effect.tensors)
    if not count:
        return "No value was to change."
    share = f"; {in_percent(effect.share)} of the asked-for change arrived" if effect.wanted else ""
    return f"{count - len(effect.unchanged)} of {counted(count, 'target')} changed{share}."


def _change(effect: MergeEffect) -> dict[str, float]:
    """The norms of the change, for `result.json`."""
    return {"change_asked_for": effect.wanted, "change_that_arrived": effect.reached}


def _what(made: MergePlan) -> str:
    """What is merged, in a line: for headlines and under figures."""
    alpha, base = made.spec.alpha, made.spec.base.name
    share = "" if alpha is None else f", alpha {_setting(alpha)}"
    names = [path.name for path in made.spec.tuned]
    tuned = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
    method = MERGE_METHODS[made.method]
    if family_of(made.method).kinds:  # the method is read off what goes into the base
        return f"{tuned} merged into {base}, method {method.name}{share}"
    with_them = f" and {tuned}" if tuned else ""
    return f"{base}{with_them}, method {method.name} ({_help(made)}){share}"


def _setting(value: Any) -> str:
    """A number, or one for each file, in words; those that differ by tensor are too many."""
    if isinstance(value, list):
        return ", ".join(map(_setting, value))
    return "by tensor" if isinstance(value, dict) else "of the file" if value is None else f"{value:g}"


def _help(made: MergePlan) -> str:
    """What the method does, without the marks of Markdown."""
    return MERGE_METHODS[made.method].help.replace("`", "")


def _adapters(made: MergePlan) -> list[tuple[str, str]]:
    """Rank, alpha and scale of the adapters that are merged, in words; from headers."""
    if family_of(made.method) is not family_of(ANY):
        return []
    found = []
    with ExitStack() as stack:
        tuned, init = open_tuned(made.spec, stack)
        for ck, adapter in zip(tuned, read_adapters(tuned, init, made.spec).adapters, strict=True):
            is_rs = made.spec.parameters.get("use_rslora") or (ck.adapter_config or {}).get("use_rslora")
            rows = {(t.rank, t.settings().get("scaling")) for t in adapter.targets.values()}
            words = [_scaled(rank, scale, bool(is_rs)) for rank, scale in sorted(rows, key=str)]
            matrices = f"{len(adapter.targets)} matri{'x' if len(adapter.targets) == 1 else 'ces'}"
            found.append(("adapter", f"{ck.path.name}: {'; '.join(words) or 'no matrices'}, on {matrices}"))
    return found


def _scaled(rank: int, scale: object, is_rs: bool) -> str:
    if not isinstance(scale, int | float):
        return f"rank {rank}"
    alpha = scale * (rank**0.5 if is_rs else rank)
    return f"rank {rank}, alpha {alpha:g}, scale {scale:g} (alpha / {'√rank' if is_rs else 'rank'})"


STEPS = (
    Step(plan, "plan"),
    Step(carry_out, "result"),
    Step(show_what_moved),
    Step(compare_models, "behaviour"),
    Step(prove),
)
MUST_PASS = True
