"""What the cells of train.ipynb call, in order. Each shows its part and notes it for result.json and the report."""

import time
from collections.abc import Callable

import torch
from IPython.display import display

from rwkv_lab.checkpoint import file_facts, open_checkpoint
from rwkv_lab.checks import Check
from rwkv_lab.machine import memory_free
from rwkv_lab.model import bits_per_byte
from rwkv_lab.peft.quantised import QUANTS
from rwkv_lab.plotting import bits_bars, png
from rwkv_lab.progress import frontend_present, human_bytes
from rwkv_lab.samples import Sample
from rwkv_lab.train import (
    AUTOCASTS,
    DTYPES,
    RECIPES,
    Compared,
    Corpus,
    Examples,
    Recipe,
    TrainPlan,
    TrainResult,
    choose_recipe,
    compare_methods,
    held_out_bits,
    in_batches,
    load_corpus,
    open_tuned,
    plan_training,
    train,
)
from rwkv_lab.train.output import check_output
from rwkv_lab.workbench.parameters import input_path
from rwkv_lab.workbench.run import Run
from rwkv_lab.workbench.steps import Step
from rwkv_lab.workbench.tables import Table
from rwkv_lab.workbench.train import figures

__all__ = ["AUTOCASTS", "DTYPES", "QUANTS", "RECIPES"]  # what the panel offers

# The same text through the same weights, before they were written and after they were read.
_SAME_BITS = 1e-6
_DRY = "dry_run=True: nothing was trained, so there is nothing to show here."
_REDRAW = 3.0  # seconds; drawing the loss takes a tenth of one


def plan(run: Run) -> TrainPlan:
    """Begin the run by saying what would be trained, on what, and where it goes; of the base only headers are read.

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
    run.page.headline = f"The plan to train ({run.config.kind}) on {run.config.data}: nothing was trained."
    run.page.facts, run.page.tables = _facts(run, made), [_trained_table(made)]
    return made


def preview(run: Run) -> TrainPlan:
    """Show what training with these parameters would do, and note nothing.

    Raises:
        RwkvLabError: as `plan`.
    """
    c, recipe = run.config, _recipe(run)
    made = plan_training(
        c.kind,
        _base(run),
        batch_size=recipe.batch_size,
        ctx_len=recipe.ctx_len,
        rank=c.rank,
        alpha=c.alpha,
        targets=c.targets or None,
        train_parts=c.train_parts,
        quant=c.quant,
        dtype=c.dtype,
        autocast=c.autocast,
        device=c.device,
        gradient_checkpointing=c.gradient_checkpointing,
    )
    # Whether an older output may go is asked when it is about to; a plan is made after a run too.
    check_output(c.kind, run.output_path("trained.pth"), _base(run), recipe.data, overwrite=True)
    display(Table("What will happen", ("", ""), _facts(run, made)), _trained_table(made))
    return made


def carry_out(run: Run) -> TrainResult | None:
    """Train and write the output, the loss drawn in JupyterLab while it falls; None after `dry_run`.

    Raises:
        RwkvLabError: what `train` refuses; no output is there then.
    """
    if run.config.dry_run:
        print(_DRY)
        return None
    c, recipe = run.config, _recipe(run)
    result = train(
        c.kind,
        out=run.output_path("trained.pth"),
        base=_base(run),
        data=recipe.data,
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        ctx_len=recipe.ctx_len,
        lr=recipe.lr,
        rank=c.rank,
        alpha=c.alpha,
        targets=c.targets or None,
        train_parts=c.train_parts,
        quant=c.quant,
        dtype=c.dtype,
        autocast=c.autocast,
        device=c.device,
        seed=c.seed,
        accumulate=c.accumulate,
        warmup=c.warmup,
        gradient_checkpointing=c.gradient_checkpointing,
        eval_every=c.eval_every,
        patience=c.patience,
        checkpoint_every=c.checkpoint_every,
        resume=c.resume,
        log_folder=run.folder,
        overwrite=run.may_overwrite(),
        on_step=_live_loss(recipe.steps),
    )
    run.record.inputs, run.record.outputs = result.inputs, result.outputs
    run.record.seconds |= {stage: seconds for stage, seconds in result.seconds.items() if stage != "total"}
    run.record.metrics |= {
        "bits_per_byte_before": result.bits_before,
        "bits_per_byte_after": result.bits_after,
        "held_out_bytes": result.held_out_bytes,
        "ctx_len": recipe.ctx_len,
        "parameters_trained": result.trained,
        "parameters_frozen": result.frozen,
        "steps_done": len(result.losses),
        "resumed_at": result.resumed_at,
        "stopped_early": result.stopped_early,
        "tokens_per_second": result.tokens_per_second,
    }
    fewer = 1 - result.bits_after / result.bits_before
    run.page.headline = (
        f"{c.kind} on {recipe.data}: {result.bits_before:.3f} to {result.bits_after:.3f} bits per byte of "
        f"held-out text, {fewer:.1%} fewer."
    )
    rows = [(str(f.path), f.bytes, f.fingerprint) for f in result.outputs]
    display(Table("Written", ("file", "bytes", "fingerprint"), rows))
    return result


def show_curves(run: Run, result: TrainResult | None) -> None:
    """Loss by step, and bits per byte of held-out text before and after."""
    if result is None:
        print(_DRY)
        return
    recipe = _recipe(run)
    subtitle = f"{result.kind} on {recipe.data}: {result.trained:,} parameters trained, {result.frozen:,} frozen"
    figure = figures.loss_curve(result.losses, subtitle)
    run.show_figure("loss", "Loss while training", "Of the text that is trained on, one batch per step.", figure)
    bits = {recipe.data: {"before": result.bits_before, "after": result.bits_after}}
    subtitle = f"{result.held_out_bytes:,} bytes never trained on, a fresh state every {recipe.ctx_len} tokens"
    figure = bits_bars(bits, subtitle)
    caption = "Bits the model needs for each byte of text that it was not trained on; lower is better."
    run.show_figure("held_out", "Bits per byte of held-out text", caption, figure)
    if result.held_out:
        subtitle = f"{result.kind} on {recipe.data}, measured every {run.config.eval_every} steps"
        figure = figures.held_out_curve(result.held_out, result.bits_before, subtitle)
        caption = "Where this rises while the loss falls, training learns by heart; patience stops it there."
        run.show_figure("held_out_curve", "Held-out text while training", caption, figure)


def show_samples(run: Run, result: TrainResult | None) -> None:
    """What the model writes after the same prompts and with the same seed, before and after."""
    if result is None:
        print(_DRY)
        return
    run.page.samples = [Sample(s.prompt, {"before": s.before, "after": s.after}) for s in result.samples]
    for sample in run.page.samples:
        display(Table(f"After the prompt {sample.prompt!r}", list(sample.texts), [list(sample.texts.values())]))


def prove(run: Run, result: TrainResult | None) -> None:
    """Open what was written, measure it again, and see that the base is what it was; one PASS or FAIL line each."""
    if result is None:
        print(_DRY)
        return
    with run.timed("proof"):
        with open_checkpoint(result.out) as written:
            bad = sum(int((~written[name].isfinite()).sum()) for name in written.info)
            names, kind = list(written.info), written.kind
        expected = "model" if result.kind in ("pretrain", "full") else result.kind
        run.record.checks = [Check("kind of the output", kind, expected, kind in (expected, "lora"))]
        if result.kind == "state":
            others = sum(not name.endswith(".time_state") for name in names)
            run.record.checks.append(Check("tensors in the output that are no states", others, 0, others == 0))
        again = _measure_again(run, result)
        apart = abs(again - result.bits_after)
        changed = sum(file_facts(before.path).fingerprint != before.fingerprint for before in result.inputs)
    run.record.checks += [
        Check("values in the output that are NaN or Inf", bad, 0, bad == 0),
        Check(
            "bits per byte, output opened again against end of training: difference",
            apart,
            _SAME_BITS,
            apart <= _SAME_BITS,
        ),
        Check(
            "bits per byte of held-out text: fewer than before",
            again,
            result.bits_before,
            again < result.bits_before,
        ),
        Check("inputs that changed while training", changed, 0, changed == 0),
    ]
    for check in run.record.checks:
        print(check)


def compare(run: Run) -> list[Compared] | None:
    """Tune the base by every method that `compare_methods` knows, and show what each reached; None without `compare`.

    Raises:
        RwkvLabError: what `compare_methods` refuses.
    """
    if run.config.dry_run or not run.config.compare:
        print(_DRY if run.config.dry_run else "compare=False: no methods were compared.")
        return None
    c, recipe = run.config, _recipe(run)
    with run.timed("compare"):
        found = compare_methods(
            _base(run) or run.output_path("trained.pth"), recipe.data, ctx_len=recipe.ctx_len, seed=c.seed
        )
    show_compared(run, found, recipe.data)
    return found


def show_compared(run: Run, found: list[Compared], data: str) -> None:
    """Figure and table of a comparison, in the notebook and in the report."""
    counts = sorted({c.trained for c in found})
    about = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    subtitle = f"on {data}, each with {about} trained parameters, {len(found[0].losses)} steps of the same batches"
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
    """Draws the loss into a picture under the cell, every few seconds; None where nobody looks."""
    if not frontend_present():
        return None
    import ipywidgets

    picture = ipywidgets.Image(format="png", layout={"width": "900px"})
    display(picture)
    drawn = time.perf_counter()

    def on_step(step: int, losses: list[float]) -> None:
        nonlocal drawn
        if time.perf_counter() - drawn >= _REDRAW or step == steps:
            figure = figures.loss_curve(losses, f"step {step:,} of {steps:,}")
            picture.value, drawn = png(figure), time.perf_counter()

    return on_step


def _measure_again(run: Run, result: TrainResult) -> float:
    """Bits per byte of the output, from the files alone."""
    c, recipe = run.config, _recipe(run)
    model = open_tuned(c.kind, result.out, _base(run), c.dtype, c.device, c.quant)
    corpus = load_corpus(recipe.data)
    device, autocast = model.get_device(), AUTOCASTS[c.autocast]
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        if isinstance(corpus, Corpus):
            return bits_per_byte(model, corpus.held_out, recipe.ctx_len)
        return held_out_bits(model, in_batches(corpus, model.tokenizer, recipe.ctx_len, c.seed), device)


def _facts(run: Run, made: TrainPlan) -> list[tuple[str, object]]:
    c, recipe = run.config, _recipe(run)
    corpus, base = load_corpus(recipe.data), _base(run)
    total = made.count + made.frozen
    described = "none: a fresh model"
    if base:
        with open_checkpoint(base) as ck:
            described = f"{ck.path.name}, {human_bytes(ck.bytes)}"
    each = f"{recipe.accumulate} × {recipe.batch_size}" if recipe.accumulate > 1 else str(recipe.batch_size)
    facts = [
        ("kind", c.kind),
        ("base", described),
        ("model", str(made.layout)),
        ("trained", f"{made.count:,} parameters, {made.count / total:.2%} of {total:,}; {made.frozen:,} are frozen"),
        ("text", f"{corpus.name}, {_size(corpus, 'train')}"),
        ("held out", f"{_size(corpus, 'held_out')}: {corpus.split}"),
        ("steps", f"{recipe.steps:,}, each of {each} sequences of {recipe.ctx_len} tokens"),
        ("learning rate", f"up to {recipe.lr:g} after {recipe.warmup_steps:,} steps"),
        (
            "memory",
            f"about {human_bytes(made.memory_bytes)}: weights {human_bytes(made.weights_bytes)}, gradients and "
            f"optimiser {human_bytes(made.gradients_bytes + made.optimiser_bytes)}, "
            f"one batch {human_bytes(made.activations_bytes)}; {human_bytes(memory_free())} are free",
        ),
        ("output", run.output_path("trained.pth").name),
    ]
    if c.quant != "none":
        facts.insert(4, ("frozen matrices", c.quant))
    return facts


def _trained_table(made: TrainPlan) -> Table:
    rows = [(name, " × ".join(map(str, shape)), values) for name, shape, values in made.trained]
    return Table("What is trained, tensor by tensor", ("tensor", "shape", "trained parameters"), rows)


def _size(corpus: Corpus | Examples, part: str) -> str:
    found = getattr(corpus, part)
    return human_bytes(len(found)) if isinstance(found, bytes) else f"{len(found):,} examples"


def _base(run: Run):
    return input_path(run.config.base) if run.config.base else None


def _recipe(run: Run) -> Recipe:
    c = run.config
    given = dict(data=c.data, steps=c.steps, batch_size=c.batch_size, ctx_len=c.ctx_len, lr=c.lr, rank=c.rank)
    return choose_recipe(c.kind, **given, accumulate=c.accumulate, warmup=c.warmup)


STEPS = (
    Step(plan),
    Step(carry_out, "result"),
    Step(show_curves),
    Step(show_samples),
    Step(prove),
    Step(compare),
)
MUST_PASS = True
