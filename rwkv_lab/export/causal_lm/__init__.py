"""Causal language models of Hugging Face: their folders, adapters of peft, and what is made of both."""
