"""A plan carried out: its tensors streamed into the output, with the provenance in it and beside it."""

import logging
import time
from hashlib import sha256

from rwkv_lab.arguments import checked
from rwkv_lab.checkpoint import FileFacts, file_facts, write_text
from rwkv_lab.checkpoint.atomic import one_writer
from rwkv_lab.checkpoint.file_layout import file_layout
from rwkv_lab.checkpoint.origin import lineage, weights_of
from rwkv_lab.checkpoint.output_checks import check_free_space
from rwkv_lab.checkpoint.provenance import RECORD, Provenance, as_text, provenance, provenance_path, text_beside
from rwkv_lab.checkpoint.stream import Findings
from rwkv_lab.checkpoint.write import file_kind, write_stream
from rwkv_lab.checks import Check
from rwkv_lab.errors import ParameterError
from rwkv_lab.merge.effect import effect_of
from rwkv_lab.merge.inputs import InputFile
from rwkv_lab.merge.output_checks import check_merge_output
from rwkv_lab.merge.plan import MergePlan, MergeResult
from rwkv_lab.merge.spec import MergeOptions
from rwkv_lab.progress import human_bytes

log = logging.getLogger(__name__)


@checked
def write_merge(plan: MergePlan, options: MergeOptions | None = None) -> MergeResult:
    """Carry out a plan. Its inputs are opened again if they were closed; `out` appears whole or not at all.

    Args:
        options: in the place of the plan's own; `hash` must be the same.
    Raises:
        ParameterError: an input has changed since the plan was made, or another hash.
        OutputError: `out` cannot be written there, or not any more.
        NumericsError: NaN, Inf or overflow on the way; nothing is left behind.
    """
    options = options or plan.options
    if options.hash != plan.options.hash:
        raise ParameterError(
            f"hash={options.hash!r}: the plan was made with {plan.options.hash!r}; make the plan again."
        )
    recipe = plan.spec.recipe()
    if options.dry_run:
        return MergeResult(plan, recipe, plan.inputs)
    with plan.files.opened_again():
        check_merge_output(plan.out, plan.files.checkpoints, options.allowed_dir, options.overwrite)
        check_free_space(plan.out, plan.output_bytes, plan.memory_needed, "the merge")
        inputs, hashing = _fingerprints(plan)
        contains, seen = plan.look()
        for note in seen:
            log.warning("%s: %s", plan.out.name, note)
        base = plan.files.base
        bases, downloads = lineage(base, weights_of(base)), plan.files.downloads
        made = provenance(recipe, inputs, contains, bases=bases, downloads=downloads)
        log.info(
            "%s: %d of %d tensors change, output %s",
            plan.method,
            len(plan.changed),
            len(plan.rows),
            human_bytes(plan.output_bytes),
        )
        start = time.perf_counter()
        findings, outputs = _write(plan, made, options)
    effect = effect_of(plan.meters)
    for note in effect.notes():
        log.warning("%s: %s", plan.out.name, note)
    checks = (*_streaming_checks(plan, options, findings, outputs[0]), *effect.checks())
    seconds = {"hash": hashing, "merge": time.perf_counter() - start}
    return MergeResult(plan, recipe, inputs, outputs, checks, seconds, effect, tuple(seen))


def _fingerprints(plan: MergePlan) -> tuple[tuple[InputFile, ...], float]:
    """The inputs, and the seconds that reading all of them took where that is asked for."""
    if plan.options.hash == "records":
        return plan.inputs, 0.0
    start = time.perf_counter()
    inputs = plan.files.facts(plan.options.hash)
    seconds = time.perf_counter() - start
    log.info("%s of %d inputs took %.1f s", plan.options.hash, len(inputs), seconds)
    return inputs, seconds


def _write(plan: MergePlan, made: Provenance, options: MergeOptions) -> tuple[list[Findings], tuple[FileFacts, ...]]:
    """What is wrong with the output's values, and facts of the output and of the file beside it."""
    layout = file_layout(file_kind(plan.out), plan.tensors, {RECORD: as_text(made)})
    untouched = {row.name for row in plan.rows if row.action == "copy"}
    with one_writer(plan.out, provenance_path(plan.out), options.overwrite) as before_publishing:
        findings = write_stream(
            plan.out,
            plan.tensors,
            layout,
            options.overwrite,
            lambda t: options.scan == "all" or t.name not in untouched,
            not plan.spec.allow_nonfinite,
            before_publishing,
        )
        return findings, describe_output(plan, made, findings, options.overwrite)


def describe_output(
    plan: MergePlan, made: Provenance, findings: list[Findings], overwrite: bool
) -> tuple[FileFacts, FileFacts]:
    """Write the provenance beside the output; facts of both files."""
    facts, note = file_facts(plan.out), provenance_path(plan.out)
    text = text_beside(made, facts, findings, effect_of(plan.meters).record())
    write_text(note, text, overwrite)
    data = text.encode()
    return facts, FileFacts(note, len(data), f"sha256:{sha256(data).hexdigest()}")


def _streaming_checks(
    plan: MergePlan, options: MergeOptions, findings: list[Findings], written: FileFacts
) -> tuple[Check, ...]:
    allowed = plan.spec.allow_nonfinite
    scanned = sum(options.scan == "all" or r.action != "copy" for r in plan.rows)
    limit = "any: allow_nonfinite" if allowed else 0
    unfit = f"tensors with NaN, Inf or overflow, of {scanned} scanned"
    return (
        Check(unfit, len(findings), limit, allowed or not findings),
        Check("size of the output, bytes", written.bytes, plan.output_bytes, written.bytes == plan.output_bytes),
    )
