"""merge.ipynb: its parameters, cells and figures."""
