"""benchmark.ipynb: its parameters, cells and figures."""
