"""A finished training that is continued to more steps: from its output, with AdamW's moments anew.

The output states the settings that it was trained by; all but the steps have to be the same. The batches continue where
they ended. The learning rate rises once more over the warm-up, to where the schedule of all steps has it, so the result
is not that of one training with as many steps.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.errors import ParameterError, RwkvLabError
from rwkv_lab.text import counted
from rwkv_lab.train.resume import other_settings, resume_path, settings_of_course
from rwkv_lab.train.spec import TrainOptions

NOTE = "rwkv_lab.train"  # what a training writes into the metadata of its output: JSON with its settings
CONTINUED = "continued"  # the steps of the finished training that was continued
TRAINING_ID = "training"  # the same for all that adapters and states of one training were trained further to
_MAY_DIFFER = (TRAINING_ID, "steps", "steps_done", "torch", "eval_every", "patience", CONTINUED)
_ONLY_IF_GIVEN = ("tokenizer", "long", "started_from")


@dataclass(frozen=True)
class Finished:
    """The training that wrote an output.

    settings: None where it was continued and interrupted since, so that its settings have been compared.
    """

    steps: int  # done
    settings: Mapping[str, object] | None


def finished_training(out: Path, options: TrainOptions) -> Finished | None:
    """The training that there is to continue; None where training begins anew or resumes from a checkpoint of its own.

    Raises:
        CorruptFileError, UnsafeFileError: of the checkpoint of an interrupted training.
    """
    if not options.resume:
        return None
    if resume_path(out).exists():
        continued = settings_of_course(resume_path(out)).get(CONTINUED)
        return Finished(continued, None) if isinstance(continued, int) else None
    if not out.exists():
        return None
    try:
        with open_checkpoint(out) as ck:
            settings = json.loads(ck.metadata[NOTE])
        steps = settings.get("steps_done", settings["steps"])
    except (RwkvLabError, KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return None  # not of ours: an output that exists, and is refused as such
    return Finished(steps, settings) if isinstance(steps, int) else None


def notes_on_checkpoint(out: Path, options: TrainOptions) -> list[str]:
    """That a checkpoint of an unfinished training is there and is not continued from, in a sentence."""
    file = resume_path(out)
    if options.resume or not file.exists():
        return []
    return [f"{file.name}, of a training that did not end, is replaced: resume=True would have continued it."]


def training_id(settings: Mapping[str, object], earlier: Path | None) -> str:
    """What tells the training that an output is of: kept where an earlier output is trained further, else a hash of the
    settings but for the number of steps.

    Raises:
        CorruptFileError, LayoutError, UnsafeFileError: of the earlier output.
    """
    if earlier is not None:
        with open_checkpoint(earlier) as ck:
            try:
                known = json.loads(ck.metadata[NOTE])[TRAINING_ID]
            except (KeyError, ValueError, TypeError, RecursionError):
                known = None  # of others, or of an older version
        if isinstance(known, str):
            return known
    own = {name: value for name, value in settings.items() if name not in _MAY_DIFFER}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]


def steps_to_continue(
    finished: Finished | None, out: Path, steps: int, settings: Mapping[str, object], overwrite: bool
) -> int:
    """How many steps the output has behind it; 0 where training begins anew.

    Args:
        settings: of the training that is asked for.
        overwrite: whether an output of another training may be replaced.

    Raises:
        ParameterError: the output is of a training with other settings, or has as many steps already.
    """
    if finished is None:
        return 0
    if finished.settings is None:
        return finished.steps
    now = json.loads(json.dumps({name: value for name, value in settings.items() if name not in _MAY_DIFFER}))
    other = other_settings(dict(finished.settings), now | {name: now.get(name) for name in _ONLY_IF_GIVEN})
    if not other and finished.steps < steps:
        return finished.steps
    if overwrite:
        return 0
    if other:
        raise ParameterError(
            f"{out} is of a finished training with other settings: {other}.\n"
            "Pass the same to continue it, start= to train it further by others, or overwrite=True to begin anew."
        )
    raise ParameterError(
        f"{out} is finished: it was trained for {counted(finished.steps, 'step')}.\n"
        f"Pass more than steps={steps} to continue it, or overwrite=True to begin anew."
    )
