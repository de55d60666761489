"""What the cells of peft.ipynb call, in their order. Each shows its part, and notes it for result and report.

The effect of a tuned state, and the ablation of a tuning's parts, stand in `state_effects` and `ablation`.
"""

import math
from dataclasses import dataclass

from IPython.display import display

from rwkv_lab.analysis.spectra import Spectrum, adapter_spectra, cosine, model_spectra
from rwkv_lab.analysis.texts import held_out_text
from rwkv_lab.analysis.tuning import TunedFile, chosen, open_tuned, part_of
from rwkv_lab.checkpoint import file_facts
from rwkv_lab.checks import Check
from rwkv_lab.names import split_block
from rwkv_lab.plotting import layer_map
from rwkv_lab.train import CORPORA
from rwkv_lab.workbench.parameters import input_path
from rwkv_lab.workbench.peft import figures
from rwkv_lab.workbench.peft.ablation import show_ablation
from rwkv_lab.workbench.peft.state_effects import show_effect, show_heads
from rwkv_lab.workbench.run import Run
from rwkv_lab.workbench.steps import Step
from rwkv_lab.workbench.tables import Table

_AGREE = 1e-6  # between two ways to ‖Δ‖ in float64, where Δ is as small as a rounding of float32 in W


@dataclass(frozen=True)
class Changes:
    """What was found: of matrices their spectra, of other tensors of the base ‖Δ‖ / ‖W‖, in its order."""

    spectra: list[Spectrum]
    others: dict[str, float]  # NaN beside zeros


def describe(run: Run) -> list[str]:
    """Say what was tuned and how much of the model that trains. Returns the changed tensors that `targets` chooses.

    Raises:
        RwkvLabError: a file that cannot be opened, is no tuning, does not go with the base, or changes nothing;
            a pattern in `targets` that matches nothing; no such text.
    """
    run.begin_again()
    if run.config.data not in CORPORA:
        held_out_text(run.config.data)  # what is wrong with it is said now, not when it is read
    with run.timed("open"), open_tuned(*_files(run)) as t:
        run.record.inputs = [file_facts(t.base), file_facts(t.ck)]
        changed = t.changed()
        names = chosen(changed, run.config.targets)
        counts = _counts(t, changed)
        trained = sum(row[1] for row in counts.values())
        replaced = sum(t.count(n) for n in changed if n in t.whole and n in t.base.info)
        frozen = sum(row[0] for row in counts.values()) - replaced
        name = t.ck.path.name
        run.page.headline = f"{name}, {_in_words(t)}, trains {trained:,} values; {frozen:,} of the base stay frozen."
        run.page.facts = [
            ("base", f"{t.base.path.name}: {t.layout}"),
            ("tuned", f"{name}: {_in_words(t)}"),
            ("trained", f"{trained:,} values, {trained / (trained + frozen):.3%} of all"),
            ("frozen", f"{frozen:,} values"),
            ("tensors changed", f"{len(changed)} of {len(t.base.info)}, {len(names)} of them measured here"),
        ]
        if t.quant != "none":
            run.page.facts.append(("base in training", f"stored as {t.quant}, and taken as that here"))
        if t.adapter and t.adapter.residual_base:
            run.page.facts.append(("PiSSA", "without its start: the base is taken for what the SVD left over"))
        run.record.metrics |= {"kind": t.ck.kind, "method": t.method, "trained": trained, "frozen": frozen}
        rows = [(part, *row, row[1] / row[0] if row[0] else math.nan) for part, row in counts.items()]
        table = Table("How much is trained", ("part", "values in the base", "values trained", "share"), rows)
        run.page.tables = [table]
        figure = figures.counts_by_part(counts, _subtitle(run))
    display(Table(run.page.headline, ("", ""), run.page.facts), table)
    caption = "Values of each part of the base, and how many were trained to change it; a logarithmic scale."
    run.show_figure("counts", "How much is trained, and where?", caption, figure)
    return names


def measure(run: Run, names: list[str]) -> Changes:
    """The singular values of every changed matrix, and how far other tensors moved.

    Raises:
        NumericsError: NaN or Inf in a matrix.
    """
    with run.timed("spectra"), open_tuned(*_files(run)) as t:
        spectra = list(model_spectra(t.base, t.whole, set(names)))
        if t.adapter:
            spectra += adapter_spectra(t.base, t.adapter, set(names))
        place = {name.removesuffix(".weight"): i for i, name in enumerate(names)}
        spectra.sort(key=lambda s: place[s.name])
        matrices = {f"{s.name}.weight" for s in spectra}
        others = {n: _relative(t, n) for n in names if n in t.base.info and n not in matrices}
        apart = max((_apart(t, s) for s in spectra), default=None)
    if apart is not None:
        name = "‖Δ‖ from singular values, against Δ written out: largest relative difference"
        run.record.checks.append(Check(name, float(f"{apart:.1g}"), _AGREE, apart <= _AGREE))
    rank = run.config.rank
    run.record.metrics["matrices"] = {
        s.name: {
            "relative": s.relative,
            "relative_spectral": s.relative_spectral,
            "effective_rank": s.effective_rank,
            "rank_90": s.rank_for(0.9),
            "rank_99": s.rank_for(0.99),
            f"share_of_rank_{rank}": s.share_of(rank),
        }
        for s in spectra
    }
    run.record.metrics["others"] = others
    columns = ("matrix", "shape", "‖Δ‖", "‖Δ‖ / ‖W‖", "σ₁(Δ) / σ₁(W)", "effective rank", "for 90 %", "for 99 %")
    rows = [
        (
            s.name,
            " × ".join(map(str, s.shape)),
            s.frobenius,
            s.relative,
            s.relative_spectral,
            s.effective_rank,
            s.rank_for(0.9),
            s.rank_for(0.99),
            s.share_of(rank),
        )
        for s in spectra
    ]
    if not rows:
        print("No matrix of the base is changed: there are no singular values to show.")
        return Changes(spectra, others)
    note = "Δ is what tuning adds to W; σ₁ is the largest singular value. Ranks and shares are of ‖Δ‖²."
    table = Table("What changed, matrix by matrix", (*columns, f"kept at rank {rank}"), rows, note)
    run.page.tables.append(table)
    display(table)
    return Changes(spectra, others)


def show_energy(run: Run, changes: Changes) -> None:
    """Two heat maps over layers and matrices: how much of each changed, and how far that can move its input."""
    frobenius = {s.name: s.relative for s in changes.spectra} | {n: x for n, x in changes.others.items() if x > 0}
    if not frobenius:
        print("Nothing that the base has is changed, so that there is nothing to relate to it.")
        return
    layers = 1 + max((inside[0] for n in frobenius if (inside := split_block(n))), default=-1)
    title = "Where does the change sit? ‖Δ‖ / ‖W‖ of every tensor"
    figure = layer_map(frobenius, layers, title, _subtitle(run), "Frobenius norm of the change, of the base's")
    caption = "All entries count the same: how much of the tensor is new. Grey did not change or was not measured."
    run.show_figure("energy_frobenius", title, caption, figure)
    spectral = {s.name: s.relative_spectral for s in changes.spectra}
    if not spectral:
        return
    title = "Where can it turn a layer's output most? σ₁(Δ) / σ₁(W) of every matrix"
    figure = layer_map(spectral, layers, title, _subtitle(run), "largest singular value, of the base's")
    caption = "The direction that changed most, beside the one in which the base is strongest."
    run.show_figure("energy_spectral", title, caption, figure)


def show_spectra(run: Run, changes: Changes) -> None:
    """Singular values by size, effective rank by layer and matrix, and the ranks that keep 90 and 99 %."""
    spectra = changes.spectra
    if not spectra:
        print("No matrix of the base is changed: there is no spectrum and no rank to choose.")
        return
    rank, subtitle = run.config.rank, _subtitle(run)
    figure = figures.spectra_by_matrix(spectra, rank, subtitle)
    caption = "A line per layer, the last ones darkest; zeros are left out."
    run.show_figure("spectra", "In how many directions does each matrix change?", caption, figure)
    layers = 1 + max((inside[0] for s in spectra if (inside := split_block(s.name))), default=-1)
    title = "How many directions carry the change? Effective rank of Δ"
    figure = layer_map({s.name: s.effective_rank for s in spectra}, layers, title, subtitle, "effective rank")
    caption = "e to the entropy of the singular values' shares: r where r of them are equal."
    run.show_figure("effective_rank", title, caption, figure)
    figure = figures.ranks_by_matrix(spectra, subtitle)
    caption = "Bars are means over the layers, lines go from the least to the largest. Of ‖Δ‖²."
    run.show_figure("ranks", "Which rank would have been enough?", caption, figure)


def compare(run: Run, names: list[str]) -> dict[str, float]:
    """The cosine between this tuning's change and the second's, of every tensor that both change.

    Raises:
        RwkvLabError: of the second file, as `describe`.
    """
    if not run.config.second:
        print("second is empty: there is no other tuning to compare with.")
        return {}
    second = input_path(run.config.second)
    base, tuned, said = _files(run)
    with (
        run.timed("compare"),
        open_tuned(base, tuned, said) as one,
        open_tuned(base, second, run.config.said(1), direction_only=True) as two,
    ):
        run.record.inputs.append(file_facts(two.ck))
        both = set(two.changed())
        cosines = {n: cosine(one.delta(n), two.delta(n)) for n in names if n in both}
        chance = {n: 1 / math.sqrt(one.delta(n).numel()) for n in cosines}
    run.page.facts.append(("compared with", f"{second.name}: {_in_words(two)}"))
    run.record.metrics["cosines"] = cosines
    if not cosines:
        print(f"{second.name} changes no tensor that {tuned.name} changes, too: they have nothing to compare.")
        return {}
    title = "Do the two tunings pull the same way? Cosine of their changes"
    figure = figures.cosine_map(cosines, title, f"{_subtitle(run)}\nbeside {second.name}: {_in_words(two)}")
    caption = f"1 the same direction, −1 opposite; chance alone gives about ±{max(chance.values()):.1g} or less."
    run.show_figure("cosines", title, caption, figure)
    return cosines


def show_verdict(run: Run) -> None:
    """Print a PASS or FAIL line for each check."""
    for check in run.record.checks:
        print(check)


def _files(run: Run) -> tuple:
    return input_path(run.config.base), input_path(run.config.adapter), run.config.said(0)


def _counts(t: TunedFile, changed: list[str]) -> dict[str, tuple[int, int]]:
    """part -> (values in the base, values trained)."""
    counts: dict[str, tuple[int, int]] = {}
    trains = set(changed)
    for name in dict.fromkeys([*t.base.info, *changed]):
        there = t.base.info[name].numel if name in t.base.info else 0
        before, trained = counts.get(part_of(name), (0, 0))
        counts[part_of(name)] = before + there, trained + (t.count(name) if name in trains else 0)
    return counts


def _apart(t: TunedFile, s: Spectrum) -> float:
    """How far ‖Δ‖ is off, of ‖Δ‖ or, where that is tiny, of what a rounding in W comes to."""
    written = float(t.delta(f"{s.name}.weight").norm())
    return abs(written - s.frobenius) / (written + _AGREE * s.base_frobenius)


def _relative(t: TunedFile, name: str) -> float:
    before = float(t.before(name).norm())
    return float(t.delta(name).norm()) / before if before else math.nan


def _in_words(t: TunedFile) -> str:
    if t.method == "state":
        return "a tuned state"
    if t.method == "overlay":
        return "a fine-tune of the whole model" if t.ck.kind == "model" else "a fine-tune of a part of the model"
    ranks = sorted({target.rank for target in t.adapter.targets.values()})
    called = {"lora": "a LoRA", "pissa": "a PiSSA adapter", "miss": "a MiSS adapter"}[t.method]
    span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    return f"{called} of rank {span} on {len(t.adapter.targets)} matrices"


def _subtitle(run: Run) -> str:
    """Two facts: which tuning, of which base."""
    facts = dict(run.page.facts)
    return f"{facts['tuned']}\non {facts['base']}"


STEPS = (
    Step(describe, "names"),
    Step(measure, "changes"),
    Step(show_energy),
    Step(show_spectra),
    Step(compare, "cosines"),
    Step(show_heads),
    Step(show_effect),
    Step(show_ablation),
    Step(show_verdict),
)
MUST_PASS = True
