"""What the cells of export.ipynb call, in their order. Each shows its part, and notes it for result and report."""

from dataclasses import replace
from pathlib import Path

import torch
from IPython.display import display

from rwkv_lab.checkpoint import file_facts, open_checkpoint
from rwkv_lab.checks import Check, NotApplicable
from rwkv_lab.errors import ParameterError, RwkvLabError
from rwkv_lab.export import OnnxModel, run_levels
from rwkv_lab.export.configuration import ExportConfiguration
from rwkv_lab.export.monitoring_logger import timeline
from rwkv_lab.export.planning import ExportPlan, graphs_are_kept, plan_export
from rwkv_lab.progress import human_bytes
from rwkv_lab.samples import Sample
from rwkv_lab.workbench.estimate import OF_FILES, figure_seconds, file_seconds, in_words, stepping_seconds
from rwkv_lab.workbench.export import figures
from rwkv_lab.workbench.export.details import STORAGE, results_table, storage_as_csv, tables_of_exports
from rwkv_lab.workbench.export.exported import Exported, facts_of, one_after_the_other, read_exported
from rwkv_lab.workbench.parameters import train_demo
from rwkv_lab.workbench.run import Run
from rwkv_lab.workbench.steps import Step, show_verdict
from rwkv_lab.workbench.tables import Table

_DRY = "dry_run=True: nothing was exported, so there is nothing to show here."
_NO_ONNX = "No ONNX model was written, so there is nothing to show here."
_NEW_TOKENS = 48
# What the time of an export was, with RWKV-7 of 3.6 and 61 million parameters on 2 cores of an Intel Xeon:
_TRACE = 8.0  # seconds of tracing the graphs
_START = 2.0  # seconds of each process that writes graphs until it does
_PASSES = 12  # copies of the model in float32 in the time of writing a level; docs/scaling.md
_COMPARED = 6000  # tokens, one after the other, in the time of comparing a level with the model
_FIGURES = 6
_TOKENS = [1, 2, 3, 4]  # a prompt where there is no tokenizer


def plan(run: Run) -> ExportPlan:
    """Begin the run: show what will be read, merged and written, and what it takes.

    Raises:
        RwkvLabError: what an export refuses.
    """
    run.begin_again()
    with run.timed("plan"):
        made = preview(run)
        run.record.inputs = [file_facts(path) for path in (made.base, made.checkpoint.path) if path and path.exists()]
    run.record.notes += made.notes
    run.record.metrics |= {
        "family": made.family,
        "kind": made.checkpoint.kind,
        "levels": [one.quantization_level for one in made.configurations],
        "configuration": _configuration(made.configurations[0]),
        "source_bytes": made.source_bytes,
        "disk_needed": made.disk_needed,
        "disk_free": made.disk_free,
        "memory_needed": made.memory_needed,
        "memory_free": made.memory_free,
    }
    run.page.headline = f"Planned, nothing written: {_what(made)}."
    run.page.facts = _facts(made)
    run.page.tables = [_outputs_table(made), _configuration_table(made)]
    return made


def preview(run: Run) -> ExportPlan:
    """Show what exports with these parameters would do, and note nothing.

    Raises:
        RwkvLabError: what an export refuses.
    """
    train_demo(run.config)
    made = plan_export(run.config.configurations())
    facts = [*_facts(made), ("time", _time(made))]
    display(Table("The plan", ("", ""), facts), _outputs_table(made), _configuration_table(made))
    return made


def carry_out(run: Run, plan: ExportPlan) -> list[Exported]:
    """Merge once, write every level in every format, and compare each with the model; empty after `dry_run`.

    Raises:
        ParameterError: parameters have changed since the plan was made.
        RwkvLabError: what an export refuses; the levels that were finished before stay.
    """
    run.refuse_changed()
    if run.config.dry_run:
        print(_DRY)
        return []
    found: list[Exported] = []
    for result in run_levels(plan.configurations):
        one = read_exported(result)
        found.append(one)
        run.record.outputs += facts_of(one)
        run.record.notes += [note for note in result.warnings if note not in run.record.notes]
        run.record.seconds |= {f"{one.level}: {stage}": taken for stage, taken in result.seconds.items()}
        run.page.summary = _summary(found)
    run.record.checks = _checks(found)
    run.record.metrics["exports"] = {one.level: _metrics(one) for one in found}
    run.page.headline = f"{_what(plan)}."
    run.page.facts += [("note", note) for note in run.record.notes if note not in plan.notes]
    tables = [results_table(found), *tables_of_exports(found)]
    run.page.tables = tables + run.page.tables
    run.page.attached = {STORAGE: storage_as_csv(found)}
    display(*tables)
    print(run.page.summary)
    return found


def show_sizes(run: Run, results: list[Exported]) -> None:
    """How large every output is, beside the model that it was made from; and after a scan, what which part costs."""
    if not results:
        print(_DRY)
        return
    caption = "Bytes on disk: the whole model in its own dtype, and what was written from it."
    run.show_figure("sizes", "Sizes", caption, figures.sizes(results, run.page.headline))
    for one in results:
        if one.result.sensitivity is not None:
            read = f"{one.result.sensitivity.tokens:,} tokens of {one.result.calibration['data']}"
            caption = (
                f"Each part alone in few bits, on {read}. Right: all of them, from the fewest bits on with more for "
                "one part at a time, and the choice that was written."
            )
            figure = figures.sensitivity(one.result.sensitivity, run.page.headline)
            run.show_figure(f"sensitivity-{one.level}", f"What suffers most, {one.label}", caption, figure)


def show_agreement(run: Run, results: list[Exported]) -> None:
    """How far predictions, logits and state are from the model's, and whether errors grow with the length."""
    if not results:
        print(_DRY)
        return
    compared = [one for one in results if one.measured]
    if not compared:
        print("Nothing was compared with the model, so there is nothing to show here.")
        return
    title = "Agreement with the model"
    caption = (
        "Left: mean Kullback-Leibler divergence on text, with its limit as a line. "
        "Middle: positions whose likeliest token is another. Right: largest errors after so many tokens."
    )
    run.show_figure("agreement", title, caption, figures.agreement(compared, run.page.headline))
    if any(one.measured.get("drift") for one in compared):
        caption = "Largest error of each part of the state after so many tokens of text, relative to its scale."
        run.show_figure("drift", "Drift of the state", caption, figures.drift(compared, run.page.headline))


def show_cost(run: Run, results: list[Exported]) -> None:
    """The speed of what was exported, and what exporting it took."""
    if not results:
        print(_DRY)
        return
    if any(one.result.inference_speed_ms for one in results):
        caption = "One token after the other, medians of one run on this machine."
        run.show_figure("speed", "Speed", caption, figures.speed(results, run.page.headline))
    seen = one_after_the_other(results)
    if seen.samples:
        caption = "Anonymous memory of this process and those it started; bytes in the folder that is written."
        run.show_figure("monitoring", "Memory and disk over time", caption, timeline(seen, run.page.headline))


def continue_prompt(run: Run, results: list[Exported]) -> None:
    """Text that every ONNX model writes after the same prompt, by onnxruntime."""
    if not results:
        print(_DRY)
        return
    folders = {one.label: one.onnx for one in results if one.onnx}
    if not folders:
        print(_NO_ONNX)
        return
    with run.timed("samples"):
        texts = {label: _continued(OnnxModel(folder), run.config.prompt) for label, folder in folders.items()}
    run.page.samples = [Sample(run.config.prompt, texts)]
    display(Table(f"After the prompt {run.config.prompt!r}", list(texts), [list(texts.values())]))


def show_use(run: Run, results: list[Exported]) -> None:
    """The lines that run each output."""
    if not results:
        print(_DRY)
        return
    for one in results:
        where = Path(one.result.onnx_model_path or one.result.pytorch_model_path or "").absolute()
        folder = where.parents[1] if one.onnx else where.parents[2]  # output_directory
        if one.onnx:
            run.page.code.append(
                (f"{one.label}, by onnxruntime, in {folder.name}/:", _lines(one.onnx.relative_to(folder), one.has_text))
            )
            print(f"{one.label}, by onnxruntime:", _lines(one.onnx, one.has_text), sep="\n", end="\n\n")
        if one.pytorch:
            run.page.code.append((f"{one.label}, for PyTorch, in {folder.name}/:", _pytorch(one.pytorch, folder)))
            print(f"{one.label}, for PyTorch:", _pytorch(one.pytorch, Path("/")), sep="\n", end="\n\n")


def prove(run: Run, results: list[Exported]) -> None:
    """Print a PASS or FAIL line for each check: of the merge, and of every output against the model."""
    if not results:
        print(_DRY)
        return
    show_verdict(run)


# ------------------------------------------------------------------ tables and sentences


def _facts(made: ExportPlan) -> list[tuple[str, object]]:
    first = made.configurations[0]
    size = "" if made.source_bytes is None else f", {human_bytes(made.source_bytes)} of tensors"
    whole = f"{made.described}{size}"
    merged = "" if made.base is None else f"{made.checkpoint.name} into {made.base.name}, once for all levels"
    return [
        ("checkpoint", f"{made.checkpoint.name}, {human_bytes(made.checkpoint.bytes)}: {made.checkpoint.kind}"),
        *([("base", f"{made.base.name}: {whole}")] if made.base else [("model", whole)]),
        *([("merge", merged)] if merged else []),
        ("family", made.family),
        ("levels", ", ".join(_label(one.quantization_level) for one in made.configurations)),
        ("output", f"folders in {first.output_directory.name}/, named {first.naming_pattern}"),
        ("compared", _compared(first)),
        ("disk", f"about {human_bytes(made.disk_needed)}; {human_bytes(made.disk_free)} are free on that disk"),
        ("memory", f"about {human_bytes(made.memory_needed)}; {human_bytes(made.memory_free)} are free"),
        *(("note", note) for note in made.notes),
    ]


def _time(made: ExportPlan) -> str:
    """About how long it takes, in words, from the header of the whole model."""
    try:
        with open_checkpoint(made.base or made.checkpoint.path) as ck:
            values, layout = sum(info.numel for info in ck.info.values()), ck.layout
    except RwkvLabError:
        layout = None
    if layout is None:
        return "not estimated: it was measured with files of RWKV alone"
    levels, graphs = len(made.configurations), sum(one.export_onnx for one in made.configurations)
    traced = graphs > 0 and not graphs_are_kept(made)
    seconds = traced * _TRACE + graphs * _START + figure_seconds(_FIGURES)
    seconds += levels * file_seconds(_PASSES * 4 * values)
    if _is_compared(made.configurations[0]):
        seconds += levels * stepping_seconds(_COMPARED, 1, values, layout.n_layer, torch.float32, "cpu")
    scan = "; a sensitivity scan is not in it" if made.configurations[0].sensitivity_scan else ""
    once = f"; {_TRACE:.0f} s of it trace graphs, once for models of these shapes" if traced else ""
    return in_words(seconds, OF_FILES) + once + scan


def _is_compared(configuration: ExportConfiguration) -> bool:
    return configuration.run_validation_tests and configuration.export_onnx


def _compared(configuration: ExportConfiguration) -> str:
    if not _is_compared(configuration):
        return "nothing is run beside the model"
    samples = configuration.test_input_samples
    return f"onnxruntime with the model, on {samples if isinstance(samples, int) else len(samples)} texts"


def _what(made: ExportPlan) -> str:
    name = made.checkpoint.name if made.base is None else f"{made.checkpoint.name} merged into {made.base.name}"
    formats = [
        words
        for words, wanted in (
            ("ONNX", any(one.export_onnx for one in made.configurations)),
            ("PyTorch", any(one.export_pytorch for one in made.configurations)),
        )
        if wanted
    ]
    levels = ", ".join(_label(one.quantization_level) for one in made.configurations)
    return f"{name}, for {' and '.join(formats)}: {levels}"


def _outputs_table(made: ExportPlan) -> Table:
    rows = [(_label(one.level), one.format, one.bytes) for one in made.outputs]
    return Table("What is written", ("weights", "format", "bytes, about"), rows)


def _configuration(configuration: ExportConfiguration) -> dict[str, dict[str, object]]:
    where = configuration.origins
    return {name: {"value": getattr(configuration, name), "from": where[name]} for name in where}


def _configuration_table(made: ExportPlan) -> Table:
    """Every option, its value and where it comes from; of several levels all values where they differ."""
    rows = []
    for name in made.configurations[0].origins:
        values = dict.fromkeys(str(getattr(one, name)) for one in made.configurations)
        origins = dict.fromkeys(one.origins[name] for one in made.configurations)
        rows.append((name, ", ".join(values), ", ".join(origins)))
    note = "The last word has a parameter of the notebook, then the environment, then the file, then the default."
    return Table("Configuration", ("option", "value", "from"), sorted(rows, key=lambda r: r[2] == "default"), note)


def _summary(results: list[Exported]) -> str:
    """ "Exported int8, 1.1 MB (3.4 MB before), KL 0.0021 nats per token, same likeliest token 98.2 %."; of several
    levels the smallest stands for all, and every one that lost something is named."""
    last = min(results, key=lambda one: one.result.optimized_size_mb or 0.0)
    lost = "".join(
        f"; {one.label} is degraded: {', '.join(one.result.degraded)}" for one in results if one.result.degraded
    )
    if len(results) == 1:
        return f"Exported {_sentence(last)}{lost}."
    return f"Exported {', '.join(one.label for one in results)}; the smallest is {_sentence(last)}{lost}."


def _sentence(one: Exported) -> str:
    before, after = (human_bytes(1e6 * (s or 0)) for s in (one.result.original_size_mb, one.result.optimized_size_mb))
    text = f"{one.label}, {after} ({before} before)"
    if not one.measured:
        return f"{text}, not compared with the model"
    kl, top1 = one.measured["kl_mean"], one.measured["top1"]
    return f"{text}, KL {kl:.2g} nats per token, same likeliest token {100 * top1:.4g} %"


def _metrics(one: Exported) -> dict[str, object]:
    result = one.result
    return {
        "verdict": result.verdict,
        "original_size_mb": result.original_size_mb,
        "optimized_size_mb": result.optimized_size_mb,
        "size_reduction_percentage": result.size_reduction_percentage,
        "inference_speed_ms": result.inference_speed_ms,
        "peak_memory": result.monitoring.peak_memory,
        "peak_disk": result.monitoring.peak_disk,
        "seconds": result.seconds,
        "measured": one.measured,
        "speed": one.report.get("speed"),
        "memory": one.report.get("memory"),
        "degraded": result.degraded,
        "attempts": len(result.attempts),
        "onnx_model_path": result.onnx_model_path,
        "pytorch_model_path": result.pytorch_model_path,
    }


def _checks(results: list[Exported]) -> list[Check | NotApplicable]:
    """All checks; those of the merge, which all levels share, once, the others with their level."""
    if len(results) == 1:
        return list(results[0].result.checks)
    common = [check for check in results[0].result.checks if all(check in one.result.checks for one in results)]
    own = [
        replace(check, name=f"{one.label}: {check.name}")
        for one in results
        for check in one.result.checks
        if check not in common
    ]
    return common + own


def _continued(model: OnnxModel, prompt: str) -> str:
    """What a model writes after the prompt; token ids where it has no tokenizer."""
    try:
        return model.generate(prompt, max_new_tokens=_NEW_TOKENS, temperature=0)
    except ParameterError:
        ids = [token for token, _ in model.stream(_TOKENS, max_new_tokens=_NEW_TOKENS, temperature=0)]
        return f"no tokenizer; after the tokens {_TOKENS}: {' '.join(map(str, ids))}"


def _lines(folder: Path, has_text: bool) -> str:
    call = (
        'model.generate("The ", max_new_tokens=50)' if has_text else "list(model.stream([1, 2, 3], max_new_tokens=50))"
    )
    return f'from rwkv_lab.export import OnnxModel\nmodel = OnnxModel("{folder}")\nprint({call})'


def _pytorch(path: Path, folder: Path) -> str:
    """Lines that load a model for PyTorch; `path` is shown as below `folder`."""
    shown = folder / path.relative_to(folder) if folder == Path("/") else path.relative_to(folder)
    if path.is_dir():
        load = f'model = AutoModelForCausalLM.from_pretrained("{shown}")'
        return f"from transformers import AutoModelForCausalLM\n{load}"
    return f'from rwkv_lab import RWKV_Dual\nmodel = RWKV_Dual.from_pretrained("{shown}")'


def _label(level: str) -> str:
    return "float32" if level == "none" else level


STEPS = (
    Step(plan, "plan"),
    Step(carry_out, "results"),
    Step(show_sizes),
    Step(show_agreement),
    Step(show_cost),
    Step(continue_prompt),
    Step(show_use),
    Step(prove),
)
MUST_PASS = True
