"""Which layers' tuning matters: bits per byte of held-out text without each.

python examples/ablate_a_tuning.py [BASE TUNED [DATA]]
"""

import sys

from rwkv_lab.analysis.ablation import measure_ablation
from rwkv_lab.analysis.texts import held_out_excerpts
from rwkv_lab.analysis.tuning import open_tuning
from rwkv_lab.train import demo_base, demo_state


def main(base: str = "", tuned: str = "", data: str = "python") -> None:
    with open_tuning(base or demo_base(), tuned or demo_state()) as t:
        found = measure_ablation(t, t.changed_names(), held_out_excerpts(data, count=4))
    print(f"with all of it {found.tuned:.3f} bits per byte, without {found.base:.3f}")
    for label, bits in (found.layers | found.parts).items():
        print(f"without {label}: {bits:.3f}, {bits - found.tuned:+.3f}")
    for check in found.checks:
        print(check)


if __name__ == "__main__":
    main(*sys.argv[1:])
