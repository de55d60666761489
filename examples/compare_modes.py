"""Do all modes, backends and dtypes of a model agree, and does the state pass from prefill to decoding?

python examples/compare_modes.py [MODEL]
"""

import sys

import torch

from rwkv_lab import RWKV_Dual, open_checkpoint
from rwkv_lab.analysis.agreement import agreement_checks, check_hand_off, check_memory, compare_modes, growth_checks
from rwkv_lab.analysis.mismatch import explain_failures
from rwkv_lab.analysis.texts import tokens_to_read
from rwkv_lab.train import demo_base


def main(path: str = "") -> None:
    path = path or str(demo_base())
    with open_checkpoint(path) as ck:
        check_memory(ck)  # the comparison holds the model in float64, three times
    model = RWKV_Dual.from_pretrained(path, dtype=torch.float64).requires_grad_(False)
    tokens, source = tokens_to_read(model, batch=2, length=128)
    print(f"tokens {list(tokens.shape)}: {source}")
    rows = compare_modes(model, tokens)
    for row in rows:
        print(f"{row.name:32} error {row.error:.1e} beside float64, {row.apart:.1e} beside the first mode")
    for check in (*agreement_checks(rows), *growth_checks(rows), *check_hand_off(model, tokens)):
        print(check)
    for failure in explain_failures(model, tokens, rows):
        print(f"{failure.row.name} beside {failure.beside}: {failure.where}")


if __name__ == "__main__":
    main(*sys.argv[1:])
