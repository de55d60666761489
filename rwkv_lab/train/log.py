"""The log of a training: `log.csv`, a row per step, and `log.json`, the settings and what came of them."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rwkv_lab.checkpoint.write import write_text
from rwkv_lab.errors import OutputError

COLUMNS: tuple[str, ...] = ("step", "loss", "lr", "grad_norm", "tokens", "held_out", "seconds")


def check_log_folder(folder: Path) -> None:
    """Refuse a folder that cannot be made or is a file.

    Raises:
        OutputError: names it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OutputError(f"the log folder {folder} cannot be made: {e.strerror or e}") from e


def log_files(folder: Path) -> list[Path]:
    """The files that `write_log` writes."""
    return [folder / "log.csv", folder / "log.json"]


def write_log(folder: Path, rows: Sequence[Mapping[str, object]], summary: Mapping[str, object]) -> None:
    """Write both files, in place of older ones.

    Args:
        rows: by `COLUMNS`: loss in bits per token, held_out in bits per byte where it was measured.

    Raises:
        OutputError: they cannot be written.
    """
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    as_table, as_json = log_files(folder)
    write_text(as_table, table.getvalue(), overwrite=True)
    write_text(as_json, json.dumps({**summary, "steps": list(rows)}, indent=1) + "\n", overwrite=True)
