"""What llama.cpp makes of a GGUF file, in a process of its own: an error of it ends the process.

    python llama_logits.py REQUEST.json ANSWER.npz

The request has the path of the `model`, `ids` and `texts`; the answer logits [T, V] of the ids, and ids of each text.
"""

import json
import sys

import llama_cpp
import numpy as np


def main(request: str, answer: str) -> None:
    with open(request, encoding="utf-8") as file:
        asked = json.load(file)
    model = llama_cpp.Llama(asked["model"], n_ctx=512, n_threads=1, logits_all=True, verbose=False)
    found = {}
    if asked["ids"]:
        model.eval(asked["ids"])
        found["logits"] = np.array(model.scores[: len(asked["ids"])])
    for i, text in enumerate(asked["texts"]):
        found[f"text {i}"] = np.array(model.tokenize(text.encode(), add_bos=False, special=False), np.int64)
    np.savez(answer, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
