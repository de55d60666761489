"""Sizes of the models that tests export: those of equal sizes are traced once."""

SIZES = {"n_layer": 3, "n_head": 2, "head_size": 32, "dim_ffn": 96, "vocab_size": 257}  # int4 has blocks of 32
