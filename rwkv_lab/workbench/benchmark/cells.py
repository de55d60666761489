"""What the cells of benchmark.ipynb call, in their order. Each shows its part, and notes it for result and report."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from IPython.display import display

from rwkv_lab.bench import figures
from rwkv_lab.bench.comparison import COLUMNS, OURS, Floors, Row, cells
from rwkv_lab.bench.growth import measure_growth
from rwkv_lab.bench.loading import measure_loading
from rwkv_lab.bench.machine import describe_machine, floors_are_compiled, watched
from rwkv_lab.bench.operators import OPERATORS, Shape, measure_operators
from rwkv_lab.bench.peers import parse_peers
from rwkv_lab.bench.speed import Plan, measure_speed
from rwkv_lab.checkpoint import FileFacts, Layout, file_facts, open_checkpoint
from rwkv_lab.checkpoint.whole_model import whole_model
from rwkv_lab.checks import Check, NotApplicable
from rwkv_lab.dtypes import to_dtype
from rwkv_lab.machine import cores
from rwkv_lab.model.device import parse_device
from rwkv_lab.progress import human_bytes, human_seconds
from rwkv_lab.text import counted
from rwkv_lab.wkv import backends
from rwkv_lab.workbench.estimate import figure_seconds, forward_seconds, in_words, memory_in_words
from rwkv_lab.workbench.parameters import input_path
from rwkv_lab.workbench.run import Run
from rwkv_lab.workbench.steps import Step
from rwkv_lab.workbench.tables import Table

_LOADS = 2  # at most, since each starts a process that imports torch
_QUIET = 0.2  # cores that other processes may use before figures are doubted
_GROWTH = (1, 4, 16)  # contexts, in the longest of the prompts
_SAMPLE, _START = 0.5, 5.0  # seconds: of a sample of decoding, and of a process that imports torch
_FLOORS = 0.5  # seconds of measuring, once, what the machine allows
_COMPUTES_IN = {"int8": "fp32", "int4": "fp32"}  # weights are packed, activations are not
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1, "int4": 0.6}  # of a weight


@dataclass
class Measured:
    """The model that is measured, and what has been measured so far."""

    path: Path
    layout: Layout
    plan: Plan
    rows: list[Row] = field(default_factory=list)
    floors: Floors = field(default_factory=dict)


def preview(run: Run) -> None:
    """Show what would be measured and about how long each part takes, and note nothing.

    Raises:
        RwkvLabError: as `load`.
    """
    facts, layout, values = _from_header(run)
    display(_plan_table(run, _plan_of(run), facts, layout, values))


def _from_header(run: Run) -> tuple[FileFacts, Layout, int]:
    """(the model's file, its layout, the number of its values)."""
    path = input_path(run.config.model)
    with open_checkpoint(path) as ck:
        layout = whole_model(ck)
        parse_device(run.config.device)
        return file_facts(ck), layout, sum(t.numel for t in ck.info.values())


def _plan_of(run: Run) -> Plan:
    config = run.config
    return Plan(
        dtypes=tuple(config.dtypes),
        lengths=tuple(config.lengths),
        batches=tuple(config.batches),
        rounds=config.rounds,
        device=config.device,
        peers=tuple(parse_peers(config.peers)),
    )


def _plan_table(run: Run, plan: Plan, facts: FileFacts, layout: Layout, values: int) -> Table:
    """What each cell measures, and about how long it takes on a CPU."""
    others = sum(peer.runs(dtype) for peer in plan.peers for dtype in plan.dtypes)
    engines, samples, longest = len(plan.dtypes) + others, plan.rounds + 1, max(plan.lengths)
    floors, figure = plan.rounds * _FLOORS, figure_seconds(1)
    size = (1, values, layout.n_layer)
    passes = sum(
        samples * forward_seconds(length, *size, to_dtype(_COMPUTES_IN.get(dtype, dtype)), "cpu") + floors
        for length in plan.lengths
        for dtype in plan.dtypes
    )
    decoding = (len(plan.batches) + 1) * (engines * samples * _SAMPLE + floors)  # once more beside a busy loop
    reference = forward_seconds(sum(plan.lengths), *size, torch.float64, "reference")
    rates = others * _START + decoding + passes * engines / len(plan.dtypes) + reference + 2 * figure
    names = run.config.backends or list(backends())
    loops = 3 * forward_seconds(longest, 1, 0, 1, torch.float32, "reference")  # one layer, forward and backward
    # Each backend is compared with the reference first; of the samples, those of the reference take the time.
    operators = len(OPERATORS) * ((len(names) + samples) * loops + floors) + figure
    loading = engines * min(plan.rounds, _LOADS) * _START + figure
    read = max(_GROWTH) * longest + len(_GROWTH) * samples * 512
    context = forward_seconds(read, *size, to_dtype(_COMPUTES_IN.get(plan.dtypes[0], plan.dtypes[0])), "cpu")
    context += samples * len(_GROWTH) * _SAMPLE + figure
    measured = f"rwkv_lab in {', '.join(plan.dtypes)}" + (
        f" and {counted(len(plan.peers), 'peer')}" if plan.peers else ""
    )
    parts = [
        ("decode and prefill", f"{measured}; batches {_list(plan.batches)}, prompts of {_list(plan.lengths)} tokens, "
         f"{counted(plan.rounds, 'round')}", rates),
        ("WKV operators", f"{', '.join(names)}, {counted(longest, 'token')}", operators),
        ("loading", f"{measured}; each in processes of its own", loading),
        ("along the context", f"up to {counted(max(_GROWTH) * longest, 'token')}", context),
    ]  # fmt: skip
    total = sum(seconds for *_, seconds in parts)
    rows = [("model", f"{facts.path.name}, {human_bytes(facts.bytes)}: {layout}", "")]
    rows += [(part, what, f"about {human_seconds(max(seconds, 1))}") for part, what, seconds in parts]
    # At a time: the reference in float64, or all dtypes beside each other.
    needed = values * max(8, sum(_BYTES[dtype] for dtype in plan.dtypes))
    rows += [("memory", memory_in_words(needed), ""), ("in all", in_words(total), "")]
    rows += [] if plan.device == "cpu" else [("device", f"{plan.device}: the times are those of a CPU", "")]
    return Table("The plan", ("part", "what", "time"), rows)


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def load(run: Run) -> Measured:
    """Say what is measured, on which machine, beside whom, and about how long it takes.

    Raises:
        RwkvLabError: the file cannot be opened, is no whole model, or the device is not there.
    """
    run.begin_again()
    facts, layout, values = _from_header(run)
    path, plan = facts.path, _plan_of(run)
    run.record.inputs = [facts]
    display(_plan_table(run, plan, facts, layout, values))
    described = describe_machine()
    run.record.metrics |= {"layout": str(layout), "machine": described}
    threads = counted(described["threads"], "thread")
    run.page.headline = f"{path.name}, an RWKV-{layout.version}, on {described['cpu']}."
    run.page.facts = [
        ("model", f"{path.name}, {human_bytes(facts.bytes)}: {layout}"),
        ("machine", f"{described['cpu']}, {threads} on {counted(described['cores'], 'core')}"),
        ("versions", f"Python {described['python']}, torch {described['torch']}, {described['system']}"),
        ("beside", ", ".join(peer.name for peer in plan.peers) or "no peer: none is installed or named"),
        ("waiting threads", f"{described['wait policy']}; of peers: {described['wait policy of peers']}"),
        ("floors", "measured in the same rounds" + ("" if floors_are_compiled() else ", by torch: no C++ compiler")),
    ]
    display(Table("What is measured", ("", ""), run.page.facts))
    return Measured(path, layout, plan)


def measure_rates(run: Run, measured: Measured) -> None:
    """Decode and prefill rates beside the peers; answers are compared first."""
    with run.timed("rates"), watched() as load:
        rows, floors = measure_speed(measured.path, measured.path.name, measured.plan)
    _note(run, measured, rows, floors, "Rates")
    run.page.summary = _summary(rows) + _of_load(load.other_load)


def measure_wkv(run: Run, measured: Measured) -> None:
    """The operators at the model's own sizes, on every backend."""
    layout, config = measured.layout, run.config
    size = layout.head_size or 64
    heads = layout.n_head or max(layout.dim_att // size, 1)
    shape = Shape(length=max(config.lengths), heads=heads, head_size=size)
    with run.timed("wkv"):
        names = config.backends or list(backends())
        rows, floors = measure_operators(shape, names, config.rounds, config.device)
    _note(run, measured, rows, floors, "The WKV operators")


def measure_memory(run: Run, measured: Measured) -> None:
    """What loading takes, in processes of their own."""
    with run.timed("loading"):
        plan = measured.plan
        rows = measure_loading(measured.path, measured.path.name, plan.dtypes, min(plan.rounds, _LOADS), plan.peers)
    _note(run, measured, rows, {}, "Loading")


def measure_context(run: Run, measured: Measured) -> None:
    """Time per token and memory along a long context."""
    plan = measured.plan
    contexts = [factor * max(plan.lengths) for factor in _GROWTH]
    with run.timed("growth"):
        rows = measure_growth(
            measured.path, measured.path.name, plan.dtypes[0], contexts, plan.rounds, device=plan.device
        )
    _note(run, measured, rows, {}, "Along the context")


def show_verdict(run: Run, measured: Measured) -> None:
    """A check for everything of ours that was compared: without agreement there is no rate, and the run fails."""
    peers = {peer.name for peer in measured.plan.peers}
    run.record.checks = []
    for row in measured.rows:
        name = f"{row.job}, {row.subject}, {_size(row)}, {row.name}: answers beside the reference"
        if row.agreement is not None and row.engine not in peers:
            agreement = row.agreement
            run.record.checks.append(Check(name, _digits(agreement.error), agreement.limit, agreement.passed))
        elif row.problem:
            run.record.checks.append(NotApplicable(name, row.problem))
    for check in run.record.checks:
        print(check)


def _summary(rows: Sequence[Row]) -> str:
    """Our rates of decoding and prefill in the first dtype, as far as they were measured."""
    found = []
    for job in ("decode", "prefill"):
        ours = next((row for row in rows if row.job == job and row.engine == OURS and row.samples), None)
        if ours is not None:
            found.append(f"{job} {ours.median:,.0f} {ours.unit} ({ours.dtype}, {_size(ours)})")
    words = "; ".join(found)
    return f"{words[:1].upper()}{words[1:]}." if found else "No rate was measured."


def _size(row: Row) -> str:
    return counted(row.size, "sequence" if row.job.startswith("decode") else "token")


def _of_load(cores_of_others: float) -> str:
    """What other processes mean for the rates; "" where they hardly ran."""
    if cores_of_others < _QUIET:
        return ""
    return (
        f" Other processes used {cores_of_others:.1f} of {counted(cores(), 'core')} meanwhile: the rates are too low, "
        "and ratios between them are not to be trusted."
    )


def _note(run: Run, measured: Measured, rows: Sequence[Row], floors: Floors, title: str) -> None:
    """Rows into result and report, as a table and as the figures that these rows are for."""
    measured.rows += rows
    for name, samples in floors.items():
        measured.floors.setdefault(name, []).extend(samples)
    run.record.metrics["rows"] = [row.as_dict() for row in measured.rows]
    run.record.metrics["floors"] = measured.floors
    note = "Medians over rounds in which all take turns. A row whose answers disagree with the reference has no rate."
    table = Table(title, COLUMNS, [cells(row) for row in rows], note)
    run.page.tables.append(table)
    display(table)
    facts = dict(run.page.facts)
    subtitle = f"{facts['model']}\n{facts['machine']}; {facts['versions']}"
    for name, (heading, caption, figure) in figures.all_figures(rows, floors, subtitle).items():
        run.show_figure(name, heading, caption, figure)


def _digits(x: float) -> float:
    return float(f"{x:.2g}") if math.isfinite(x) else x


STEPS = (
    Step(load, "measured"),
    Step(measure_rates),
    Step(measure_wkv),
    Step(measure_memory),
    Step(measure_context),
    Step(show_verdict),
)
MUST_PASS = True
