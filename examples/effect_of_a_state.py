"""What a tuned state holds, head by head, and its effect by token position.

python examples/effect_of_a_state.py [BASE STATE [DATA]]
"""

import sys

from rwkv_lab.analysis.state_effects import measure_state_effect, state_heads
from rwkv_lab.analysis.tuning import open_tuning
from rwkv_lab.train import demo_base, demo_state


def main(base: str = "", state: str = "", data: str = "python") -> None:
    with open_tuning(base or demo_base(), state or demo_state()) as t:
        heads = state_heads(t)
        effect = measure_state_effect(t, data, texts=4, length=64)
    for layer, (norms, ranks) in enumerate(zip(heads.norms, heads.effective_ranks, strict=True)):
        for head, (norm, rank) in enumerate(zip(norms.tolist(), ranks.tolist(), strict=True)):
            print(f"layer {layer}, head {head}: norm {norm:.3g}, effective rank {rank:.3g} of {heads.full_rank}")
    if effect.measured:
        for position in (1, 4, 16, 64):
            kl, saved = (x[:, position - 1].mean() for x in (effect.kl_bits, effect.bits_saved))
            print(f"token {position}: predictions {kl:.3g} bits apart, the next token takes {saved:.3g} bits fewer")
    for check in effect.checks:
        print(check)


if __name__ == "__main__":
    main(*sys.argv[1:])
