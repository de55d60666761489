"""Writing with recovery: a failure is diagnosed, and tried again only with a change that can help."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rwkv_lab.checkpoint.atomic import by_final_names, check_target
from rwkv_lab.errors import FormatExportError, RwkvLabError
from rwkv_lab.export.attempt import Answer, Attempt, Fault, Work, try_once
from rwkv_lab.export.diagnosis import Failure, Settings, changes, diagnose, last_resorts, what_is_lost

log = logging.getLogger(__name__)

AS_ASKED = "as asked for"


def write_with_recovery(
    work: Work, asked: Settings, folder: Path, most: int, limit: float, attempts: list[Attempt]
) -> Any:
    """Write a folder; where that fails, try again with what the cause of the error asks for, or, where the cause is not
    known, with one change of settings after the other.

    Args:
        work: what writes; it is called with the settings.
        asked: settings of the first attempt. Only those in it are changed: others mean nothing to `work`.
        most: number of attempts.
        limit: seconds for each.
        attempts: is filled with what was tried, also where an error is raised.

    Returns:
        What `work` returned.

    Raises:
        ONNXExportError, or the class that belongs to a diagnosed cause: nothing helped, or nothing can.
        OutputError: the folder is there already.
        RwkvLabError: of another kind, for what no settings change, such as an input that is damaged.
    """
    check_target(folder, overwrite=False)  # after an attempt that failed, what is there is removed
    settings, why = asked, AS_ASKED
    others: Iterator[Settings] | None = None  # last resorts that are left, once the cause is not known
    while True:
        attempt, came = try_once(work, settings, folder, why, limit)
        attempts.append(attempt)
        if isinstance(came, Answer):
            attempt.lost = what_is_lost(asked, settings)
            return came.value
        error = by_final_names(str(attempt.error))
        log.warning("attempt %d failed after %.0f s: %s", len(attempts), attempt.seconds, error)
        if not isinstance(came.error, FormatExportError):
            raise came.error
        tried = [one.settings for one in attempts]
        failure = diagnose(came.text, settings)
        attempt.diagnosis = failure.cause if failure else None
        if failure and changes(failure.fix, settings) and settings | failure.fix not in tried:
            following, because, others = settings | failure.fix, failure.cause, None
        elif failure and others is None:
            raise _final_error(attempts, came, failure)
        else:
            others = others or last_resorts(came.text, settings)
            following, because = next((one for one in others if one not in tried), None), "the cause is not known"
        if following is None or len(attempts) >= most:
            raise _final_error(attempts, came, failure)
        why = f"{because}: {_changed(asked, following)}"
        settings = following


def _changed(before: Settings, after: Settings) -> str:
    return ", ".join(f"{name} = {after[name]}" for name in after if after[name] != before[name])


def _final_error(attempts: list[Attempt], fault: Fault, failure: Failure | None) -> RwkvLabError:
    """What is raised where nothing helped: of the only attempt, else of the first and the last one."""
    last = str(fault.error).splitlines()[0]
    if len(attempts) > 1:
        first = str(attempts[0].error).splitlines()[0]
        last = f"{len(attempts)} attempts failed; the first: {first}\nThe last ({attempts[-1].why}): {last}"
    if failure is None:
        return type(fault.error)(last) if len(attempts) > 1 else fault.error
    return failure.error("\n".join([*last.splitlines()[-1:], f"The cause: {failure.cause}.", failure.advice]))
