"""The steps of a training: batches, gradients, updates, measurements on the way, checkpoints."""

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from rwkv_lab.errors import CorruptFileError, NumericsError
from rwkv_lab.progress import Progress
from rwkv_lab.train.batches import SKIP, Rows, Windows, held_out_bits, nats
from rwkv_lab.train.optimiser import make_optimiser, set_lr
from rwkv_lab.train.processes import Processes, put
from rwkv_lab.train.recipe import AUTOCASTS, Recipe, Tuning
from rwkv_lab.train.resume import Course, load_course, save_course

log = logging.getLogger(__name__)

CLIP = 1.0  # largest norm of the gradient
_BITS = 1 / math.log(2)  # per nat


@dataclass(frozen=True)
class Watch:
    """What is done between the steps.

    eval_every: steps between two measurements on held-out text; 0 for none.
    patience: measurements in a row without a new best after which to stop; 0 never stops. The best values are kept.
    checkpoint_every: steps between two checkpoints at `resume_file`; 0 for none.
    resume: go on from `resume_file` where it is there.
    settings: what has to be the same for that.
    on_step: called by every process after every step, with the number of steps and the losses so far.
    """

    eval_every: int = 0
    patience: int = 0
    checkpoint_every: int = 0
    resume: bool = False
    resume_file: Path | None = None
    settings: Mapping[str, object] | None = None
    on_step: Callable[[int, list[float]], object] | None = None


class Fitting:
    """One training in progress: a model that is changed in place.

    Args:
        run: what is called in place of the model, see `Processes.wrap`.
        trained: the parameters that are trained, by name.
    """

    def __init__(
        self,
        run: nn.Module,
        trained: Mapping[str, nn.Parameter],
        material: Windows | Rows,
        recipe: Recipe,
        tuning: Tuning,
        watch: Watch,
        processes: Processes,
    ):
        self.run, self.trained, self.material, self.recipe = run, trained, material, recipe
        self.tuning, self.watch, self.processes = tuning, watch, processes
        self.device = next(iter(trained.values())).device
        self.autocast = AUTOCASTS[tuning.autocast]
        self.optimiser = make_optimiser(trained, recipe, fused=not processes.sharded)
        # float16 holds nothing below 6e-8: gradients are scaled up for the backward pass, and down again after it.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.autocast == torch.float16)
        self.course, self.best = Course(), {}
        if watch.resume and watch.resume_file.exists():
            self.course, best, position = load_course(watch.resume_file, watch.settings, trained, self.optimiser)
            self.best = {name: torch.zeros_like(trained[name]) for name in best}
            for name, values in best.items():
                put(self.best[name], values)
            try:
                self.material.go_on_from(position)
                self.scaler.load_state_dict(self.course.scaler)
            except (KeyError, ValueError, TypeError, RuntimeError) as e:
                raise CorruptFileError(
                    f"{watch.resume_file} is damaged: it cannot be gone on from ({e}). Remove it to begin anew."
                ) from e
            log.info("Going on after step %d of %d.", self.course.step, recipe.steps)
        self.resumed_at = self.course.step

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
        course, watch = self.course, self.watch
        tokens = self.recipe.batch_size * self.recipe.accumulate * self.recipe.ctx_len
        left = self.recipe.steps - course.step
        with Progress(self.tuning.kind, total=left * tokens, unit="tokens") as progress:
            while course.step < self.recipe.steps and not self._has_waited_long_enough():
                start = time.perf_counter()
                row = self._step()
                row["seconds"] = round(time.perf_counter() - start, 4)
                if watch.eval_every and course.step % watch.eval_every == 0:
                    row["held_out"] = self._compare_with_best()
                course.log.append(row)
                if watch.checkpoint_every and course.step % watch.checkpoint_every == 0:
                    self._save()
                progress.advance(tokens)
                if watch.on_step:
                    watch.on_step(course.step, course.losses)
        early = self._has_waited_long_enough()
        if self.best and course.worse_since:
            for name, values in self.best.items():
                with torch.no_grad():
                    self.trained[name].copy_(values)
        return early

    def _step(self) -> dict[str, object]:
        """One update; a row for the log."""
        recipe, processes, course = self.recipe, self.processes, self.course
        rate = set_lr(self.optimiser, recipe, course.step)
        tokens, targets = self.material.draw(recipe.batch_size * recipe.accumulate)
        count = int((targets != SKIP).sum())  # of the whole step, so that every token weighs the same
        mine, loss = processes.rows(recipe.batch_size), torch.zeros((), device=self.device)
        self.optimiser.zero_grad()
        batches = list(zip(tokens.split(recipe.batch_size), targets.split(recipe.batch_size), strict=True))
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
        norm = nn.utils.clip_grad_norm_(self.trained.values(), CLIP)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
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
        file = self.watch.resume_file
        kept = f"\n{file.name} is the last good checkpoint." if file and file.exists() else ""
        return NumericsError(
            f"The {what} is {value} at step {self.course.step}; try a smaller lr than {self.recipe.lr}.{kept}"
        )

    def _compare_with_best(self) -> float:
        course, bits = self.course, self.measure()
        course.held_out.append((course.step, bits))
        if course.best is None or bits < course.best:
            course.best, course.worse_since = bits, 0
            if self.watch.patience:
                self.best = {name: p.detach().clone() for name, p in self.trained.items()}
        else:
            course.worse_since += 1
        return bits

    def _has_waited_long_enough(self) -> bool:
        return 0 < self.watch.patience <= self.course.worse_since

    def _save(self) -> None:
        self.course.scaler = self.scaler.state_dict()
        position = self.material.position()
        save_course(
            self.watch.resume_file,
            self.course,
            self.watch.settings,
            self.trained,
            self.optimiser,
            self.best,
            position,
            self.processes,
        )

    def _autocast(self):
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)
