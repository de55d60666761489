"""The steps of a training: batches, gradients, updates, measurements on the way, checkpoints."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path

from rwkv_lab.errors import CorruptFileError, NumericsError
from rwkv_lab.lazy_torch import torch
from rwkv_lab.progress import Progress
from rwkv_lab.train.batches import SKIP, Rows, Windows, held_out_bits, nats
from rwkv_lab.train.optimiser import make_optimiser, schedule, set_lr
from rwkv_lab.train.processes import Processes, gathered, put
from rwkv_lab.train.resume import Course, load_course, save_course
from rwkv_lab.train.spec import ResolvedSpec, TrainOptions

log = logging.getLogger(__name__)

CLIP = 1.0  # largest norm of the gradient
_BITS = 1 / math.log(2)  # per nat


class Fitting:
    """One training in progress: a model that is changed in place.

    Args:
        run: what is called in place of the model, see `Processes.wrap`.
        trained: the parameters that are trained, by name.
        resume_file: where checkpoints go; training continues from it with `options.resume` where it is there.
        settings: what has to be the same for that.
        done: steps of a finished training that this one continues.
    """

    def __init__(
        self,
        run: torch.nn.Module,
        trained: Mapping[str, torch.nn.Parameter],
        material: Windows | Rows,
        spec: ResolvedSpec,
        options: TrainOptions,
        resume_file: Path,
        settings: Mapping[str, object],
        processes: Processes,
        done: int = 0,
    ):
        self.run, self.trained, self.material, self.spec, self.options = run, trained, material, spec, options
        self.resume_file, self.settings, self.processes = resume_file, settings, processes
        self.device = next(iter(trained.values())).device
        self.autocast = spec.autocast_dtype
        self.schedule = schedule(spec, done)
        self.optimiser = make_optimiser(trained, self.schedule, fused=not processes.sharded)
        # float16 holds nothing below 6e-8: gradients are scaled up for the backward pass, and down again after it.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.autocast == torch.float16)
        self.course, self.best = Course(step=done, before=done), {}
        if options.resume and resume_file.exists():
            self._resume()
        else:
            for _ in range(done):  # the batches continue where they ended
                material.draw(spec.batch_size * spec.accumulate)
        self.resumed_at = self.course.step

    def _resume(self) -> None:
        self.course, best, position = load_course(self.resume_file, self.settings, self.trained, self.optimiser)
        self.best = {name: torch.zeros_like(self.trained[name]) for name in best}
        for name, values in best.items():
            put(self.best[name], values)
        try:
            self.material.resume_from(position)
            self.scaler.load_state_dict(self.course.scaler)
        except (KeyError, ValueError, TypeError, RuntimeError) as e:
            raise CorruptFileError(
                f"{self.resume_file} is damaged: training cannot resume from it ({e}). Remove it to begin anew."
            ) from e
        log.info("Resumed after step %d of %d.", self.course.step, self.spec.steps)

    def measure(self) -> float:
        """Bits per byte of held-out text, as the model is now."""
        with self._autocast():
            return held_out_bits(self.run, self.material, self.device)

    def fit(self) -> bool:
        """Do the steps that are left; True where it ended early. The values are the best then, else the last.

        Raises:
            NumericsError: the loss or the gradient became NaN or infinite. The checkpoint is that of the last good step
                for which one was written.
        """
        course, spec, options = self.course, self.spec, self.options
        tokens = spec.batch_size * spec.accumulate * spec.ctx_len
        left = spec.steps - course.step
        with Progress(spec.kind, total=left * tokens, unit="tokens") as progress:
            while course.step < spec.steps and not self._has_waited_long_enough():
                start = time.perf_counter()
                row = self._step()
                row["seconds"] = round(time.perf_counter() - start, 4)
                if spec.eval_every and course.step % spec.eval_every == 0:
                    row["held_out"] = self._compare_with_best()
                course.log.append(row)
                if options.checkpoint_every and course.step % options.checkpoint_every == 0:
                    self._save()
                progress.advance(tokens)
                if options.on_step:
                    options.on_step(course.step, course.losses)
        early = self._has_waited_long_enough()
        if self.best and course.worse_since:
            for name, values in self.best.items():
                with torch.no_grad():
                    self.trained[name].copy_(values)
        return early

    def _step(self) -> dict[str, object]:
        """One update; a row for the log."""
        spec, processes, course = self.spec, self.processes, self.course
        rate = set_lr(self.optimiser, self.schedule, course.step)
        tokens, targets = self.material.draw(spec.batch_size * spec.accumulate)
        count = int((targets != SKIP).sum())  # of the whole step, so that every token weighs the same
        mine, loss = processes.rows(spec.batch_size), torch.zeros((), device=self.device)
        self.optimiser.zero_grad()
        batches = list(zip(tokens.split(spec.batch_size), targets.split(spec.batch_size), strict=True))
        for i, (some, theirs) in enumerate(batches):
            with processes.collecting(self.run, last=i == len(batches) - 1):
                with self._autocast():
                    logits, _ = self.run(some[mine].to(self.device))
                    part = nats(logits, theirs[mine].to(self.device)) / count
                # DistributedDataParallel and FSDP2 take the mean over processes; what is wanted is the sum.
                self.scaler.scale(part * processes.size).backward()
            loss = loss + part.detach()
        bits = processes.total(loss) * _BITS
        if not math.isfinite(bits):
            raise self._not_finite("loss", bits)
        self.scaler.unscale_(self.optimiser)
        norm = float(gathered(torch.nn.utils.clip_grad_norm_(self.trained.values(), CLIP)))
        if not math.isfinite(norm) and not self.scaler.is_enabled():  # the scaler leaves such a step out by itself
            raise self._not_finite("gradient's norm", norm)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        course.step += 1
        course.losses.append(bits)
        return {
            "step": course.step,
            "loss": bits,
            "lr": rate,
            "grad_norm": norm if math.isfinite(norm) else None,
            "tokens": count,
            "held_out": None,
        }

    def _not_finite(self, what: str, value: float) -> NumericsError:
        file = self.resume_file
        kept = f"\n{file.name} is the last good checkpoint." if file and file.exists() else ""
        return NumericsError(
            f"The {what} is {value} at step {self.course.step}; try a smaller lr than {self.spec.lr}.{kept}"
        )

    def _compare_with_best(self) -> float:
        course, bits = self.course, self.measure()
        course.held_out.append((course.step, bits))
        if course.best is None or bits < course.best:
            course.best, course.worse_since = bits, 0
            if self.spec.patience:
                self.best = {name: p.detach().clone() for name, p in self.trained.items()}
        else:
            course.worse_since += 1
        return bits

    def _has_waited_long_enough(self) -> bool:
        return 0 < self.spec.patience <= self.course.worse_since

    def _save(self) -> None:
        self.course.scaler = self.scaler.state_dict()
        position = self.material.position()
        save_course(
            self.resume_file,
            self.course,
            self.settings,
            self.trained,
            self.optimiser,
            self.best,
            position,
            self.processes,
        )

    def _autocast(self):
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)
