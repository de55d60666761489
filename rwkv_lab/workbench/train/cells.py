"""What the cells of train.ipynb call, in order. Each shows its part and notes it for result.json and the report."""

import time
from collections.abc import Callable

from IPython.display import display

from rwkv_lab.analysis.texts import AnyCorpus, held_out_tokens
from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.machine import memory_free
from rwkv_lab.plotting import bits_bars, dark_png, png
from rwkv_lab.progress import frontend_present, human_bytes
from rwkv_lab.samples import Sample
from rwkv_lab.text import counted
from rwkv_lab.train import (
    Compared,
    Corpus,
    Examples,
    Measurement,
    TokenCorpus,
    TrainPlan,
    TrainResult,
    compare_methods,
    load_corpus,
    make_plan,
    run_training,
    verify_training,
)
from rwkv_lab.train.held_out import change_in_words
from rwkv_lab.train.output import check_destinations
from rwkv_lab.workbench.estimate import figure_seconds, forward_seconds, in_words, loading_seconds
from rwkv_lab.workbench.report import Picture
from rwkv_lab.workbench.run import Run
from rwkv_lab.workbench.steps import Step, show_verdict
from rwkv_lab.workbench.tables import Table
from rwkv_lab.workbench.train import figures

_DRY = "dry_run=True: nothing was trained, so there is nothing to show here."
_FIGURES = 3
_REDRAW = 3.0  # seconds; drawing the loss takes a tenth of one


def plan(run: Run) -> TrainPlan:
    """Begin the run: show what would be trained, on what, and where it goes; of the base only headers are read.

    The demo model is trained first, where it is the base and not there yet.

    Raises:
        RwkvLabError: the base cannot be opened, there is no such text, or the parameters do not go together.
    """
    run.begin_again()
    with run.timed("plan"):
        made = preview(run)
    run.record.metrics |= {
        "parameters_trained": made.count,
        "parameters_frozen": made.frozen,
        "memory_needed": made.memory_bytes,
        "memory_free": memory_free(),
    }
    run.record.notes = list(made.notes)
    run.page.headline = f"The plan to train ({run.config.kind}) on {run.config.data}: nothing was trained."
    run.page.facts, run.page.tables = _facts(run, made), [_trained_table(made)]
    return made


def preview(run: Run) -> TrainPlan:
    """Show what training with these parameters would do, and note nothing.

    Raises:
        RwkvLabError: as `plan`.
    """
    made = make_plan(run.config.spec())
    # An older output is refused when it is about to be replaced; a plan is made after a run too.
    options = run.config.options().changed(overwrite=True)
    check_destinations(made.spec, run.output_path("trained.pth"), options)
    time = in_words(_seconds(made)) + ("; the comparison is not in it" if run.config.compare else "")
    display(Table("What will happen", ("", ""), [*_facts(run, made), ("time", time)]), _trained_table(made))
    return made


def carry_out(run: Run, plan: TrainPlan) -> TrainResult | None:
    """Train as planned, the loss drawn in JupyterLab while it falls, and write the output; None after `dry_run`.

    Raises:
        ParameterError: parameters that have changed since the plan was made.
        RwkvLabError: what `train` refuses; no output is there then.
    """
    run.refuse_changed()
    if run.config.dry_run:
        print(_DRY)
        return None
    spec = plan.spec
    options = run.config.options().changed(
        log_folder=str(run.folder), overwrite=run.may_overwrite(), on_step=_live_loss(spec.effective("steps"))
    )
    result = run_training(plan, run.output_path("trained.pth"), options)
    run.record.inputs, run.record.outputs = result.inputs, result.outputs
    run.record.seconds |= {stage: seconds for stage, seconds in result.seconds.items() if stage != "total"}
    run.record.metrics |= {
        "bits_per_byte_before": result.bits_before,
        "bits_per_byte_after": result.bits_after,
        "held_out_bytes": result.held_out_bytes,
        "ctx_len": spec.ctx_len,
        "parameters_trained": result.trained,
        "parameters_frozen": result.frozen,
        "steps_done": result.continued + len(result.losses),
        "resumed_at": result.resumed_at,
        "stopped_early": result.stopped_early,
        "tokens_per_second": result.tokens_per_second,
    }
    run.record.notes = result.notes
    if fit := result.fit:
        run.record.metrics |= {
            "examples": fit.examples,
            "examples_longer_than_ctx_len": fit.longer,
            "examples_without_their_end": fit.lost_ends,
            "tokens": fit.tokens,
            "tokens_lost": fit.lost,
            "ctx_len_that_cuts_none": fit.needed,
        }
    run.page.headline = (
        f"{spec.kind} on {spec.data}: {result.bits_before:.3f} to {result.bits_after:.3f} bits per byte of "
        f"held-out text, {change_in_words(result.bits_before, result.bits_after, 'fewer', 'more')}; "
        f"{Measurement(result.bits_after, result.held_out_bytes, spec.effective('ctx_len')).described}."
    )
    run.page.summary = run.page.headline
    rows = [(str(f.path), f.bytes, f.fingerprint) for f in result.outputs]
    display(Table("Written", ("file", "bytes", "fingerprint"), rows))
    return result


def show_curves(run: Run, plan: TrainPlan, result: TrainResult | None) -> None:
    """Loss by step, and bits per byte of held-out text before and after."""
    if result is None:
        print(_DRY)
        return
    spec, data = plan.spec, plan.spec.effective("data")
    subtitle = f"{result.kind} on {data}: {counted(result.trained, 'parameter')} trained, {result.frozen:,} frozen"
    figure = figures.loss_curve(result.losses, subtitle)
    caption = "The loss on the text that is trained on, one batch per step."
    run.show_figure("loss", "Loss while training", caption, figure)
    bits = {data: {"before": result.bits_before, "after": result.bits_after}}
    subtitle = Measurement(result.bits_after, result.held_out_bytes, spec.effective("ctx_len")).described
    figure = bits_bars(bits, subtitle)
    caption = "Bits the model needs for each byte of text that it was not trained on; lower is better."
    run.show_figure("held_out", "Bits per byte of held-out text", caption, figure)
    if result.held_out:
        subtitle = f"{result.kind} on {data}, measured every {counted(spec.eval_every, 'step')}"
        figure = figures.held_out_curve(result.held_out, result.bits_before, subtitle)
        caption = "Where this rises while the loss falls, the model overfits; patience stops training there."
        run.show_figure("held_out_curve", "Held-out text while training", caption, figure)


def show_samples(run: Run, result: TrainResult | None) -> None:
    """What the model writes after the same prompts and with the same seed, before and after."""
    if result is None:
        print(_DRY)
        return
    run.page.samples = [
        Sample(s.prompt, ({"in the data": s.expected} if s.expected else {}) | {"before": s.before, "after": s.after})
        for s in result.samples
    ]
    for sample in run.page.samples:
        display(Table(f"After the prompt {sample.prompt!r}", list(sample.texts), [list(sample.texts.values())]))


def prove(run: Run, plan: TrainPlan, result: TrainResult | None) -> None:
    """Open what was written, measure it again, and see that the base is what it was; one PASS or FAIL line each."""
    if result is None:
        print(_DRY)
        return
    with run.timed("proof"):
        run.record.checks = list(verify_training(plan.spec, result))
    show_verdict(run)


def compare(run: Run, plan: TrainPlan) -> list[Compared] | None:
    """Tune the base by every method of `compare_methods`, and show what each reached; None without `compare`.

    Raises:
        RwkvLabError: what `compare_methods` refuses.
    """
    if run.config.dry_run or not run.config.compare:
        print(_DRY if run.config.dry_run else "compare=False: no methods were compared.")
        return None
    spec, data = plan.spec, plan.spec.effective("data")
    with run.timed("compare"):
        base = spec.base or run.output_path("trained.pth")
        given = {name: getattr(spec, name) for name in ("tokenizer", "template", "ignore", "long")}
        of_data = {name: value for name, value in given.items() if value}
        found = compare_methods(base, data, ctx_len=spec.effective("ctx_len"), seed=spec.seed, **of_data)
    show_compared(run, found, data)
    return found


def show_compared(run: Run, found: list[Compared], data: str) -> None:
    """Figure and table of a comparison, in the notebook and in the report."""
    counts = sorted({c.trained for c in found})
    about = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    subtitle = (
        f"on {data}, each with {about} trained parameters, {counted(len(found[0].losses), 'step')} of the same batches"
    )
    caption = "Left: what each gains on held-out text. Right: its loss, the mean of a few batches at a time."
    figure = figures.methods_compared(found, subtitle)
    run.show_figure("compared", "Methods at equal trained parameters", caption, figure)
    rows = [(c.method, c.trained, c.rank or "", c.lr, c.bits_after, c.bits_before - c.bits_after) for c in found]
    heads = ("method", "trained", "rank", "learning rate", "bits per byte", "fewer than the base")
    table = Table("Methods at equal trained parameters", heads, rows)
    run.page.tables.append(table)
    run.record.metrics["compared"] = {c.method: c.bits_after for c in found}
    display(table)


def _live_loss(steps: int) -> Callable | None:
    """Draws the loss into a picture under the cell, every few seconds; None where no front end is there."""
    if not frontend_present():
        return None
    import ipywidgets

    shown = ipywidgets.HTML()
    display(shown)
    drawn = time.perf_counter()

    def on_step(step: int, losses: list[float]) -> None:
        nonlocal drawn
        if time.perf_counter() - drawn >= _REDRAW or step == steps:
            figure = figures.loss_curve(losses, f"step {step:,} of {steps:,}")
            picture = Picture("Loss so far", "", png(figure), dark_png(figure), "loss")
            shown.value, drawn = picture.as_html(), time.perf_counter()

    return on_step


def _facts(run: Run, made: TrainPlan) -> list[tuple[str, object]]:
    spec = made.spec
    corpus = _corpus(made)
    total = made.count + made.frozen
    described = "none: a fresh model"
    if spec.base:
        with open_checkpoint(spec.base) as ck:
            described = f"{ck.path.name}, {human_bytes(ck.bytes)}"
    each = (f"{spec.accumulate} × " if spec.accumulate > 1 else "") + counted(spec.batch_size, "sequence")
    facts: list[tuple[str, object]] = [
        ("kind", spec.kind),
        ("base", described),
        ("model", str(made.layout)),
        (
            "trained",
            f"{counted(made.count, 'parameter')}, {made.count / total:.2%} of {total:,}; {made.frozen:,} are frozen",
        ),
        ("text", f"{corpus.name}, {_size(corpus, 'train')}"),
        ("held out", f"{_size(corpus, 'held_out')}: {corpus.split}"),
        ("steps", f"{spec.steps:,}, each of {each} of {counted(spec.ctx_len, 'token')}"),
        ("learning rate", f"up to {spec.lr:g} after {counted(spec.warmup_steps, 'step')}"),
        (
            "memory",
            f"about {human_bytes(made.memory_bytes)}: weights {human_bytes(made.weights_bytes)}, gradients and "
            f"optimiser {human_bytes(made.gradients_bytes + made.optimiser_bytes)}, "
            f"one batch {human_bytes(made.activations_bytes)}; {human_bytes(memory_free())} are free",
        ),
        ("output", run.output_path("trained.pth").name),
        *(("note", note) for note in made.notes),
    ]
    if spec.quant != "none":
        facts.insert(4, ("frozen matrices", spec.quant))
    return facts


def _seconds(made: TrainPlan) -> float:
    """About the seconds of all steps, forward, and backward for twice as long, and of measuring held-out text."""
    spec, values, layers = made.spec, made.count + made.frozen, made.layout.n_layer
    corpus = _corpus(made)
    dtype = spec.autocast_dtype or spec.torch_dtype
    once = forward_seconds(spec.ctx_len, spec.batch_size, values, layers, dtype, "cpu")
    steps = spec.steps * spec.accumulate * once * (4 if spec.gradient_checkpointing else 3)
    # Before, after, of the file that was written, and on the way.
    times = 3 + (spec.steps // spec.eval_every if spec.eval_every else 0)
    held_out = round(held_out_tokens(corpus, made.layout.vocab_size))
    measured = times * forward_seconds(max(held_out, 1), 1, values, layers, dtype, "cpu")
    return steps + measured + loading_seconds(2 * values * dtype.itemsize) + figure_seconds(_FIGURES)


def _corpus(made: TrainPlan) -> AnyCorpus:
    return load_corpus(made.spec.data) if made.corpus is None else made.corpus


def _trained_table(made: TrainPlan) -> Table:
    rows = [(name, " × ".join(map(str, shape)), values) for name, shape, values in made.trained]
    return Table("What is trained, tensor by tensor", ("tensor", "shape", "trained parameters"), rows)


def _size(corpus: Corpus | Examples | TokenCorpus, part: str) -> str:
    size = len(getattr(corpus, part))
    if isinstance(corpus, Corpus):
        return human_bytes(size)
    return counted(size, "token" if isinstance(corpus, TokenCorpus) else "example")


STEPS = (
    Step(plan, "plan"),
    Step(carry_out, "result"),
    Step(show_curves),
    Step(show_samples),
    Step(prove),
    Step(compare),
)
MUST_PASS = True
