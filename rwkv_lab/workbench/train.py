"""What the cells of train.ipynb call, in their order."""

from matplotlib.figure import Figure

from rwkv_lab.checkpoint import file_facts, open_checkpoint
from rwkv_lab.checks import Check
from rwkv_lab.model import RWKV_Dual, bits_per_byte
from rwkv_lab.progress import human_bytes
from rwkv_lab.train import DTYPES, Recipe, TrainResult, choose_recipe, load_corpus, train
from rwkv_lab.workbench.figures import bits_bars, loss_curve, png
from rwkv_lab.workbench.parameters import input_path
from rwkv_lab.workbench.report import Picture, Sample
from rwkv_lab.workbench.run import Run
from rwkv_lab.workbench.tables import Table

# The same text through the same weights, once before they were written and once after they were read.
_SAME_BITS = 1e-4


def plan(run: Run) -> Table:
    """What the run would train, on what, and what it would write. The base's headers are read; nothing is trained.

    The demo model is trained first where it is the base and not there yet.

    Raises:
        RwkvLabError: the base cannot be opened, or there is no such corpus.
    """
    config, recipe = run.config, _recipe(run)
    corpus = load_corpus(recipe.data)
    tokens = recipe.steps * recipe.batch_size * recipe.ctx_len
    rows = [
        ("kind", config.kind),
        ("base", "a fresh model"),
        ("trained", "every parameter"),
        ("text to train on", f"{corpus.name}, {human_bytes(len(corpus.train))}"),
        ("held out", f"{human_bytes(len(corpus.held_out))}: {corpus.split}"),
        ("steps", f"{recipe.steps:,} of {recipe.batch_size} texts of {recipe.ctx_len} bytes"),
        ("bytes seen", f"{tokens:,}, {tokens / len(corpus.train):.2g} times the text"),
        ("highest learning rate", recipe.lr),
        ("output", str(run.output_path("trained.pth"))),
    ]
    if config.base:
        with open_checkpoint(input_path(config.base)) as base:
            layout = base.layout
            rows[1] = ("base", f"{base.path}, {human_bytes(base.bytes)}: {layout or base.reason}")
        if config.kind == "state" and layout:
            numbers = layout.n_layer * layout.n_head * layout.head_size**2
            rows[2] = ("trained", f"the initial state of every layer, {numbers:,} numbers; the model stays as it is")
    table = Table("What this run will do", ("", ""), rows)
    run.page.facts += rows
    return table


def fit(run: Run) -> TrainResult:
    """Train and write the output; inputs, output and figures of merit go into the record."""
    config, recipe = run.config, _recipe(run)
    with run.timed("train"):
        result = train(
            config.kind,
            out=run.output_path("trained.pth"),
            base=input_path(config.base) if config.base else None,
            data=recipe.data,
            steps=recipe.steps,
            batch_size=recipe.batch_size,
            ctx_len=recipe.ctx_len,
            lr=recipe.lr,
            dtype=config.dtype,
            device=config.device,
            seed=config.seed,
            overwrite=run.may_overwrite(),
        )
    run.record.inputs, run.record.outputs = result.inputs, result.outputs
    run.record.seconds |= {f"train: {stage}": seconds for stage, seconds in result.seconds.items() if stage != "total"}
    run.record.metrics |= {
        "bits_per_byte_before": result.bits_before,
        "bits_per_byte_after": result.bits_after,
        "held_out_bytes": result.held_out_bytes,
        "ctx_len": recipe.ctx_len,
        "parameters_trained": result.trained,
        "parameters_frozen": result.frozen,
        "tokens_per_second": result.tokens_per_second,
        "final_loss": result.losses[-1],
    }
    gain = 1 - result.bits_after / result.bits_before
    run.page.headline = (
        f"{config.kind} on {recipe.data}: {result.bits_before:.3f} to {result.bits_after:.3f} bits per byte "
        f"of held-out text ({gain:.1%} fewer), a fresh state every {recipe.ctx_len} bytes"
    )
    return result


def curve(run: Run, result: TrainResult) -> Figure:
    """Loss by step."""
    recipe = _recipe(run)
    subtitle = f"{result.kind} on {recipe.data}, {result.trained:,} parameters trained, {result.frozen:,} frozen"
    figure = loss_curve(result.losses, "Loss while training", subtitle)
    _show(run, "loss", figure, "Text that is trained on. The thin line is single batches, the thick one their mean.")
    return figure


def before_and_after(run: Run, result: TrainResult) -> Figure:
    """Held-out bits per byte, before and after."""
    recipe = _recipe(run)
    bits = {recipe.data: {"before": result.bits_before, "after": result.bits_after}}
    figure = bits_bars(bits, f"{result.held_out_bytes:,} bytes never trained on, a fresh state every {recipe.ctx_len}")
    _show(run, "held_out", figure, "How many bits the model needs for one byte of text it was not trained on.")
    return figure


def samples(run: Run, result: TrainResult) -> Table:
    """What the model writes after the same prompts with the same seed, before and after."""
    run.page.samples += [Sample(s.prompt, {"before": s.before, "after": s.after}) for s in result.samples]
    rows = [(s.prompt, s.before, s.after) for s in result.samples]
    return Table("Samples", ("prompt", "before", "after"), rows)


def prove(run: Run, result: TrainResult) -> list[Check]:
    """Open what was written and measure it again; see that the base is what it was."""
    recipe = _recipe(run)
    with open_checkpoint(result.out) as written:
        finite = all(bool(written[name].isfinite().all()) for name in written.info)
        states = [name for name in written.info if name.endswith(".time_state")]
        n_tensor = len(written.info)
    if result.kind == "state":
        model = RWKV_Dual.from_pretrained(result.inputs[0].path, dtype=DTYPES[run.config.dtype])
        model.load_state_file(result.out)
    else:
        model = RWKV_Dual.from_pretrained(result.out, dtype=DTYPES[run.config.dtype])
    again = bits_per_byte(model, load_corpus(recipe.data).held_out, recipe.ctx_len)
    off = abs(again - result.bits_after)
    checks = [
        Check("every number in the output is finite", "yes" if finite else "no", "yes", finite),
        Check("bits per byte of the file, read again, differ by", off, _SAME_BITS, off <= _SAME_BITS),
        Check("held-out bits per byte went down to", again, result.bits_before, again < result.bits_before),
    ]
    if result.kind == "state":
        only = len(states) == n_tensor == model.layout.n_layer
        checks.append(Check("tensors in the output, one state per layer", n_tensor, model.layout.n_layer, only))
    for before in result.inputs:
        same = file_facts(before.path).fingerprint == before.fingerprint
        checks.append(Check("the base is unchanged", "yes" if same else "no", "yes", same))
    run.record.checks += checks
    return checks


def _recipe(run: Run) -> Recipe:
    c = run.config
    return choose_recipe(c.kind, data=c.data, steps=c.steps, batch_size=c.batch_size, ctx_len=c.ctx_len, lr=c.lr)


def _show(run: Run, name: str, figure: Figure, caption: str) -> None:
    """Keep a figure as PNG beside the report, and in it."""
    data = png(figure)
    path = run.folder / f"{name}.png"
    path.write_bytes(data)
    run.record.figures.append(path)
    run.page.pictures.append(Picture(name.replace("_", " "), caption, data))
