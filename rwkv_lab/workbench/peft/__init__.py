"""peft.ipynb: its parameters, cells and figures."""
