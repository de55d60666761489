"""How much an adapter, a tuned state or a fine-tune trains, what it changes, and whether another one changes it alike.

python examples/changes_of_a_tuning.py [BASE TUNED [SECOND]]
"""

import sys

from rwkv_lab.analysis.changes import compare_directions, count_values, measure_changes
from rwkv_lab.analysis.tuning import open_tuning
from rwkv_lab.train import demo_base, demo_state


def main(base: str = "", tuned: str = "", second: str = "") -> None:
    base, tuned = base or str(demo_base()), tuned or str(demo_state())
    with open_tuning(base, tuned) as t:  # TuningOptions(alpha=…) gives what an adapter's file does not state
        names = t.changed_names()
        counts, changes = count_values(t, names), measure_changes(t, names)
        print(f"{t.tuned.path.name}, {t}, trains {counts.trained:,} values; {counts.frozen:,} stay frozen.")
        for s in changes.spectra:
            print(f"{s.name}: ‖Δ‖ / ‖W‖ {s.relative:.3g}, effective rank {s.effective_rank:.3g} of {min(s.shape)}")
        for name, relative in changes.others.items():
            print(f"{name}: ‖Δ‖ / ‖W‖ {relative:.3g}")
        if second:
            with open_tuning(base, second, direction_only=True) as other:
                for name, cosine in compare_directions(t, other, names).cosines.items():
                    print(f"{name}: cosine {cosine:+.3f} to {other.tuned.path.name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
