"""What the cells of convert.ipynb call, in their order. Each shows its part, and notes it for result and report."""

import csv
import io
import math
from collections import Counter

from IPython.display import display

from rwkv_lab.analysis.conversion import ConversionAgreement, changes_of_values, compare_conversion, value_ranges
from rwkv_lab.checkpoint.foreign_format import general_name
from rwkv_lab.checks import NotApplicable
from rwkv_lab.convert import ConvertPlan, ConvertResult, plan_convert, write_convert
from rwkv_lab.convert.key_map import KeyMapRow, key_map
from rwkv_lab.convert.output_name import output_name
from rwkv_lab.convert.usage import usage
from rwkv_lab.dtypes import short_name
from rwkv_lab.machine import memory_free
from rwkv_lab.plotting import layer_map
from rwkv_lab.progress import human_bytes
from rwkv_lab.samples import Sample
from rwkv_lab.text import counted
from rwkv_lab.workbench.convert import figures
from rwkv_lab.workbench.estimate import OF_FILES, figure_seconds, file_seconds, in_words, running_seconds
from rwkv_lab.workbench.run import Run
from rwkv_lab.workbench.steps import Step, show_verdict
from rwkv_lab.workbench.tables import Table

_DRY = "dry_run=True: nothing was converted, so there is nothing to show here."
_COLUMNS = ("BlinkDL's name", "name in the output", "layers", "shape", "what is done", "dtype", "bytes")
_PASSES = 3  # copies of source and output in the time of writing and comparing them
_FIGURES = 3
_KEY_MAP = "key_map.csv"  # beside the report


def plan(run: Run) -> ConvertPlan:
    """Begin the run: show what the conversion will do, from headers alone.

    Raises:
        RwkvLabError: what `convert` refuses.
    """
    run.begin_again()
    with run.timed("plan"):
        made = preview(run)
    run.record.inputs = [made.source]
    run.record.notes += made.notes
    run.record.metrics |= {
        "kind": made.kind,
        "tensors": len(made.rows),
        "dropped": len(made.dropped),
        "source_bytes": made.source.bytes,
        "output_bytes": made.output_bytes,
        "disk_free": made.disk_free,
        "memory_needed": made.memory_needed,
        "memory_free": made.memory_free,
    }
    run.page.headline = f"Planned, nothing written: {_what(made)}."
    run.page.facts = _facts(made)
    run.page.tables = _plan_tables(made)
    run.page.attached = {_KEY_MAP: _as_csv(key_map(made, folded=False))}
    return made


def preview(run: Run) -> ConvertPlan:
    """Show what a conversion with these parameters would do, and note nothing.

    Raises:
        RwkvLabError: what `convert` refuses.
    """
    spec = run.config.spec()
    options = run.config.options().changed(overwrite=run.may_overwrite())
    made = plan_convert(spec, run.output_path(output_name(spec)), options)
    made.checkpoint.close()  # writing opens it again, and looks whether it has changed
    time = ("time", in_words(_seconds(made), OF_FILES))
    display(Table("The plan", ("", ""), [*_facts(made), time]), *_plan_tables(made))
    return made


def carry_out(run: Run, plan: ConvertPlan) -> ConvertResult | None:
    """Write as planned, open the output again and compare it with the source; None after `dry_run`.

    Raises:
        ParameterError: parameters or the source have changed since the plan was made.
        RwkvLabError: what `convert` refuses; no output is there then.
    """
    run.refuse_changed()
    if run.config.dry_run:
        print(_DRY)
        return None
    result = write_convert(plan)
    run.record.seconds |= result.seconds
    run.record.outputs = list(result.outputs)
    run.record.checks = list(result.checks)
    if not plan.options.verify:
        run.record.checks.append(NotApplicable("every tensor of the output is its source's", "verify=False"))
    found = result.notes[len(plan.notes) :]
    run.record.notes += found
    run.page.facts += [("found", note) for note in found]
    if result.pushed is not None:
        run.record.metrics["uploaded"] = {"repo_id": result.pushed.repo_id, "url": result.pushed.url}
    run.page.headline = f"{plan.out.name}, {human_bytes(plan.output_bytes)}: {_what(plan)}."
    run.page.summary = _summary(result, None)
    folder = plan.out.is_dir()
    files = sorted(plan.out.iterdir()) if folder else [plan.out]
    table = Table("Files written", ("file", "bytes"), [(path.name, path.stat().st_size) for path in files])
    run.page.tables.insert(0, table)
    display(table)
    return result


def show_values(run: Run, result: ConvertResult | None) -> None:
    """What a change of dtype did to values: how far they reach, what was rounded away, and in which tensors."""
    if result is None:
        print(_DRY)
        return
    cast = [r for r in result.rounding if r.rounded or r.overflow or r.flushed]
    if not cast and not any(row.quantised for row in result.plan.rows):
        print(_unrounded(result))
        run.page.facts.append(("values", _unrounded(result)))
        return
    with run.timed("values"):
        if cast:
            _show_ranges(run, result)
        _show_changes(run, result)


def compare_models(run: Run, result: ConvertResult | None) -> ConversionAgreement | None:
    """Logits of source and output on a fixed prompt, and text that both continue greedily; None where no model runs."""
    if result is None:
        print(_DRY)
        return None
    if result.plan.layout is None:
        why = f"A {result.plan.kind} does not run by itself: its tensors are compared, there are no logits."
        run.page.facts.append(("logits", why))
        print(why)
        return None
    with run.timed("models"):
        found = compare_conversion(result, run.config.prompt)
    run.page.summary = _summary(result, found)
    print(run.page.summary)
    if found.unread or found.continued is None:
        run.page.facts.append(("logits", found.unread))
        return found
    both = found.continued
    run.record.metrics["logits"] = {
        "relative_rms": found.relative,
        "by_position": found.by_position.tolist(),
        "largest_difference": found.largest,
        "same_likeliest": int(found.same_likeliest.sum()),
        "positions": len(found.expected),
        "divergence_bits": float(found.divergence.mean()),
    }
    run.record.metrics["greedy"] = {"same": both.same, "tokens": len(both.source)}
    table = _agreement_table(found)
    run.page.tables.insert(0, table)
    display(table)
    caption = "Left: every logit, on the line where both are equal. Right: the difference after each token read."
    figure = figures.logits_before_and_after(found, _what(result.plan))
    run.show_figure("logits", "Logits before and after", caption, figure)
    sample = Sample(both.prompt, {"source": both.source_text, "output": both.output_text})
    run.page.samples = [sample]
    display(Table(f"After the prompt {sample.prompt!r}", list(sample.texts), [list(sample.texts.values())]))
    return found


def show_use(run: Run, result: ConvertResult | None) -> None:
    """The programs that read the output, and the lines that load it."""
    if result is None:
        print(_DRY)
        return
    run.page.code = [(f"With {way.program}:", way.code) for way in usage(result.plan)]
    for title, code in run.page.code:
        print(title, code, sep="\n", end="\n\n")


def prove(run: Run, result: ConvertResult | None, agreement: ConversionAgreement | None) -> None:
    """Print a PASS or FAIL line for each check: of what was written, and of what both models say."""
    if result is None:
        print(_DRY)
        return
    run.record.checks += agreement.checks if agreement else []
    show_verdict(run)


def _show_ranges(run: Run, result: ConvertResult) -> None:
    found = value_ranges(result)
    rows = [
        (r.name, r.tensors, short_name(r.dtype), r.smallest, r.largest, r.values, r.rounded, r.overflow, r.flushed)
        for r in found
    ]
    columns = ("tensor", "tensors", "dtype", "smallest", "largest", "values", "rounded", "overflow", "flushed to zero")
    note = "smallest and largest are of the absolute values in the source; {i} stands for every layer."
    table = Table("Ranges and rounding", columns, rows, note)
    run.page.tables.append(table)
    run.record.metrics["rounding"] = {
        name: sum(getattr(r, name) for r in found) for name in ("values", "rounded", "overflow", "flushed")
    }
    display(table)
    caption = "A bar from the smallest to the largest absolute value; dashed: the limits of the new dtype."
    run.show_figure("ranges", "Ranges of the values that were cast", caption, figures.ranges(found, _what(result.plan)))


def _show_changes(run: Run, result: ConvertResult) -> None:
    moved, layout = changes_of_values(result), result.plan.layout
    if layout is None or not moved:
        return
    relative = {d.name: d.relative for d in moved}
    title = "How far is each tensor from its source? ‖output − source‖ / ‖source‖"
    beyond = {name for name, value in relative.items() if not value < float("inf")}
    unit = "relative Frobenius norm" + (", ∞ has values that overflowed" if beyond else "")
    marks = {"∞": beyond} if beyond else None
    figure = layer_map(relative, layout.n_layer, title, _what(result.plan), unit, marks)
    caption = "Of tensors that were rounded or quantised; others, in grey, are what they were."
    run.show_figure("change_of_values", title, caption, figure)
    run.record.metrics["largest_change"] = max((x for x in relative.values() if x == x), default=0.0)


def _agreement_table(found: ConversionAgreement) -> Table:
    both, positions = found.continued, len(found.expected)
    rows = [
        ("difference of the logits, relative RMS", found.relative),
        ("the same at the worst position", float(found.by_position.max())),
        ("largest difference of a logit", found.largest),
        ("positions with the same likeliest token", f"{int(found.same_likeliest.sum())} of {positions}"),
        ("divergence of the predictions, bits per token", float(found.divergence.mean())),
    ]
    if both is not None:
        rows.append(("greedy tokens that are the same, from the first on", f"{both.same} of {len(both.source)}"))
    note = f"{counted(positions, 'fixed token')} from all over the vocabulary; both models computed in float32."
    return Table("Source and output", ("measure", "found"), rows, note)


def _unrounded(result: ConvertResult) -> str:
    if not result.rounding:
        return "No tensor changed its dtype: no value was rounded."
    return f"{counted(len(result.rounding), 'tensor was', 'tensors were')} cast to a wider dtype: no value was rounded."


def _plan_tables(made: ConvertPlan) -> list[Table]:
    rows = [
        (
            row.ours or "–",
            row.theirs if row.theirs != row.ours else "the same",
            _layers(row.layers),
            _shapes(row),
            row.transform,
            row.dtype,
            row.nbytes,
        )
        for row in key_map(made)
    ]
    note = f"{{i}} stands for the layer. Tensor by tensor: {_KEY_MAP}, beside the report."
    tables = [Table("Key map", _COLUMNS, rows, note)]
    dropped: dict[tuple[str, str], list[int]] = {}
    for d in made.dropped:
        name, layer = general_name(d.name)
        dropped.setdefault((name, d.why), []).append(layer)
    if dropped:
        rows = [
            (name.replace("{i}", str(at[0])), "", why) if len(at) == 1 else (name, _layers(tuple(at)), why)
            for (name, why), at in dropped.items()
        ]
        tables.append(Table("What is dropped", ("BlinkDL's name", "layers", "why"), rows))
    return tables


def _layers(layers: tuple[int, ...]) -> str:
    """ "0–11", "0", "1, 3", or "" outside the layers."""
    if len(layers) > 1 and layers == tuple(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}–{layers[-1]}"
    return ", ".join(map(str, layers))


def _shapes(row: KeyMapRow) -> str:
    ours, theirs = (None if s is None else " × ".join(map(str, s)) or "one value" for s in (row.our_shape, row.shape))
    return str(theirs) if ours is None or ours == theirs else f"{ours} → {theirs}"


def _as_csv(rows: list[KeyMapRow]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("ours", "theirs", "our shape", "their shape", "what is done", "dtype", "bytes"))
    for row in rows:
        shapes = (" ".join(map(str, shape or ())) for shape in (row.our_shape, row.shape))
        writer.writerow((row.ours, row.theirs, *shapes, row.transform, row.dtype, row.nbytes))
    return text.getvalue()


def _facts(made: ConvertPlan) -> list[tuple[str, object]]:
    actions = Counter(row.action for row in made.rows)
    options = {name: value for name, value in made.spec.given().items() if name not in ("source", "to")}
    return [
        ("source", f"{made.source.path.name}, {human_bytes(made.source.bytes)}: {made.layout or made.kind}"),
        ("output", f"{made.out.name}, {human_bytes(made.output_bytes)}: {_target(made)}"),
        *([("settings", ", ".join(f"{name} {value}" for name, value in options.items()))] if options else []),
        ("tensors", f"{len(made.rows)}: {', '.join(f'{n} × {action}' for action, n in actions.most_common())}"),
        ("dropped", counted(len(made.dropped), "tensor") if made.dropped else "nothing"),
        ("disk", f"{human_bytes(made.output_bytes)}; {human_bytes(made.disk_free)} are free on that disk"),
        ("memory", f"{human_bytes(made.memory_needed)} at most; {human_bytes(made.memory_free)} are free"),
        *(("note", note) for note in made.notes),
    ]


def _seconds(made: ConvertPlan) -> float:
    """About the seconds of writing and comparing all tensors, and of running source and output; an upload's not."""
    files = file_seconds(_PASSES * (made.source.bytes + made.output_bytes)) + figure_seconds(_FIGURES)
    values = sum(math.prod(row.shape) for row in made.rows)
    if made.layout is None or 4 * values > memory_free():  # then no model is run
        return files
    return files + running_seconds(2, made.source.bytes, values, made.layout.n_layer, 64, 64)


def _target(made: ConvertPlan) -> str:
    """The target in words."""
    dtype = f", {made.spec.dtype}" if made.spec.dtype else ""
    if made.as_adapter and made.container.is_folder:
        names = f"names of {made.spec.to}" if made.format else "BlinkDL's names"
        return f"a folder of peft, {names}{dtype}"
    if made.kind == "state" or (made.format and made.layout is None):
        return f"a tuned state for {made.format.read_by if made.format else made.spec.to}{dtype}"
    return f"{made.format.described if made.format else f'{made.spec.to}, names of BlinkDL'}{dtype}"


def _what(made: ConvertPlan) -> str:
    """What is converted, in a line: for headlines and under figures."""
    return f"{made.source.path.name} as {_target(made)}"


def _summary(result: ConvertResult, found: ConversionAgreement | None) -> str:
    """The result in a sentence with the numbers that matter."""
    made = result.plan
    name = made.spec.to.upper() if made.spec.to == "gguf" else made.spec.to
    dtype = f" {made.spec.dtype}" if made.spec.dtype else ""
    begin = f"Converted to {name}{dtype}: {human_bytes(made.source.bytes)} -> {human_bytes(made.output_bytes)}"
    end = f" Uploaded to {result.pushed.repo_id}." if result.pushed else ""
    if found is not None and found.continued is not None:
        error, both = found.relative, found.continued
        logits = "logits are equal to the last bit" if error == 0 else f"logits differ by {error:.2g} of their RMS"
        if error >= 1e-4:
            logits = f"logits differ by {100 * error:.2g} % RMS"
        count = len(both.source)
        greedy = "same greedy tokens" if both.same == count else f"greedy tokens part after {both.same} of {count}"
        return f"{begin}; {logits}; {greedy}.{end}"
    if found is not None:
        return f"{begin}. {found.unread}{end}"
    compared = (
        f"{counted(len(made.rows), 'tensor')} compared with the source" if made.options.verify else "not compared"
    )
    return f"{begin}; {compared}.{end}"


STEPS = (
    Step(plan, "plan"),
    Step(carry_out, "result"),
    Step(show_values),
    Step(compare_models, "agreement"),
    Step(show_use),
    Step(prove),
)
MUST_PASS = True
