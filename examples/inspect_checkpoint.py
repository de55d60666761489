"""What is in a checkpoint, and whether its values are sound.

python examples/inspect_checkpoint.py [CHECKPOINT]
"""

import sys

from rwkv_lab import open_checkpoint
from rwkv_lab.checkpoint.statistics import statistics
from rwkv_lab.train import demo_base


def main(path: str = "") -> None:
    with open_checkpoint(path or demo_base()) as ck:
        print(f"{ck.path.name}: kind {ck.kind}, {ck.layout or 'no whole model'}")
        found = statistics(ck)  # reads all values once; names, shapes and dtypes come from the header
        for name, values in found.items():
            print(f"{name:36} {str(list(ck.info[name].shape)):14} from {values.min:.3g} to {values.max:.3g}")
    print(f"values that are NaN or Inf: {sum(values.nan + values.inf for values in found.values())}")


if __name__ == "__main__":
    main(*sys.argv[1:])
