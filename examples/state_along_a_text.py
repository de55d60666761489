"""How long the channels of a model remember, and how large its state gets along a text.

python examples/state_along_a_text.py [MODEL]
"""

import math
import sys

import numpy as np

from rwkv_lab import RWKV_Dual
from rwkv_lab.analysis.dynamics import measure_dynamics
from rwkv_lab.analysis.texts import tokens_to_read
from rwkv_lab.train import demo_base


def main(path: str = "") -> None:
    model = RWKV_Dual.from_pretrained(path or demo_base()).requires_grad_(False)
    tokens, _ = tokens_to_read(model, batch=1, length=256)
    found = measure_dynamics(model, tokens)
    for layer, log_decays in enumerate(found.log_decays):
        half_life = math.log(2) / -float(np.median(log_decays))
        print(f"layer {layer}: half of its channels forget half of what they hold within {half_life:.3g} tokens")
    for position, sizes in list(zip(found.positions, found.sizes, strict=True))[::16]:
        print(f"after {position} tokens: RMS of the state {', '.join(f'{size:.3g}' for size in sizes)}, by layer")


if __name__ == "__main__":
    main(*sys.argv[1:])
