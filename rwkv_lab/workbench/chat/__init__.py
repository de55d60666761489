"""chat.ipynb: its parameters, cells and the box to write in."""
