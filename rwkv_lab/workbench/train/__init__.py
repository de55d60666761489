"""train.ipynb: its parameters, cells and figures."""
