"""Merge, check what was written, and see what the merge changed: in the weights, and in what the model predicts.

python examples/merge_and_compare.py [BASE TUNED [OUT]]
"""

import sys
import tempfile
from pathlib import Path

from rwkv_lab import merge, open_checkpoint
from rwkv_lab.analysis.behaviour import compare_behaviour
from rwkv_lab.analysis.deltas import deltas
from rwkv_lab.merge import verify_merge
from rwkv_lab.train import demo_base, demo_state


def main(base: str = "", tuned: str = "", out: str = "") -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = base or demo_base(), tuned or demo_state(), out or Path(folder, "merged.pth")
        print("plan:", merge(*files, dry_run=True).plan)
        result = merge(*files)
        with open_checkpoint(result.base) as before, open_checkpoint(result.out) as merged:
            for delta in deltas(before, merged, [row.name for row in result.plan.changed]):
                moved = f"rms {delta.rms:.3g}, new" if delta.new else f"‖Δ‖ / ‖W‖ {delta.relative:.3g}"
                print(f"{delta.name:36} {moved}")
        behaviour = compare_behaviour(result)
        print(behaviour.summary or "No text was scored: tokens are not bytes, or the models do not run here.")
        for check in (*result.checks, *verify_merge(result), *behaviour.checks):
            print(check)


if __name__ == "__main__":
    main(*sys.argv[1:])
