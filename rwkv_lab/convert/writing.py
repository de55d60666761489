"""A plan carried out: tensors streamed into the output, which appears whole or not at all."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

from rwkv_lab.arguments import checked
from rwkv_lab.checkpoint import file_facts
from rwkv_lab.checkpoint.output_checks import check_free_space, check_output
from rwkv_lab.checkpoint.stream import Findings, OutTensor
from rwkv_lab.checks import Check
from rwkv_lab.convert.hub_push import push_to_hub
from rwkv_lab.convert.made_from import with_weights
from rwkv_lab.convert.plan import ConvertPlan, ConvertResult, Rounding, place_of
from rwkv_lab.convert.verify import verify_convert
from rwkv_lab.lazy_torch import torch
from rwkv_lab.progress import human_bytes

log = logging.getLogger(__name__)


@checked
def write_convert(plan: ConvertPlan) -> ConvertResult:
    """Carry out a plan, and unless its options say otherwise compare the output with the source. With `push_to_hub` it
    is uploaded after that, if every check has passed.

    Raises:
        ParameterError: the source has changed since the plan was made.
        OutputError: `out` cannot be written there, or not any more.
        NumericsError: NaN, Inf or overflow, unless `allow_nonfinite`; nothing is left behind.
        HubError: the upload failed; the output is complete.
    """
    if plan.options.dry_run:
        return ConvertResult(plan)
    with plan.source_opened():
        check_output(plan.out, [plan.checkpoint], plan.options.allowed_dir, plan.options.overwrite)
        check_free_space(plan.out, plan.output_bytes, plan.memory_needed, "the conversion")
        log.info("%s: %d tensors, %s", plan.spec.to, len(plan.rows), human_bytes(plan.output_bytes))
        start = time.perf_counter()
        rounding, checksums = dict[str, Rounding](), dict[str, int]()
        notes = with_weights(plan.content.notes, plan.checkpoint)
        content = replace(
            plan.content, tensors=[_watched(t, rounding, checksums) for t in plan.content.tensors], notes=notes
        )
        refuse = not plan.spec.allow_nonfinite
        findings = plan.container.write(plan.out, content, plan.options.overwrite, refuse)
        seconds = {"write": time.perf_counter() - start}
    result = ConvertResult(
        plan=plan,
        outputs=(file_facts(plan.out),),
        checks=_checks(plan, findings),
        rounding=tuple(rounding[t.name] for t in plan.content.tensors if t.name in rounding),
        nonfinite=tuple(map(str, findings)),
        checksums=checksums,
        seconds=seconds,
    )
    if not plan.options.verify:
        return result
    start = time.perf_counter()
    checks = tuple(verify_convert(result))
    seconds |= {"verify": time.perf_counter() - start}
    return _uploaded(replace(result, checks=(*result.checks, *checks), seconds=seconds))


def _uploaded(result: ConvertResult) -> ConvertResult:
    """The result with what became of its upload, where one is asked for and the output is right."""
    options = result.plan.options
    if not options.push_to_hub or not all(check.passed for check in result.checks):
        return result
    start = time.perf_counter()
    pushed = push_to_hub(result.out, options.model_name, private=options.private, licence=options.licence)
    seconds = result.seconds | {"upload": time.perf_counter() - start}
    return replace(result, pushed=pushed, checks=(*result.checks, *pushed.checks), seconds=seconds)


def _watched(t: OutTensor, rounding: dict[str, Rounding], checksums: dict[str, int]) -> OutTensor:
    """The tensor, watched: where it is cast, what becomes of its values, where it is copied, their CRC-32."""
    if t.compute is None:
        return t if t.source is None else replace(t, checksum=partial(checksums.__setitem__, place_of(t.source)))

    def count(start: int, values: torch.Tensor, rounded: torch.Tensor) -> None:
        if values.dtype != rounded.dtype:
            rounding[t.name] = _add(rounding.get(t.name, Rounding(t.name, 0)), values, rounded)

    return replace(t, watch=count)


def _add(total: Rounding, values: torch.Tensor, rounded: torch.Tensor) -> Rounding:
    """With one more piece of values, which lies in the processor's cache; rounding makes no zero another value."""
    changed = int((rounded.to(values.dtype) != values).sum())
    flushed = int(values.count_nonzero() - rounded.count_nonzero())
    overflow = nan = 0
    if not bool(rounded.isfinite().all()):
        overflow = int((rounded.isinf() & values.isfinite()).sum())
        nan = int(values.isnan().sum())
    return Rounding(
        total.name,
        total.values + values.numel(),
        total.rounded + changed - overflow - flushed - nan,
        total.overflow + overflow,
        total.flushed + flushed,
    )


def _checks(plan: ConvertPlan, findings: Iterable[Findings]) -> tuple[Check, ...]:
    allowed, count = plan.spec.allow_nonfinite, len(list(findings))
    paths = [plan.out, *plan.out.iterdir()] if plan.out.is_dir() else [plan.out]
    written = sum(path.stat().st_size for path in paths if path.is_file())
    return (
        Check(
            f"tensors with NaN, Inf or overflow, of {len(plan.rows)}",
            count,
            "any: allow_nonfinite" if allowed else 0,
            allowed or not count,
        ),
        Check("size of the output, bytes", written, plan.output_bytes, written == plan.output_bytes),
    )
