"""export.ipynb: its parameters and cells."""
