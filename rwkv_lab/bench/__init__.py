"""Benchmarks: side by side with the alternatives, answers compared first. `python -m rwkv_lab.bench` lists them."""
