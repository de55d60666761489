"""What goes wrong over months, in minutes: damaged files, kills, full disks, long use.

    python -m torture [PART ...] [--share 0.01]    in the folder tests; `make torture` runs all of it

Parts: mutations, kills, disk, tokens, notebooks. A share of 1 is 10,000 mutated checkpoints, 200 kills, 200 full disks,
100,000 tokens and 100 notebooks. Each part gives a row of what was done and what was found; anything but what its rules
allow ends the program with 1. The rows of the last full run stand in docs/reliability.md.
"""
