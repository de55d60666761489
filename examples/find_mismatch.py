"""Where two checkpoints of one layout begin to compute different things: layer, operator and token.

python examples/find_mismatch.py MODEL OTHER
"""

import sys

import torch

from rwkv_lab import RWKV_Dual
from rwkv_lab.analysis.agreement import Execution
from rwkv_lab.analysis.mismatch import first_mismatch
from rwkv_lab.analysis.texts import tokens_to_read


def main(path: str, other: str) -> None:
    models = [RWKV_Dual.from_pretrained(p, dtype=torch.float64).requires_grad_(False) for p in (path, other)]
    tokens, _ = tokens_to_read(models[0], batch=1, length=64)
    print(first_mismatch(Execution(models[0]), Execution(models[1]), tokens) or "Both compute the same.")


if __name__ == "__main__":
    main(*sys.argv[1:])
