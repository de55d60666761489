"""What a person does with a converted folder who has transformers and peft, but not rwkv_lab; see test_own_code.py.

python use_of_a_folder.py SCRATCH…    folders in which `out` is the converted one, and expected.pt what it has to give

For each that can be used it prints "NAME used"; the others end with a traceback.
"""

import sys
import traceback
import warnings
from pathlib import Path

import torch


class NotInstalled:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] == "rwkv_lab":
            raise ModuleNotFoundError(name)


sys.meta_path.insert(0, NotInstalled())
warnings.simplefilter("ignore")
from peft import LoraConfig, get_peft_model  # noqa: E402
from torch.utils.data import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments  # noqa: E402

SCRATCH = Path()  # those of one folder after the other
EXPECTED, TOKENS, LOGITS = {}, torch.empty(0), torch.empty(0)


def load(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def near(found, expected):
    """Relative RMS in float32: two implementations of the same formulas."""
    error = ((found - expected).double().pow(2).mean() / expected.double().pow(2).mean()).sqrt().item()
    assert error < 2e-5, error


def generated(model, ids, **settings):
    settings = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0} | settings
    return model.generate(ids, **settings)


def logits_and_steps(model):
    near(model(TOKENS).logits, LOGITS)
    first = model(TOKENS[:, :20])
    near(model(TOKENS[:, 20:], state=first.state).logits, LOGITS[:, 20:])
    near(model(TOKENS, logits_to_keep=1).logits, LOGITS[:, -1:])


def generation(model):
    ids = TOKENS[:1, :9]
    greedy = generated(model, ids)
    assert torch.equal(greedy, generated(model, ids, use_cache=False))
    assert torch.equal(greedy[:, :9], ids) and torch.equal(greedy[0, 9:], EXPECTED["greedy"])
    assert generated(model, ids, num_beams=2).shape == greedy.shape
    torch.manual_seed(0)
    sampled = generated(model, ids.expand(64, -1), do_sample=True, max_new_tokens=1, min_new_tokens=1, top_k=3)
    assert set(sampled[:, 9].tolist()) <= set(LOGITS[0, 8].topk(3).indices.tolist())


def padded_batches(model):
    long, short = TOKENS[0, :11], TOKENS[1, :4]
    ids, mask = torch.stack([long, torch.cat([torch.zeros(7, dtype=torch.long), short])]), torch.ones(2, 11)
    mask[1, :7] = 0
    near(model(ids, attention_mask=mask).logits[1, 7:], model(short[None]).logits[0])
    both = generated(model, ids, attention_mask=mask)
    assert torch.equal(both[0], generated(model, long[None])[0])
    assert torch.equal(both[1, 7:], generated(model, short[None])[0])


def saved_again(model):
    model.save_pretrained(SCRATCH / "again")
    again = load(SCRATCH / "again")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


class Examples(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, i):
        return {"input_ids": TOKENS[i % 2, :16], "labels": TOKENS[i % 2, :16]}


def training(model):
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["receptance", "value"], init_lora_weights=False))
    before = {n: p.detach().clone() for n, p in adapted.named_parameters() if p.requires_grad}
    arguments = TrainingArguments(
        output_dir=str(SCRATCH / "trainer"),
        max_steps=3,
        per_device_train_batch_size=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=1e-2,
    )
    result = Trainer(model=adapted, args=arguments, train_dataset=Examples()).train()
    assert result.global_step == 3
    assert before and all(not torch.equal(before[n], p) for n, p in adapted.named_parameters() if n in before)


def gradient_checkpointing(model):
    model.train().requires_grad_(True)
    gradients = []
    for on in (False, True):
        model.gradient_checkpointing_enable() if on else model.gradient_checkpointing_disable()
        model.zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        gradients.append(model.blocks[0].att.key.weight.grad.clone())
    near(gradients[1], gradients[0])


def use_all():
    model = load(SCRATCH / "out")
    with torch.no_grad():
        for use in (logits_and_steps, generation, padded_batches, saved_again):
            use(model)
    gradient_checkpointing(model)
    training(load(SCRATCH / "out"))


for word in sys.argv[1:]:
    SCRATCH, EXPECTED = Path(word), torch.load(f"{word}/expected.pt")
    TOKENS, LOGITS = EXPECTED["tokens"], EXPECTED["logits"]
    try:
        use_all()
    except Exception:
        traceback.print_exc()
    else:
        print(SCRATCH.name, "used", flush=True)
