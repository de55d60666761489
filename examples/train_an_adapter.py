"""Plan the training of an adapter, train it, and check what was written.

python examples/train_an_adapter.py OUT [BASE [DATA [STEPS]]]
"""

import sys

from rwkv_lab.progress import human_bytes
from rwkv_lab.train import TrainOptions, TrainSpec, demo_base, make_plan, run_training, verify_training


def main(out: str, base: str = "", data: str = "python", steps: str = "50") -> None:
    spec = TrainSpec(kind="lora", base=base or str(demo_base()), data=data, steps=int(steps), rank=4)
    plan = make_plan(spec)
    print(f"trains {plan.count:,} values, {plan.frozen:,} are frozen; about {human_bytes(plan.memory_bytes)} of memory")
    result = run_training(plan, out, TrainOptions(samples=False))
    print(f"{result.bits_before:.3f} to {result.bits_after:.3f} bits per byte of held-out text")
    for check in verify_training(spec, result):
        print(check)


if __name__ == "__main__":
    main(*sys.argv[1:])
