"""Where the result of a training may go: never onto or around what it is made of, nor onto what is not ours."""

import os
from collections.abc import Mapping
from pathlib import Path

from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.checkpoint.atomic import check_target, refuse_inputs
from rwkv_lab.checkpoint.contents import kept_notes
from rwkv_lab.checkpoint.origin import ORIGIN, Origin, weights_of
from rwkv_lab.checkpoint.provenance import printable
from rwkv_lab.checkpoint.write import file_kind
from rwkv_lab.errors import OutputError
from rwkv_lab.peft.hf_layout import check_folder
from rwkv_lab.train.data import data_files
from rwkv_lab.train.finished import TRAINING_ID
from rwkv_lab.train.log import check_log_folder, log_files
from rwkv_lab.train.resume import resume_path
from rwkv_lab.train.spec import KINDS, TrainOptions, TrainSpec


def check_destinations(spec: TrainSpec, out: Path, options: TrainOptions) -> None:
    """Refuse an output that a training could not write at its end, or should not.

    Raises:
        OutputError: it exists (unless `overwrite`), its folder is not there or not writable, it is the base or the text
            under whatever name, or a folder around either or in the folder of texts, or a folder with other files.
        ParameterError: a suffix that is neither `.pth` nor `.safetensors`; only adapters may have none.
        CorruptFileError, LayoutError, UnsafeFileError: of the base.
    """
    sources = []
    if spec.base:
        with open_checkpoint(spec.base) as ck:
            sources += [file.path for file in ck.files]
    if spec.start:
        with open_checkpoint(spec.start) as ck:
            sources += [file.path for file in ck.files]
    texts = data_files(spec.effective("data"))
    sources += texts
    is_file = bool(out.suffix) or not KINDS[spec.kind].may_be_folder
    if is_file:
        file_kind(out)
        if out.is_dir():
            raise OutputError(f"{out} is a folder; name a file in it, such as {out / 'trained.pth'}")
    stats = [(source, os.stat(source)) for source in sources]
    logs = log_files(Path(options.log_folder)) if options.log_folder else []
    for written in (out, resume_path(out), *logs):
        refuse_inputs(written, stats)
    check_target(out, options.overwrite)
    if not is_file:
        _refuse_around(out, sources)
        around = next((t for t in texts if t.is_dir() and out.resolve().is_relative_to(t.resolve())), None)
        if around is not None:
            raise OutputError(f"{out} lies in {around}, whose texts are trained on; choose a folder outside of it")
        check_folder(out)
    if options.log_folder:
        check_log_folder(Path(options.log_folder))


def _refuse_around(folder: Path, sources: list[Path]) -> None:
    for source in sources:
        if source.resolve().is_relative_to(folder.resolve()):
            raise OutputError(f"{folder} holds the input {source}, which would go with it; choose another folder")


def origin_note(spec: TrainSpec, settings: Mapping[str, object]) -> dict[str, str]:
    """What an output says of where it comes from, for its metadata: its base by values, and its training; of a whole
    model also the adapters that its base contains. {} of a fresh model.

    Args:
        settings: what decides the result, with the training's id where it has one.
    """
    if not spec.base:
        return {}
    training = str(settings.get(TRAINING_ID, ""))
    with open_checkpoint(spec.base) as ck:
        origin = Origin(printable(ck.path.name), weights_of(ck), str(spec.dtype), str(spec.quant), training)
        is_model = KINDS[spec.kind].output_kind == "model"
        contents = kept_notes(ck, "train", is_changed=True) if is_model else {}
    return contents | {ORIGIN: origin.text()}
