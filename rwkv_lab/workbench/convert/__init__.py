"""convert.ipynb: its parameters and cells."""
