"""Tables of export.ipynb: what came out, how tensors are stored, what was tried to write the graphs."""

import csv
import io
from collections.abc import Sequence

from rwkv_lab.export.result import ExportResult
from rwkv_lab.progress import human_seconds
from rwkv_lab.text import counted
from rwkv_lab.workbench.export.exported import Exported
from rwkv_lab.workbench.tables import Table

STORAGE = "storage.csv"  # beside the report


def results_table(results: Sequence[Exported]) -> Table:
    """Sizes, agreement, speed and verdict of every level."""
    rows = [
        (
            one.label,
            f"{one.result.original_size_mb:.4g} -> {one.result.optimized_size_mb:.4g} MB",
            _number(one.measured.get("kl_mean"), "{:.3g}"),
            _number(one.measured.get("top1"), "{:.1%}"),
            _number(one.measured.get("perplexity_ratio"), "{:.4f}"),
            _number(one.result.inference_speed_ms, "{:.2f}"),
            human_seconds(sum(one.result.seconds.values())),
            _verdict(one.result),
        )
        for one in results
    ]
    columns = ("weights", "size", "KL, nats per token", "same likeliest token", "perplexity ratio", "ms per token")
    return Table("What was exported", (*columns, "took", "verdict"), rows)


def _verdict(result: ExportResult) -> str:
    """The verdict in a word, as the report counts: of what was checked, warnings beside it."""
    word = result.verdict.partition(":")[0]
    if word != "WARN" or result.validation_passed is None:
        return word
    return f"PASS, {counted(len(result.warnings), 'warning')}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def tables_of_exports(results: Sequence[Exported]) -> list[Table]:
    """How weights are stored, what was left out, and the attempts where one was not enough."""
    found = [_storage(results), _left_out(results), _attempts(results)]
    return [table for table in found if table.rows]


def storage_as_csv(results: Sequence[Exported]) -> str:
    """A line for every tensor of every level: how it is stored."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("level", "tensor", "stored as"))
    for one in results:
        for stored, entry in one.result.storage.items():
            writer.writerows((one.level, name, stored) for name in entry["tensors"])
    return text.getvalue()


def _storage(results: Sequence[Exported]) -> Table:
    rows = [
        (one.label, stored, len(entry["tensors"]), entry["original_bytes"], entry["bytes"])
        for one in results
        for stored, entry in one.result.storage.items()
    ]
    note = f"What is in fp32 is not quantised. Tensor by tensor: {STORAGE}, beside the report."
    return Table("How weights are stored", ("weights", "stored as", "tensors", "bytes before", "bytes"), rows, note)


def _left_out(results: Sequence[Exported]) -> Table:
    names = dict.fromkeys(name for one in results for name in one.result.left_out)
    return Table("Tensors that no layer reads, left out", ("tensor",), [(name,) for name in names])


def _attempts(results: Sequence[Exported]) -> Table:
    rows = [
        (one.label, place, attempt.why, round(attempt.seconds, 1), _first_line(attempt.error), "; ".join(attempt.lost))
        for one in results
        if len(one.result.attempts) > 1 or one.result.degraded
        for place, attempt in enumerate(one.result.attempts, 1)
    ]
    columns = ("weights", "attempt", "why", "seconds", "error", "lost")
    return Table("Attempts to write the graphs", columns, rows, "Each in a process of its own.")


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]
