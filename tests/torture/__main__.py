"""Run parts of the suite and print a row for each; see `torture`."""

import argparse
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from rwkv_lab.machine import cpu_name
from torture import endurance, kills, mutations

# Part -> (what it does, how much of it is a share of 1).
PARTS = {
    "mutations": (mutations.run, 10_000),
    "kills": (kills.run_kills, 200),
    "disk": (kills.run_full_disks, 200),
    "tokens": (endurance.run_tokens, 100_000),
    "notebooks": (endurance.run_notebooks, 100),
}


def main(words: list[str] | None = None) -> int:
    """0 where nothing was found."""
    parser = argparse.ArgumentParser(prog="python -m torture")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all unless some are named")
    parser.add_argument("--share", type=float, default=1.0, help="of the full amount")
    parser.add_argument("--seed", type=int, default=0, help="another one gives other damage and other moments")
    given = parser.parse_args(words)
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    print(f"{cpu_name()}, {date.today()}\n\n| part | what | seconds | found |\n|---|---|---|---|")
    found = 0
    for name in given.parts or PARTS:
        run, whole = PARTS[name]
        with tempfile.TemporaryDirectory() as folder:
            start = time.monotonic()
            done, wrong = run(max(1, round(whole * given.share)), Path(folder), given.seed)
        print(f"| {name} | {done} | {time.monotonic() - start:.0f} | {len(wrong) or 'nothing'} |", flush=True)
        for line in wrong:
            print(f"  {line}", file=sys.stderr)
        found += len(wrong)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
