"""What a conversion refuses of the place that its output goes to."""

import re
from pathlib import Path

from rwkv_lab.checkpoint import Checkpoint
from rwkv_lab.checkpoint.open import ADAPTERS, SINGLES
from rwkv_lab.checkpoint.output_checks import check_name, check_output
from rwkv_lab.convert.containers import Container
from rwkv_lab.convert.spec import ConvertOptions
from rwkv_lab.errors import OutputError, ParameterError

_FILES = (".pth", ".safetensors", ".st", ".gguf", ".bin")  # no folder is called so


def check_convert_output(out: Path, container: Container, ck: Checkpoint, options: ConvertOptions) -> None:
    """Refuse an output of the wrong kind, or one that may not be written.

    Raises:
        OutputError, ParameterError: says why.
    """
    check_name(out)
    if container.is_folder:
        if out.suffix in _FILES:
            raise ParameterError(f"out={str(out)!r}: a folder is written; name it without {out.suffix}")
        if out.exists() and not out.is_dir():
            raise OutputError(f"{out} is a file; name a folder")
        sources = [file.path.resolve() for file in ck.files]
        if any(source.is_relative_to(out.resolve()) for source in sources):
            raise OutputError(f"{out} holds the source {ck.path}; inputs are never written to")
        _refuse_other_files(out)
    else:
        if out.suffix not in container.suffixes:
            raise ParameterError(f"out={str(out)!r}: its name must end in {' or '.join(container.suffixes)}")
        if out.is_dir():
            raise OutputError(f"{out} is a folder; name a file in it, such as {out / ('m' + container.suffixes[0])}")
        if out.name in (*SINGLES, *ADAPTERS) and out.resolve().parent == ck.path.resolve():
            raise OutputError(f"{out} would be taken for the weights of {ck.path}, the source. Choose another name.")
    check_output(out, [ck], options.allowed_dir, options.overwrite)


# What folders of models and adapters hold.
_OF_A_MODEL = re.compile(
    r"(pytorch_)?(adapter_)?model.*|.*config\.json|tokenizer.*|special_tokens_map\.json|.*vocab.*|chat_template\.jinja"
    r"|README\.md|\w+\.py|\.gitattributes"
)


def _refuse_other_files(folder: Path) -> None:
    """Refuse to replace a folder with anything in it that no conversion writes: all of it would be gone.

    Raises:
        OutputError: names what is there.
    """
    there = list(folder.iterdir()) if folder.is_dir() else []
    other = sorted(p.name for p in there if p.is_dir() or not _OF_A_MODEL.fullmatch(p.name))
    if other:
        raise OutputError(
            f"{folder} holds more than a model ({', '.join(other[:3])}), which would be gone.\n"
            "Choose another folder, or move that elsewhere."
        )
