"""`python -m rwkv_lab.cli`: the command `rwkv-lab` where it is not on the PATH."""

import sys

from rwkv_lab.cli import main

sys.exit(main())
