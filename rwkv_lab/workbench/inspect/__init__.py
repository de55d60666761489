"""inspect.ipynb: its parameters, cells and figures."""
