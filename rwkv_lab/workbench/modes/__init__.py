"""modes.ipynb: its parameters, cells and figures."""
