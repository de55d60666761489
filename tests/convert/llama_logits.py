"""What llama.cpp makes of a GGUF file, in a process of its own: an error of it ends the process.

    python llama_logits.py REQUEST.json ANSWER.npz

The request has the path of the `model`, `ids` and `texts`, and a type to quantise the model to beforehand, into a file
beside it; the answer has logits [T, V] of the ids, and ids of each text.
"""

import json
import sys

import llama_cpp
import numpy as np
from llama_cpp.llama_chat_format import Jinja2ChatFormatter


def main(request: str, answer: str) -> None:
    with open(request, encoding="utf-8") as file:
        asked = json.load(file)
    if asked["quantised"]:
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{asked['quantised']}")
        quantised = asked["model"] + ".quantised"
        assert llama_cpp.llama_model_quantize(asked["model"].encode(), quantised.encode(), params) == 0
        asked["model"] = quantised
    model = llama_cpp.Llama(asked["model"], n_ctx=512, n_threads=1, logits_all=True, verbose=False)
    found = {}
    if asked["ids"]:
        model.eval(asked["ids"])
        found["logits"] = np.array(model.scores[: len(asked["ids"])])
    for i, text in enumerate(asked["texts"]):
        found[f"text {i}"] = np.array(model.tokenize(text.encode(), add_bos=False, special=False), np.int64)
    if asked["messages"]:
        formatter = Jinja2ChatFormatter(model.metadata["tokenizer.chat_template"], eos_token="", bos_token="")
        found["prompt"] = np.array(formatter(messages=asked["messages"]).prompt)
        found["ends"] = np.array([model.token_bos(), model.token_eos()])
    np.savez(answer, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
