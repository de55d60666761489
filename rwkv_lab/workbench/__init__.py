"""What notebooks share: parameters, controls, figures, result.json and report.html.

A notebook calls `run = start("merge", globals())` and then the functions of its own module here, one or two per cell.
"""

from rwkv_lab.workbench.run import Run, start

__all__ = ["Run", "start"]
