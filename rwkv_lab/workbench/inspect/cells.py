"""What the cells of inspect.ipynb call, in their order. Each shows its part, and notes it for result and report."""

from collections import Counter

from IPython.display import display

from rwkv_lab.checkpoint import Checkpoint, file_facts, open_checkpoint
from rwkv_lab.checkpoint.packed import in_few_bits
from rwkv_lab.checkpoint.statistics import Statistics, statistics
from rwkv_lab.checks import Check
from rwkv_lab.names import split_block
from rwkv_lab.plotting import layer_map
from rwkv_lab.progress import human_bytes
from rwkv_lab.text import counted
from rwkv_lab.workbench.estimate import OF_FILES, figure_seconds, in_words, memory_in_words, statistics_seconds
from rwkv_lab.workbench.inspect import figures
from rwkv_lab.workbench.parameters import input_path
from rwkv_lab.workbench.run import Run
from rwkv_lab.workbench.steps import Step, show_verdict
from rwkv_lab.workbench.tables import Table

_FIGURES = 3


def preview(run: Run) -> None:
    """Show what the file is, from headers, and what reading it takes, and note nothing.

    Raises:
        RwkvLabError: the file cannot be opened.
    """
    with open_checkpoint(input_path(run.config.checkpoint)) as ck:
        largest = max((t.numel for t in ck.info.values()), default=0)
        rows = [
            *_facts(ck),
            ("would be read", f"{human_bytes(ck.bytes)}, once, a tensor at a time"),
            ("memory", memory_in_words(3 * 4 * largest)),
            ("time", in_words(statistics_seconds(ck.bytes) + figure_seconds(_FIGURES), OF_FILES)),
        ]
    display(Table("The plan", ("", ""), rows))


def describe(run: Run) -> None:
    """Say what the file is, from headers alone: kind, generation and dimensions, and what decided.

    Raises:
        RwkvLabError: the file cannot be opened.
    """
    run.begin_again()
    with run.timed("open"), open_checkpoint(input_path(run.config.checkpoint)) as ck:
        run.record.inputs = [file_facts(ck)]
        facts = _facts(ck)
        misfit = ck.identity.misfit
        run.record.metrics |= {"kind": ck.kind, "tensors": len(ck), "bytes": ck.bytes}
        if ck.layout:
            fields = (
                "version",
                "n_layer",
                "n_embd",
                "dim_att",
                "dim_ffn",
                "vocab_size",
                "n_head",
                "head_size",
                "ranks",
            )
            run.record.metrics["layout"] = {name: getattr(ck.layout, name) for name in fields}
        if misfit:
            run.record.checks = [
                Check("tensors of the layout that are missing", len(misfit.missing), 0, not misfit.missing),
                Check("tensors of another shape than the layout's", len(misfit.wrong), 0, not misfit.wrong),
                Check("tensors that the layout does not know", len(misfit.extra), 0, not misfit.extra),
            ]
        elif ck.kind == "unknown":
            run.record.checks = [Check("what the file is", f"not recognised: {ck.reason}", "recognised", False)]
        run.page.headline = f"{ck.path.name} is {_kind_in_words(ck)}."
        run.page.facts = facts
        run.page.tables = [Table("Evidence", ("name and shape",), [(line,) for line in ck.evidence])]
        if ck.metadata:
            run.page.tables.append(Table("Metadata in the file", ("key", "value"), list(ck.metadata.items())))
    display(Table(run.page.headline, ("", ""), facts), *run.page.tables)


def measure(run: Run) -> dict[str, Statistics]:
    """Read every value once, and list the tensors with their statistics."""
    with run.timed("statistics"), open_checkpoint(input_path(run.config.checkpoint)) as ck:
        found = statistics(ck)
        rows = []
        for name, s in found.items():
            t = ck.info[name]
            shape, dtype = " × ".join(map(str, t.shape)), str(t.dtype).removeprefix("torch.")
            rows.append((name, shape, dtype, t.nbytes, s.min, s.max, s.mean, s.std, s.zeros, s.nan, s.inf))
    columns = ("tensor", "shape", "dtype", "bytes", "min", "max", "mean", "std", "zeros", "NaN", "Inf")
    table = Table("Tensors", columns, rows, "Statistics are of the finite values.")
    run.page.tables.append(table)
    nan, inf = sum(s.nan for s in found.values()), sum(s.inf for s in found.values())
    run.record.metrics |= {"nan": nan, "inf": inf}
    bad = f"{counted(nan + inf, 'value is', 'values are')} NaN or Inf" if nan + inf else "no value is NaN or Inf"
    run.page.headline = f"{run.page.headline.removesuffix('.')}: {counted(len(found), 'tensor')}, {bad}."
    run.page.summary = run.page.headline
    called = {"nan": "NaN", "inf": "Inf"}
    for what, count in (("nan", nan), ("inf", inf)):
        first = next((name for name, s in found.items() if getattr(s, what)), "")
        value = f"{count:,}, first in {first}" if count else 0
        run.record.checks.append(Check(f"values that are {called[what]}", value, 0, count == 0))
    display(table)
    return found


def show_figures(run: Run, statistics: dict[str, Statistics]) -> None:
    """Where the bytes are, and how large the values are by layer and matrix."""
    with run.timed("figures"), open_checkpoint(input_path(run.config.checkpoint)) as ck:
        subtitle = f"{ck.path.name}: {ck.layout or ck.kind}"
        figure = figures.sizes_by_part(ck.info, subtitle)
        run.show_figure(
            "sizes", "Bytes by part and dtype", "Bars of parts that repeat in every layer are their sum.", figure
        )
        layers = {inside[0] for name in ck.info if (inside := split_block(name))}
        for measure, title, unit in (
            ("std", "Spread of the values", "standard deviation"),
            ("absmax", "Largest absolute value", "largest absolute value"),
        ):
            values = {name: getattr(s, measure) for name, s in statistics.items()}
            figure = layer_map(values, max(layers, default=-1) + 1, f"{title}, by tensor", subtitle, unit)
            caption = "Each cell is one tensor, on a logarithmic scale; grey is zero, not finite, or not there."
            run.show_figure(measure, f"{title}, by layer and matrix", caption, figure)


def _facts(ck: Checkpoint) -> list[tuple[str, object]]:
    dtypes = Counter(str(t.dtype).removeprefix("torch.") for t in ck.info.values())
    facts: list[tuple[str, object]] = [
        ("kind", _kind_in_words(ck)),
        ("format", f"{ck.format}, {counted(len(ck.files), 'file')}, {human_bytes(ck.bytes)}"),
        ("model", str(ck.layout) if ck.layout else f"no layout: {ck.reason}"),
        ("tensors", f"{len(ck)}, {counted(sum(t.numel for t in ck.info.values()), 'value')}"),
        ("dtypes", ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common())),
    ]
    if ck.layout and ck.reason:
        facts.append(("lacks" if ck.kind == "partial" else "holds", ck.reason))
    if few := in_few_bits(ck.info.values()):
        facts.append(("packed", few))
    if ck.prefixes:
        taken_off = ", ".join(f"{prefix} ({counted(count, 'name')})" for prefix, count in ck.prefixes.items())
        facts.append(("prefixes", f"taken off the names: {taken_off}"))
    ranks = Counter(t.shape[0] for n, t in ck.info.items() if n.endswith(".lora_A") and len(t.shape) == 2)
    if ranks:
        of_rank = [f"{counted(n, 'matrix', 'matrices')} of rank {rank}" for rank, n in ranks.most_common()]
        facts.append(("ranks", ", ".join(of_rank)))
    if ck.others:
        facts.append(("other entries", ", ".join(map(str, list(ck.others)[:10]))))
    if ck.adapter_config:
        facts.append(("adapter_config.json", ", ".join(f"{k} {v}" for k, v in ck.adapter_config.items())[:500]))
    return facts


def _kind_in_words(ck: Checkpoint) -> str:
    model = f"RWKV-{ck.layout.version}" if ck.layout else ""
    words = {
        "model": f"a whole {model} model",
        "partial": f"a part of an {model or 'RWKV'} model",
        "state": "a tuned state",
        "lora": "a LoRA adapter",
        "pissa-init": "the starting point of a PiSSA adapter",
        "miss": "a MiSS adapter",
        "unsupported": "a variant that is not supported",
        "unmerged": f"a whole {model} model with an adapter beside it, not merged",
        "unusable": "no model as it is",
        "converted": "a converted file that is not supported",
    }
    return words.get(ck.kind, f"of kind {ck.kind!r}")


STEPS = (
    Step(describe),
    Step(measure, "statistics"),
    Step(show_figures),
    Step(show_verdict),
)
MUST_PASS = False  # finding faults is the job
