"""Convert a model, see what rounding did to its values, and whether the output says what the source says.

python examples/convert_and_compare.py [SOURCE TARGET OUT [DTYPE]]
"""

import sys
import tempfile
from pathlib import Path

from rwkv_lab.analysis.conversion import changes_of_values, compare_conversion, value_ranges
from rwkv_lab.convert import convert
from rwkv_lab.convert.key_map import key_map
from rwkv_lab.convert.usage import usage
from rwkv_lab.train import demo_base


def main(source: str = "", target: str = "fla", out: str = "", dtype: str = "fp16") -> None:
    with tempfile.TemporaryDirectory() as folder:
        result = convert(source or demo_base(), target, out or Path(folder, "converted"), dtype=dtype)
        for row in key_map(result.plan):
            print(f"{row.ours:36} {row.theirs:44} {row.transform}")
        for found in value_ranges(result):
            print(
                f"{found.name:36} |value| {found.smallest:.2g} to {found.largest:.2g}, {found.flushed} flushed to zero"
            )
        for delta in changes_of_values(result):
            print(f"{delta.name:36} ‖Δ‖ / ‖W‖ {delta.relative:.2g}")
        agreement = compare_conversion(result, "In the beginning")
        print(agreement.unread or f"logits differ by {agreement.relative:.2g}, relative RMS")
        for check in (*result.checks, *agreement.checks):
            print(check)
        for way in usage(result.plan):
            print(f"With {way.program}:\n{way.code}")


if __name__ == "__main__":
    main(*sys.argv[1:])
