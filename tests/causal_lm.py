"""Tiny random models of Hugging Face with a byte tokenizer, and adapters of peft for them."""

import json
from pathlib import Path
from typing import Any

import torch

WORDS = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = {
    "vocab_size": 288,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 600,
}


def write_model(folder: Path, config: str = "Qwen3Config", dtype=torch.float32, seed=0, shard="5GB", **options) -> Path:
    """A model of a configuration class of transformers, with its tokenizer."""
    import transformers

    tokenizer = make_tokenizer()
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    torch.manual_seed(seed)
    settings = getattr(transformers, config)(**{**SIZES, **ends, **options})
    model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # they are zero at the start
                parameter.normal_(0, 0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)
    return folder


def make_tokenizer() -> Any:
    """Bytes in GPT-2's alphabet, and three special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    pad, end, start = WORDS
    made = PreTrainedTokenizerFast(
        tokenizer_object=library, eos_token=end, pad_token=pad, additional_special_tokens=[start]
    )
    made.chat_template = TEMPLATE
    return made


def write_adapter(folder: Path, base: Path, steps: int = 0, dtype=torch.float32, **config) -> Path:
    """A LoRA of peft in which no part is idle; with `steps`, trained for so many on a sentence."""
    import peft
    import transformers

    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    options = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "down_proj"]} | config
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    if steps:
        optimiser = torch.optim.AdamW(trained, 2e-2)
        tokens = torch.tensor([make_tokenizer().encode("The river remembers its stones.")])
        for _ in range(steps):
            adapted(input_ids=tokens, labels=tokens).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
    else:
        with torch.no_grad():
            for parameter in trained:
                parameter.add_(0.1 * torch.randn_like(parameter))
    for parameter in trained:
        parameter.data = parameter.data.to(dtype)
    adapted.save_pretrained(folder)
    return folder


def edit_json(path: Path, **values) -> None:
    """Set keys of a JSON file; None takes one out."""
    found = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))
