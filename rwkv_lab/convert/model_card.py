"""The model card of what is uploaded to the Hugging Face Hub: README.md, from the provenance in the checkpoint.

What a provenance holds may have come with a file by others: it stands in the card as code, in one line.
"""

import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from rwkv_lab.checkpoint import Checkpoint
from rwkv_lab.checkpoint.provenance import download_in, records_of
from rwkv_lab.convert.usage import usage_of
from rwkv_lab.dtypes import short_name
from rwkv_lab.progress import human_bytes

_DONE = {"convert": "Converted", "merge": "Merged"}
_SHOWN = 20  # names in a list; of more, their number is added

_LIBRARIES = {  # of the Hub, by target
    "transformers": "transformers",
    "fla": "transformers",
    "world": "transformers",
    "gguf": "gguf",
    "peft": "peft",
}


def model_card(ck: Checkpoint, repo_id: str, licence: str) -> str:
    """README.md of a checkpoint on the Hub, with its front matter.

    Args:
        ck: what is uploaded, open.
        licence: "" where none was given: the card says so.
    """
    records = records_of(ck)
    front = yaml.safe_dump(_front_matter(ck, records, licence), sort_keys=False, allow_unicode=True)
    name = repo_id.rpartition("/")[2]
    parts = [f"---\n{front}---\n# {name}", _described(ck), "## Loading", *_loading(ck, repo_id)]
    parts.append("## How it was made")
    parts.append("\n".join(_steps(ck, records)))
    dropped = list(_dropped(records))
    if dropped:
        parts += ["## Left out", "\n".join(dropped)]
    stated = f"{_code(licence)}, as stated by who uploaded this." if licence else "No licence is stated."
    return "\n\n".join([*parts, "## Licence", stated]) + "\n"


def _target(ck: Checkpoint) -> str:
    if ck.format == "adapter":
        return "peft"
    return ck.foreign_format.target if ck.foreign_format is not None else ck.format


def _front_matter(ck: Checkpoint, records: list[dict[str, Any]], licence: str) -> dict[str, Any]:
    base, target = _base_model(ck, records), _target(ck)
    front: dict[str, Any] = {"base_model": base} if base else {}
    if base and ck.layout is None:
        front["base_model_relation"] = "adapter"
    elif base and ck.quantised:
        front["base_model_relation"] = "quantized"
    if licence:
        front["license"] = licence
    front |= {"library_name": _LIBRARIES[target]} if target in _LIBRARIES else {}
    front |= {"pipeline_tag": "text-generation"} if ck.layout is not None else {}
    generation = [f"rwkv{ck.layout.version.split('.')[0]}"] if ck.layout is not None else []
    front["tags"] = list(dict.fromkeys(["rwkv", *generation, target, *([] if ck.layout else [ck.kind]), "rwkv_lab"]))
    return front


def _base_model(ck: Checkpoint, records: list[dict[str, Any]]) -> str:
    """The repository that a model came from, or that an adapter was trained on; "" where nothing states it."""
    named: Any = (ck.adapter_config or {}).get("base_model_name_or_path")
    if ck.layout is not None or not named:
        # Of an adapter, where it came from is no base; of one that was extracted, the first input is.
        of_base = records if ck.layout is not None else [r for r in records if r.get("job") == "extract_lora"]
        named = next((came["repo_id"] for came in map(download_in, of_base) if came), "")
    return named if isinstance(named, str) and re.fullmatch(r"\w[\w.-]*/[\w.-]+", named) else ""


def _described(ck: Checkpoint) -> str:
    what = str(ck.layout) if ck.layout is not None else f"{ck.kind.capitalize()} of RWKV"
    form = ck.foreign_format.described if ck.foreign_format is not None else "BlinkDL's names"
    dtypes = Counter(ck.quantised)
    for info in ck.info.values():
        if info.derived is None or not info.derived.quantised:
            dtypes[short_name(info.dtype)] += 1
    counted = ", ".join(f"{n} in {name}" for name, n in dtypes.most_common())
    return f"{what}.\n\n{form[0].upper()}{form[1:]}; {len(ck.info)} tensors ({counted}), {human_bytes(ck.bytes)}."


def _loading(ck: Checkpoint, repo_id: str) -> Iterator[str]:
    """How to download it, and the lines that load it with each program that reads it."""
    folder = ck.path.is_dir()
    name = repo_id.rpartition("/")[2] if folder else ck.path.name
    where = shlex.join(["--local-dir", name] if folder else [name, "--local-dir", "."])
    yield f"```sh\nhf download {repo_id} {where}\n```"
    tokenizer = not folder or (ck.path / "tokenizer_config.json").is_file()
    for way in usage_of(ck, name):
        code = way.code if tokenizer else re.sub(r".*\bAutoTokenizer\b.*\n?", "", way.code).strip()
        yield f"With {way.program}:\n\n```python\n{code}\n```"


def _steps(ck: Checkpoint, records: list[dict[str, Any]]) -> Iterator[str]:
    if not records:
        yield f"{_code(ck.path.name)} does not state how it was made."
    for number, record in enumerate(reversed(records), 1):
        yield f"{number}. {_step(record)}"


def _step(record: Mapping[str, Any]) -> str:
    inputs = [one for one in _list(record.get("inputs")) if isinstance(one, dict)]
    recipe = record.get("recipe") if isinstance(record.get("recipe"), dict) else {}
    given = {name: value for name, value in recipe.items() if value not in (None, False, "", {}, [], 0)}  # type: ignore
    given = {name: value for name, value in given.items() if name != "max_shard_size"}
    options = ", ".join(f"{name} {_code(value)}" for name, value in given.items())
    job = str(record.get("job"))
    done = _DONE.get(job, f"Made ({_code(job)})")
    text = f"{done} by {_code(record.get('made_by', '?'))}" + (f": {options}" if options else "")
    roles = ["base", *["tuned"] * (len(inputs) - 1)] if record.get("job") == "merge" else ["source"] * len(inputs)
    for role, one in zip(roles, inputs, strict=True):
        size = human_bytes(one["bytes"]) if isinstance(one.get("bytes"), int) else "size unknown"
        text += f"\n   - {role} {_code(one.get('name', '?'))}, {size}, {_code(one.get('fingerprint', '?'))}"
        text += _downloaded(one.get("downloaded"), indent="     ")
    return text + _downloaded(record.get("downloaded"))


def _downloaded(record: Any, indent: str = "   ") -> str:
    if not isinstance(record, dict):
        return ""
    text = f"\n{indent}- downloaded from {_code(record.get('repo_id', '?'))}, commit {_code(record.get('commit', '?'))}"
    for file in _list(record.get("files"))[:_SHOWN]:
        if isinstance(file, dict):
            sha256 = f", SHA-256 {_code(file['sha256'])}" if file.get("sha256") else ""
            text += f"\n{indent}  - {_code(file.get('name', '?'))}{sha256}"
    return text


def _dropped(records: list[dict[str, Any]]) -> Iterator[str]:
    for record in records:
        reasons = record.get("dropped")
        for why, names in reasons.items() if isinstance(reasons, dict) else ():
            shown = ", ".join(_code(name) for name in _list(names)[:_SHOWN])
            count = len(names) if isinstance(names, list) else names
            more = f" and {len(names) - _SHOWN} more" if isinstance(names, list) and len(names) > _SHOWN else ""
            yield f"- {shown or f'{_code(count)} tensors'}{more}: {_code(why)}"


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _code(value: Any) -> str:
    """A value of a record as code in one line: nothing in it is Markdown or HTML."""
    text = "".join(c if c.isprintable() and c != "`" else " " for c in str(value)).strip()
    return f"`{text[:200] or ' '}`"
