"""The compiled paths on a CPU: `prefill` reads many tokens at once, `step` takes one token at a time."""
