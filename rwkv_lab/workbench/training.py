"""What the cells of train.ipynb call, in order. Each shows its part and notes it for result.json and the report."""

from IPython.display import display

from rwkv_lab.checkpoint import file_facts, open_checkpoint
from rwkv_lab.checks import Check
from rwkv_lab.model import RWKV_Dual, bits_per_byte
from rwkv_lab.progress import human_bytes
from rwkv_lab.train import DTYPES, Recipe, TrainResult, choose_recipe, load_corpus, train
from rwkv_lab.workbench import figures
from rwkv_lab.workbench.parameters import input_path
from rwkv_lab.workbench.report import Sample
from rwkv_lab.workbench.run import Run
from rwkv_lab.workbench.tables import Table

# The same text through the same weights, before they were written and after they were read.
_SAME_BITS = 1e-6


def plan(run: Run) -> None:
    """Say what would be trained, on what, and where it goes; of the base only the headers are read.

    The demo model is trained first, where it is the base and not there yet.

    Raises:
        RwkvLabError: the base cannot be opened, or there is no such text.
    """
    run.begin_again()
    config, recipe = run.config, _recipe(run)
    with run.timed("plan"):
        corpus = load_corpus(recipe.data)
        base, trained = _describe_base(run)
    seen = recipe.steps * recipe.batch_size * recipe.ctx_len
    run.page.headline = f"The plan to train ({config.kind}) on {corpus.name}: nothing was trained."
    run.page.facts = [
        ("kind", config.kind),
        ("base", base),
        ("trained", trained),
        ("text", f"{corpus.name}, {human_bytes(len(corpus.train))}"),
        ("held out", f"{human_bytes(len(corpus.held_out))}: {corpus.split}"),
        ("steps", f"{recipe.steps:,}, each of {recipe.batch_size} windows of {recipe.ctx_len} bytes"),
        ("bytes seen", f"{seen:,}, {seen / len(corpus.train):.2g} times the text"),
        ("learning rate", f"up to {recipe.lr:g}"),
        ("output", run.output_path("trained.pth").name),
    ]
    display(Table("What will happen", ("", ""), run.page.facts))


def carry_out(run: Run) -> TrainResult:
    """Train and write the output.

    Raises:
        RwkvLabError: what `train` refuses; no output is there then.
    """
    config, recipe = run.config, _recipe(run)
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
    run.record.seconds |= {stage: seconds for stage, seconds in result.seconds.items() if stage != "total"}
    run.record.metrics |= {
        "bits_per_byte_before": result.bits_before,
        "bits_per_byte_after": result.bits_after,
        "held_out_bytes": result.held_out_bytes,
        "ctx_len": recipe.ctx_len,
        "parameters_trained": result.trained,
        "parameters_frozen": result.frozen,
        "tokens_per_second": result.tokens_per_second,
    }
    fewer = 1 - result.bits_after / result.bits_before
    run.page.headline = (
        f"{config.kind} on {recipe.data}: {result.bits_before:.3f} to {result.bits_after:.3f} bits per byte of "
        f"held-out text, {fewer:.1%} fewer."
    )
    rows = [(str(f.path), f.bytes, f.fingerprint) for f in result.outputs]
    display(Table("Written", ("file", "bytes", "fingerprint"), rows))
    return result


def show_curves(run: Run, result: TrainResult) -> None:
    """Loss by step, and bits per byte of held-out text before and after."""
    recipe = _recipe(run)
    subtitle = f"{result.kind} on {recipe.data}: {result.trained:,} parameters trained, {result.frozen:,} frozen"
    figure = figures.loss_curve(result.losses, "Loss while training", subtitle)
    run.show_figure("loss", "Loss while training", "Of the text that is trained on, one batch per step.", figure)
    bits = {recipe.data: {"before": result.bits_before, "after": result.bits_after}}
    subtitle = f"{result.held_out_bytes:,} bytes never trained on, a fresh state every {recipe.ctx_len} bytes"
    figure = figures.bits_bars(bits, subtitle)
    caption = "Bits the model needs for each byte of text that it was not trained on; lower is better."
    run.show_figure("held_out", "Bits per byte of held-out text", caption, figure)


def show_samples(run: Run, result: TrainResult) -> None:
    """What the model writes after the same prompts and with the same seed, before and after."""
    run.page.samples = [Sample(s.prompt, {"before": s.before, "after": s.after}) for s in result.samples]
    for sample in run.page.samples:
        display(Table(f"After the prompt {sample.prompt!r}", list(sample.texts), [list(sample.texts.values())]))


def prove(run: Run, result: TrainResult) -> None:
    """Open what was written, measure it again, and see that the base is what it was; one PASS or FAIL line each."""
    recipe, dtype = _recipe(run), DTYPES[run.config.dtype]
    with run.timed("proof"):
        with open_checkpoint(result.out) as written:
            bad = sum(int((~written[name].isfinite()).sum()) for name in written.info)
            names = list(written.info)
        if result.kind == "state":
            model = RWKV_Dual.from_pretrained(result.inputs[0].path, dtype=dtype)
            model.load_state_file(result.out)
            others = sum(not name.endswith(".time_state") for name in names)
            run.record.checks = [Check("tensors in the output that are no states", others, 0, others == 0)]
        else:
            model = RWKV_Dual.from_pretrained(result.out, dtype=dtype)
            run.record.checks = []
        again = bits_per_byte(model, load_corpus(recipe.data).held_out, recipe.ctx_len)
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


def _describe_base(run: Run) -> tuple[str, str]:
    """What is started from, and what of it is trained."""
    config = run.config
    if not config.base:
        return "none: a fresh model", "every parameter"
    with open_checkpoint(input_path(config.base)) as base:
        layout = base.layout
        described = f"{base.path.name}, {human_bytes(base.bytes)}: {layout or base.reason}"
    if config.kind != "state" or not layout:
        return described, "every parameter"
    count = layout.n_layer * layout.n_head * layout.head_size**2
    return described, f"the state that a text starts from, {count:,} numbers; the model stays as it is"


def _recipe(run: Run) -> Recipe:
    c = run.config
    return choose_recipe(c.kind, data=c.data, steps=c.steps, batch_size=c.batch_size, ctx_len=c.ctx_len, lr=c.lr)
