"""What the cells of peft.ipynb call, in their order. Each shows its part, and notes it for result and report."""

from collections import Counter
from pathlib import Path

import torch
from IPython.display import display

from rwkv_lab.analysis.ablation import CTX_LEN, measure_ablation
from rwkv_lab.analysis.changes import Changes, compare_directions, count_values, measure_changes
from rwkv_lab.analysis.state_effects import measure_state_effect, state_heads
from rwkv_lab.analysis.texts import Reading, held_out_excerpts
from rwkv_lab.analysis.tuning import Tuning, note_on_base, open_tuning, select_tensors, tensor_part
from rwkv_lab.checkpoint import file_facts
from rwkv_lab.checks import Check, NotApplicable
from rwkv_lab.names import split_block
from rwkv_lab.plotting import layer_map
from rwkv_lab.text import counted
from rwkv_lab.train import Measurement, TokenCorpus
from rwkv_lab.workbench.estimate import (
    figure_seconds,
    forward_seconds,
    in_words,
    loading_seconds,
    memory_in_words,
    svd_seconds,
)
from rwkv_lab.workbench.parameters import input_path
from rwkv_lab.workbench.peft import figures
from rwkv_lab.workbench.run import Run
from rwkv_lab.workbench.steps import Step, show_verdict
from rwkv_lab.workbench.tables import Table

_TEXTS, _TOKENS = 16, 128  # beginnings of texts that a state is followed along, and tokens of each
_FIGURES = 8  # of what applies to a tuning
_EXCERPTS, _EXCERPT_BYTES = 16, 512  # of held-out text, for the ablation


def preview(run: Run) -> None:
    """Show what would be measured, and about how long it takes, and note nothing.

    Raises:
        RwkvLabError: as `describe`.
    """
    with open_tuning(*_files(run)) as t:
        _reading(run).check(t.layout.vocab_size)
        display(Table("The plan", ("", ""), _plan(run, t)))


def _plan(run: Run, t: Tuning) -> list[tuple[str, object]]:
    """What is measured, from headers: the singular values of fine-tuned matrices and the ablation take the time."""
    names = select_tensors(t.names(), run.config.targets)
    values, layout = sum(info.numel for info in t.base.info.values()), t.layout
    shapes = [tuple(t.base.info[name].shape) for name in names if name in t.base.info]
    matrices = [(s[-2], s[-1]) for s in shapes if len(s) >= 2 and 1 not in s[-2:]]
    spectra = 0.0 if t.adapter else sum(n * 2 * svd_seconds(shape) for shape, n in Counter(matrices).items())
    layers = {inside[0] for name in names if (inside := split_block(name))}
    groups = len(layers) + len({tensor_part(name) for name in names})
    read = (groups + 3) * _EXCERPTS * _EXCERPT_BYTES
    also = 2 * _reading(run).tokens(layout.vocab_size)  # all that is held out, with the tuning and without it
    reading = loading_seconds(t.base.bytes) + figure_seconds(_FIGURES)
    reading += forward_seconds(round(read + also), 1, values, layout.n_layer, torch.float32, "cpu")
    return [
        ("base", f"{t.base.path.name}: {layout}"),
        ("tuned", f"{t.tuned.path.name}: {t}"),
        (
            "spectra",
            f"{counted(len(matrices), 'matrix', 'matrices')} of {counted(len(names), 'tensor')} that may have changed",
        ),
        ("ablation", f"{counted(groups, 'group')} of tensors, {read:,} bytes of text, beside all that is held out"),
        ("memory", memory_in_words(2 * 4 * values)),
        ("time", in_words(spectra + reading)),
    ]


def describe(run: Run) -> list[str]:
    """Say what was tuned and how much of the model that trains. Returns the changed tensors that `targets` chooses.

    Raises:
        RwkvLabError: a file that cannot be opened, is no tuning, does not go with the base, or changes nothing;
            a pattern in `targets` that matches nothing; no such text.
    """
    run.begin_again()
    with run.timed("open"), open_tuning(*_files(run)) as t:
        run.record.inputs = [file_facts(t.base), file_facts(t.tuned)]
        _reading(run).check(t.layout.vocab_size)  # refused now, not when it is read
        display(Table("The plan", ("", ""), _plan(run, t)))
        changed = t.changed_names()
        names = select_tensors(changed, run.config.targets)
        counts = count_values(t, changed)
        trained, frozen = counts.trained, counts.frozen
        name = t.tuned.path.name
        run.page.headline = f"{name}, {t}, trains {trained:,} values; {frozen:,} of the base stay frozen."
        run.page.facts = [
            ("base", f"{t.base.path.name}: {t.layout}"),
            ("tuned", f"{name}: {t}"),
            ("trained", f"{trained:,} values, {trained / (trained + frozen):.3%} of all"),
            ("frozen", f"{frozen:,} values"),
            ("tensors changed", f"{len(changed)} of {len(t.base.info)}, {len(names)} of them measured here"),
        ]
        if note := note_on_base(t):
            run.page.facts.append(("trained on another base", note))
            run.record.notes.append(note)
        if t.quant != "none":
            run.page.facts.append(("base in training", f"stored as {t.quant}, and taken as that here"))
        if t.adapter and t.adapter.residual_base:
            run.page.facts.append(("PiSSA", "without its start: the base is taken for what the SVD left over"))
        run.record.metrics |= {"kind": t.tuned.kind, "method": t.method, "trained": trained, "frozen": frozen}
        rows = [(part, *row, row[1] / row[0] if row[0] else "new") for part, row in counts.parts.items()]
        table = Table("How much is trained", ("part", "values in the base", "values trained", "share"), rows)
        run.page.tables = [table]
        figure = figures.counts_by_part(counts.parts, _subtitle(run))
    display(Table(run.page.headline, ("", ""), run.page.facts), table)
    caption = "Values of each part of the base, and how many were trained to change it; a logarithmic scale."
    run.show_figure("counts", "How much is trained, and where?", caption, figure)
    return names


def measure(run: Run, names: list[str]) -> Changes:
    """The singular values of every changed matrix, and how far other tensors moved.

    Raises:
        NumericsError: NaN or Inf in a matrix.
    """
    with run.timed("spectra"), open_tuning(*_files(run)) as t:
        changes = measure_changes(t, names)
    spectra, rank = changes.spectra, run.config.rank
    run.record.checks += changes.checks
    run.record.metrics["matrices"] = {s.name: s.metrics(rank) for s in spectra}
    run.record.metrics["others"] = changes.others
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
    if not rows and changes.heads:
        _show_heads_in_numbers(run, changes)
        return changes
    if not rows:
        print("No matrix of the base is changed: there are no singular values to show.")
        return changes
    note = "Δ is what tuning adds to W; σ₁ is the largest singular value. Ranks and shares are of ‖Δ‖²."
    table = Table("What changed, matrix by matrix", (*columns, f"kept at rank {rank}"), rows, note)
    run.page.tables.append(table)
    display(table)
    return changes


def show_energy(run: Run, changes: Changes) -> None:
    """Two heat maps over layers and matrices: how much of each changed, and how far that can move its input."""
    frobenius = {s.name: s.relative for s in changes.spectra} | {n: x for n, x in changes.others.items() if x > 0}
    if changes.heads:
        _show_head_sizes(run)
    if not frobenius:
        if not changes.heads:
            print("Nothing that the base has is changed, so that there is nothing to relate to it.")
        return
    layers = 1 + max((inside[0] for n in frobenius if (inside := split_block(n))), default=-1)
    title = "Where does the change sit? ‖Δ‖ / ‖W‖ of every tensor"
    figure = layer_map(frobenius, layers, title, _subtitle(run), "Frobenius norm of the change over the base's")
    caption = "All entries count the same: how much of the tensor is new. Grey did not change or was not measured."
    run.show_figure("energy_frobenius", title, caption, figure)
    spectral = {s.name: s.relative_spectral for s in changes.spectra}
    if not spectral:
        return
    title = "Where can it turn a layer's output most? σ₁(Δ) / σ₁(W) of every matrix"
    figure = layer_map(spectral, layers, title, _subtitle(run), "largest singular value of the change over the base's")
    caption = "The direction that changed most, beside the one in which the base is strongest."
    run.show_figure("energy_spectral", title, caption, figure)


def show_spectra(run: Run, changes: Changes) -> None:
    """Singular values by size, effective rank by layer and matrix, and the ranks that keep 90 and 99 %."""
    spectra = changes.spectra or changes.heads
    if not spectra:
        print("No matrix of the base is changed: there is no spectrum and no rank to choose.")
        return
    rank, subtitle = run.config.rank, _subtitle(run)
    figure = figures.spectra_by_matrix(spectra, rank, subtitle)
    caption = "A line per layer, the later the layer the stronger its colour; zeros are left out."
    run.show_figure("spectra", "In how many directions does each matrix change?", caption, figure)
    figure = figures.ranks_by_matrix(spectra, subtitle)
    caption = "Bars are means over the layers, lines go from the least to the largest; 90 and 99 % are of ‖Δ‖²."
    run.show_figure("ranks", "Which rank would have been enough?", caption, figure)
    if not changes.spectra:
        return
    layers = 1 + max((inside[0] for s in spectra if (inside := split_block(s.name))), default=-1)
    title = "How many directions carry the change? Effective rank of Δ"
    figure = layer_map({s.name: s.effective_rank for s in spectra}, layers, title, subtitle, "effective rank")
    caption = "The effective rank is e to the entropy of the singular values' shares: r where r of them are equal."
    run.show_figure("effective_rank", title, caption, figure)


def compare(run: Run, names: list[str]) -> dict[str, float]:
    """The cosine between this tuning's change and the second's, of every tensor that both change.

    Raises:
        RwkvLabError: of the second file, as `describe`.
    """
    if not run.config.second:
        print("second is empty: there is no other tuning to compare with.")
        return {}
    second = input_path(run.config.second)
    base, tuned, options = _files(run)
    with (
        run.timed("compare"),
        open_tuning(base, tuned, options) as one,
        open_tuning(base, second, run.config.tuning_options(1), direction_only=True) as two,
    ):
        run.record.inputs.append(file_facts(two.tuned))
        found = compare_directions(one, two, names)
    cosines = found.cosines
    run.page.facts.append(("compared with", f"{second.name}: {two}"))
    run.record.metrics["cosines"] = cosines
    if not cosines:
        print(f"{second.name} changes no tensor that {tuned.name} changes, too: they have nothing to compare.")
        return {}
    title = "Do the two tunings pull the same way? Cosine of their changes"
    figure = figures.cosine_map(cosines, title, f"{_subtitle(run)}\nbeside {second.name}: {two}")
    caption = f"1 the same direction, −1 opposite; chance alone gives about ±{max(found.chance.values()):.1g} or less."
    run.show_figure("cosines", title, caption, figure)
    return cosines


def _show_heads_in_numbers(run: Run, changes: Changes) -> None:
    """The matrices of a tuned state, which the base has not, in the place of matrices of the base."""
    rank, columns = run.config.rank, ("head", "shape", "‖Δ‖", "σ₁(Δ)", "effective rank", "for 90 %", "for 99 %")
    rows = [
        (
            _head_in_words(s.name),
            " × ".join(map(str, s.shape)),
            s.frobenius,
            s.spectral,
            s.effective_rank,
            s.rank_for(0.9),
            s.rank_for(0.99),
            s.share_of(rank) if s.frobenius else "zeros",
        )
        for s in changes.heads
    ]
    note = "Every head starts from zeros in the base, so Δ is the tuned state itself. Ranks and shares are of ‖Δ‖²."
    table = Table("The tuned state, head by head", (*columns, f"kept at rank {rank}"), rows, note)
    run.page.tables.append(table)
    display(table)


def _head_in_words(name: str) -> str:
    """`layer 0, head 1` for the head of a tuned state, whose name is `blocks.0.state.head 1`."""
    layer, head = split_block(name) or ("?", name)
    return f"layer {layer}, {head.removeprefix('state.')}"


def _show_head_sizes(run: Run) -> None:
    """How large each head of a tuned state is, and in how many directions it lies."""
    with open_tuning(*_files(run)) as t:
        found, name = state_heads(t), t.tuned.path.name
    caption = (
        "The effective rank is e to the entropy of the singular values' shares: 1 where a head holds a single pair of "
        "value and key."
    )
    title = "Which heads hold the state, and in how many directions?"
    figure = figures.head_map(found.norms.numpy(), found.effective_ranks.numpy(), found.full_rank, name)
    run.show_figure("head_sizes", title, caption, figure)


def show_heads(run: Run) -> None:
    """Every head of a tuned state as a picture."""
    with run.timed("heads"), open_tuning(*_files(run)) as t:
        if not t.state_names:
            print(f"{t.tuned.path.name} holds no tuned state (time_state): there are no heads to show.")
            return
        found, name = state_heads(t), t.tuned.path.name
    named = zip(found.state.shape, ("layers", "heads", "values", "keys"), strict=True)
    subtitle = f"{name}: {', '.join(f'{n} {what}' for n, what in named)}"
    run.record.metrics["state"] = {
        "norm": found.norms.tolist(),
        "effective_rank": found.effective_ranks.tolist(),
    }
    caption = "One scale for all; the colours end at the 99.5th percentile of the absolute values."
    title = "What did tuning write into each head's state?"
    run.show_figure("heads", title, caption, figures.state_heads(found.state.numpy(), subtitle))


def show_effect(run: Run) -> None:
    """The effect of a tuned state by token position: how far predictions move, and what that gains."""
    with run.timed("effect"), open_tuning(*_files(run)) as t:
        if not t.state_names:
            print(f"{t.tuned.path.name} holds no tuned state (time_state): there is no effect to follow.")
            return
        corpus, name = _reading(run).load(run.config.data), t.tuned.path.name
        found = measure_state_effect(t, corpus, _TEXTS, _TOKENS, run.config.tokenizer)
    run.record.checks += found.checks
    if not found.measured:
        print(found.checks[-1])
        return
    run.record.metrics["state_effect"] = {
        "kl_bits": found.kl_bits.mean(0).tolist(),
        "bits_saved": found.bits_saved.mean(0).tolist(),
        "tokens": found.source,
    }
    subtitle = f"{name}; {_TEXTS} texts of {_TOKENS} tokens, {found.source}"
    figure = figures.effect_by_position(found.kl_bits.numpy(), found.bits_saved.numpy(), subtitle)
    caption = (
        "Above: the divergence of the prediction with the state from that without it. Below: how many bits fewer the "
        "next token takes with the state, as means over spans that double; below zero the state does harm."
    )
    title = "What is the effect of the tuned state by token position, and does it help?"
    run.show_figure("state_effect", title, caption, figure)


def show_ablation(run: Run, names: list[str]) -> None:
    """Bits per byte with everything, with nothing, and without each layer's and each kind of matrix's tuning."""
    with run.timed("ablation"), open_tuning(*_files(run)) as t:
        reading = _reading(run)
        corpus, tokenizer = reading.load(run.config.data), reading.tokenizer_of(t.layout.vocab_size)
        known = tokenizer is not None or not isinstance(corpus, TokenCorpus)
        text = held_out_excerpts(corpus, _EXCERPTS, _EXCERPT_BYTES, tokenizer) if known else b""
        found = measure_ablation(t, names, text, reading=reading, corpus=corpus)
    run.record.checks += found.checks
    if not found.measured or found.with_tuning is None or found.without is None:
        _say_unread(run, found.checks[-1])
        return
    tuned, base, without = found.tuned, found.base, (found.layers, found.parts)
    _note_bits(run, found.with_tuning, found.without)
    run.record.metrics["ablation"] = {"layers": found.layers, "parts": found.parts, "with": tuned, "without": base}
    subtitle = (
        f"{run.page.facts[1][1]}\n{run.page.summary}\nBars: of {len(text):,} bytes, excerpts from all over that text, "
        f"in windows of {CTX_LEN} tokens"
    )
    costs = [{label: bits - tuned for label, bits in group.items()} for group in without]
    figure = figures.ablation_costs(costs, base - tuned, subtitle)
    title = "Which layers' tuning matters?"
    caption = "Tensors are set back to the base's, the others stay tuned. Losses need not add up: layers work together."
    run.show_figure("ablation", title, caption, figure)
    rows = [("nothing", 0.0)] + [(n, b - tuned) for group in without for n, b in group.items()]
    columns = ("without", "bits per byte more than with all of it")
    note = f"Of {len(text):,} bytes, excerpts from all over the held-out text."
    table = Table("Held-out text without parts of the tuning", columns, [*rows, ("all of it", base - tuned)], note)
    run.page.tables.append(table)
    display(table)


def _note_bits(run: Run, tuned: Measurement, base: Measurement) -> None:
    """The two numbers that matter, in result and report."""
    run.record.metrics["bits_per_byte"] = {"with": tuned.bits, "without": base.bits} | {
        "bytes": tuned.size,
        "window": tuned.window,
    }
    run.page.summary = (
        f"{tuned.bits:.3f} bits per byte of held-out {Path(run.config.data).name} with the tuning, {base.bits:.3f} "
        f"without: {tuned.described}."
    )
    run.page.facts.append(("held-out text", run.page.summary))
    print(run.page.summary)


def _say_unread(run: Run, why: Check | NotApplicable) -> None:
    """Why no text was read, in the report too."""
    reason = why.reason if isinstance(why, NotApplicable) else str(why)
    run.page.facts.append(("held-out text", reason))
    run.page.summary = reason
    print(reason)


def _reading(run: Run) -> Reading:
    return run.config.reading([run.config.data])


def _files(run: Run) -> tuple:
    return input_path(run.config.base), input_path(run.config.adapter), run.config.tuning_options(0)


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
