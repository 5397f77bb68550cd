"""The training step on one screen, and the loop around it: evaluate, save, resume, stop.

    plan = make_plan(…)                                                                     # plan.py
    result = train(model_config, loader, plan, Run(directory, …, tasks=(Task(…),), report=…, stop=…))

A step is a pure function of the parameters, the moments and its own number: the number gives the samples (those that a
rollback left out are jumped over), the learning rate, the length of windows and the seed of dropout. What a checkpoint
and rollbacks.json hold is therefore enough to continue bit by bit.
Not here: what a run will do (plan.py), data order (data/loader.py), the files of a checkpoint (checkpoint/store.py),
anything that prints.
"""

import contextlib
import functools
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from megalodon.checkpoint.saver import Saver
from megalodon.checkpoint.store import (
    Saved,
    clean_leftovers,
    load_tensors,
    newest_good_step,
    point_at_best,
    set_aside,
    step_path,
    steps_in,
    verify_step,
)
from megalodon.data.loader import IGNORED, Batch, Samples
from megalodon.data.prefetch import Prefetch
from megalodon.errors import CheckpointError, EnvironmentFault, NumericalError
from megalodon.model.architectures import LanguageModel, LanguageModelConfig, ModelState
from megalodon.model.loss import loss_sums
from megalodon.parallel.ranks import ALONE, Ranks
from megalodon.training.execution import compile_model, deterministic, eager
from megalodon.training.guard import StepGuard, Verdict
from megalodon.training.health import health_row
from megalodon.training.memory import explained
from megalodon.training.metrics import MetricsLog, machine_row
from megalodon.training.optim import clip, gradient_norms
from megalodon.training.plan import Plan
from megalodon.training.rollback import (
    Rollback,
    as_rollbacks,
    first_sample,
    merged,
    newest_of_run,
    read_rollbacks,
    write_rollbacks,
)
from megalodon.training.schedule import learning_rate, window_length
from megalodon.training.weights import Weights

Row = dict[str, Any]
Report = Callable[[Row], None]
"""Receives every row of metrics.jsonl, and rows of kind `note` and `warning` with a `text`, which are not written."""


class Task(NamedTuple):
    """Something the loop asks for between two steps: at the start, every `every` steps and at the end."""

    call: Callable[[LanguageModel], list[Row] | None]
    """Returns rows for metrics.jsonl, or None if it was abandoned because a stop was asked for."""
    every: int | None = None
    at_start: bool = False
    averaged: bool = False
    """With optim.ema: called again with the averaged weights, whose scores join the rows as ema_valid_loss …"""
    by_all: bool = False
    """Called on every rank, with the model as it is spread; else on the main one, with a whole copy."""

    def due(self, step: int, horizon: int) -> bool:
        """Whether the task runs after `step` steps."""
        if step == 0:
            return self.at_start
        return step == horizon or (self.every is not None and step % self.every == 0)


@dataclass(frozen=True)
class Run:
    """Where a run writes, how it talks and when it stops."""

    directory: Path
    num_classes: int
    """Ids of the tokenizer; padded rows of the output matrix get no probability."""
    bytes_table: NDArray[np.int64]
    """Bytes of text that each id stands for."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What the manifest of a checkpoint records besides its files: frozen values, versions."""
    tasks: tuple[Task, ...] = ()
    """In the order in which they run."""
    build: Callable[[LanguageModel], None] | None = None
    """Called with every model that was just made: gives it what no checkpoint holds, frozen weights and adapters."""
    initialise: Callable[[LanguageModel], None] | None = None
    """Called with the model of a run that starts at step 0, before its first step: weights from elsewhere."""
    ranks: Ranks = ALONE
    """The processes that train together. All write their parts of a checkpoint; only the main one writes anything else,
    reports, and runs tasks that are not `by_all`."""
    resume_from: Path | None = None
    """The one checkpoint to continue from; None = the newest of this run that verifies."""
    begin: Callable[[], None] = lambda: None
    """Called once the state of the run is in place; only from then on the run directory changes."""
    report: Report = lambda row: None
    beat: Callable[[], None] = lambda: None
    """Called between two steps; shows others that the owner of the run directory lives."""
    stop: Callable[[], str | None] = lambda: None
    """Returns why the run is to stop after this step, or None."""
    around: Callable[[int], AbstractContextManager[object]] = contextlib.nullcontext
    """Entered around each step, by its number: a trace, for example. It changes nothing of the step."""
    stop_at_step: int | None = None
    max_seconds: float | None = None
    peak_flops: float | None = None
    """Measured floating-point operations/s of this machine's matrix product."""


class Result(NamedTuple):
    """How a run ended."""

    status: Literal["finished", "milestone", "stopped"]
    step: int
    tokens: int
    seconds: float
    """Of this process."""
    reason: str
    """Why it stopped before the horizon; empty when finished."""
    saved: Path | None
    """The newest checkpoint; None if the run stopped before its first step."""
    model: LanguageModel
    """With optim.ema a finished run's has the averaged weights. The main rank's is whole."""


class _Pass(NamedTuple):
    """What the passes of a step found, all micro-batches together."""

    targets: int
    bytes: int
    """Of text that the targets stand for."""
    loss: float
    """Mean over the targets, in nats, without the penalty."""
    z: float
    """Mean of logsumexp²."""
    state: ModelState | None
    """After the last micro-batch; None if no health row is due."""
    gradients: dict[str, Tensor]
    """By name of the parameter; with several ranks of this one's parts."""


def train(model_config: LanguageModelConfig, loader: Samples, plan: Plan, run: Run) -> Result:
    """Train a model in a run directory, continuing from its newest checkpoint that verifies.

    Raises:
        NumericalError: the guard gave up.   CheckpointError: checkpoints exist and none can be used.
        EnvironmentFault: a checkpoint could not be written.   OutOfMemory: the device's memory does not suffice.
    """
    with explained(plan, building=True):
        trainer = Trainer(model_config, loader, plan, run)
    with (
        deterministic(plan.config.deterministic),
        explained(plan),
        contextlib.closing(trainer.metrics),
        trainer.saves_ended(),
        contextlib.closing(trainer.batches),
    ):
        trainer.resume()
        trainer.compile()
        return trainer.run_to_the_end()


class Trainer:
    """A model, its optimizer and how far they are."""

    def __init__(self, model_config: LanguageModelConfig, loader: Samples, plan: Plan, run: Run) -> None:
        self.loader, self.plan, self.run = loader, plan, run
        self.ranks = ranks = run.ranks
        share = ranks.data_rank, ranks.layout.data_ranks
        self.batches = Prefetch(lambda first: loader.batch(first, plan.rows, *share), plan.rows)
        self.weights = Weights(model_config, plan, ranks, run.build)
        self.model, self.optimizer = self.weights.model, self.weights.optimizer
        guard = plan.config.guard
        self.guard = StepGuard(guard.nonfinite, guard.spike)
        self.rollbacks: list[Rollback] = []
        self.metrics = MetricsLog(run.directory / "metrics.jsonl")
        self.checkpoints = run.directory / "checkpoints"
        self.flops = model_config.flops_per_token(plan.seq_len)
        self.dropout = model_config.has_dropout
        self.dropout |= any(isinstance(part, nn.Dropout) and part.p > 0 for part in self.model.modules())
        self.step, self.updates, self.tokens, self.targets = 0, 0, 0, 0
        self.consumed = 0
        """The global number of the next sample."""
        self.skipped_ranges: list[list[int]] = []
        """The samples [start, stop) below it that were jumped over and never trained on."""
        self.observed = -1
        """The last step whose tasks are done."""
        self.valid_loss: float | None = None
        """Of the last step whose tasks are done; None if it had none."""
        self.began = self.saved_at = time.monotonic()
        self.saver = Saver(self.checkpoints, plan.checkpoint)
        self.saved: Path | None = None
        self.saved_step = 0

    def compile(self) -> None:
        """Compile what the recipe asks for, and say so."""
        split = self.ranks.layout.tp > 1  # then parts of a layer exchange features; what insists was refused before
        wanted = False if split else self.plan.config.compile
        if text := compile_model(self.model, wanted, self.plan.device):
            self.run.report({"kind": "note", "event": "compile", "text": text})

    def train_step(self) -> list[Row]:
        """Take one optimizer step: batch, gradient, verdict, update; return its rows of metrics.

        No row: the step rolled the run back, which now stands before an earlier one.
        """
        begin = time.monotonic()
        step, plan = self.step + 1, self.plan
        first, jumped = first_sample(step, plan.rows, self._left_out())
        batch = self.batches.get(first)
        loaded = time.monotonic()
        if self.dropout:
            torch.manual_seed(_step_seed(plan.config.seed, step, self.ranks.stream))
        length = window_length(plan.config.seq_len_warmup, step, plan.horizon, plan.batch_tokens, plan.seq_len)
        look = plan.log.health_every is not None and step % plan.log.health_every == 0
        found = self._gradient(batch.cut(length), look)
        norm, norms = torch.zeros(()), dict[str, float]()
        if found.targets:
            norm, norms = gradient_norms(found.gradients, self.ranks.copies, self.ranks.sums)
        verdict = self.guard.judge(step, found.loss, float(norm)) if found.targets else None
        if verdict and verdict.event == "rollback":
            self._roll_back(step, first, verdict, found.gradients)
            return []
        if verdict and verdict.event:
            self._event(step, verdict.event, verdict.reason, first, found.gradients)
        elif not found.targets:
            self._event(step, "empty", "no target in the whole step; nothing was updated", first, found.gradients)
        rate = learning_rate(plan.optim, step, plan.horizon, plan.batch_tokens)
        if verdict and verdict.accept:
            self._update(norm, rate)
        self.weights.drop_gradients()
        self.step, self.consumed, self.skipped_ranges = step, first + plan.rows, jumped
        self.tokens, self.targets = self.tokens + plan.batch_tokens, self.targets + found.targets
        row = self._numbers(found, norms, float(norm)) | {"lr": rate, "seq_len": length}
        row |= machine_row(plan.batch_tokens, begin, loaded, self.flops, self.run.peak_flops, plan.device)
        health = None
        if look:
            with self.ranks.whole_features(found.state) as state:
                health = health_row(self.model, state)
        return [row, {"kind": "health", "step": step} | health] if health else [row]

    def _gradient(self, batch: Batch, keep_state: bool = False) -> _Pass:
        """Leave the gradient of the mean loss over all targets of the step in the parameters.

        Losses are summed over micro-batches and ranks and divided by the targets of the whole step, so that the cut
        into micro-batches, and who takes which, changes rounding only. Windows that were cut shorter come with as many
        more rows.
        """
        plan, model, ranks = self.plan, self.model, self.ranks
        scored = batch.targets[batch.targets != IGNORED]
        total, num_bytes = ranks.total(len(scored), int(self.run.bytes_table[scored].sum()))
        if total == 0:
            return _Pass(0, 0, 0.0, 0.0, None, {})
        model.train()
        loss, squares = torch.zeros((), device=plan.device), torch.zeros((), device=plan.device)
        state: ModelState | None = None
        rows = plan.micro_rows * (plan.seq_len // batch.tokens.shape[1])
        for first in range(0, len(batch.tokens), rows):
            tokens, targets, starts = (torch.from_numpy(x[first : first + rows]) for x in batch)
            begins = starts if bool(starts.any()) else None  # on the host: the model asks them
            ranks.last_pass(model, first + rows >= len(batch.tokens))
            with torch.autocast(plan.device.type, torch.bfloat16, enabled=plan.bf16):
                hidden, after = model.hidden(**ranks.piece(model, tokens, begins))
                hidden, targets = ranks.scored(hidden, targets.to(plan.device))
                sums = loss_sums(
                    hidden,
                    model.output_weight,
                    targets,
                    plan.config.loss_chunk,
                    num_classes=self.run.num_classes,
                    z_loss=plan.optim.z_loss,
                    backend=model.backend,
                )
            (sums.objective / total).backward()
            loss, squares = loss + sums.loss, squares + sums.squares
            state = after.detach() if keep_state else None
        gradients = self.weights.gradients()
        loss_sum, square_sum = ranks.sums([float(loss), float(squares)])
        return _Pass(total, num_bytes, loss_sum / total, square_sum / total, state, gradients)

    def _update(self, norm: Tensor, rate: float) -> None:
        """Clip the gradient, whose norm is given, and let the optimizer and the average take it in."""
        if self.plan.optim.grad_clip is not None:
            clip(self.weights.parameters, norm, self.plan.optim.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.updates += 1
        if self.weights.average:
            self.weights.average.update(self.updates)

    def _numbers(self, found: _Pass, norms: Mapping[str, float], norm: float) -> Row:
        """What a row of kind `train` says of the step just taken, which has no loss and norm if it had no target."""
        scored, limit = found.targets > 0, self.plan.optim.grad_clip
        return {
            "kind": "train",
            "step": self.step,
            "loss": found.loss if scored else None,
            "z": found.z if scored else None,
            "bits_per_byte": found.loss * found.targets / math.log(2) / found.bytes if found.bytes else None,
            "grad_norm": norm if scored else None,
            "norms": dict(norms),
            "clip": min(1.0, limit / (norm + 1e-6)) if scored and limit is not None else 1.0,
            "tokens": self.tokens,
            "skips": self.guard.skips,
            "spikes": self.guard.spikes,
            "rollbacks": len(self.rollbacks),
        }

    def _event(self, step: int, event: str, reason: str, first: int, gradients: Mapping[str, Tensor]) -> None:
        """Log an unusual step with the samples it read (first, number) and, if values are not finite, where."""
        row: Row = {"kind": "event", "step": step, "event": event, "reason": reason, "samples": [first, self.plan.rows]}
        broken = self.weights.nonfinite(gradients)
        self._write(row | ({"nonfinite": broken} if broken else {}))

    def _left_out(self) -> list[list[int]]:
        """Samples [start, stop) that no step may read, of all rollbacks."""
        return [ends for rollback in self.rollbacks for ends in rollback.samples]

    def _roll_back(self, step: int, first: int, verdict: Verdict, gradients: Mapping[str, Tensor]) -> None:
        """Stand where the newest checkpoint from before the bad steps was saved, and leave their samples out.

        Raises: NumericalError if the rollbacks are used up or no checkpoint is older; the message tells them all.
        """
        limit, rows = self.plan.config.guard.max_rollbacks, self.plan.rows
        self._await_save()
        saved, why = None, f"train.guard.max_rollbacks {limit} does not allow another rollback"
        if len(self.rollbacks) < limit:
            why = f"no checkpoint from before step {verdict.bad[0]} to go back to"
            try:
                verify = self.plan.checkpoint.verify
                find = functools.partial(newest_good_step, self.checkpoints, verify, before=verdict.bad[0])
                saved, faults = self.ranks.from_main(find)
                self._tell(faults)
            except CheckpointError as error:
                why = f"{why}: {error}"
        if saved is None:
            self._event(step, "stop", f"{verdict.reason}; {why}", first, gradients)
            before = "".join(f"; step {r.at} went back to {r.to}: {r.reason}" for r in self.rollbacks)
            hint = "lower optim.lr, lengthen optim.warmup, or raise train.guard.max_rollbacks; "
            hint += "the same command continues from the newest checkpoint"
            raise NumericalError(f"step {step}: {verdict.reason}; {why}{before}", hint)
        samples = merged((first_sample(bad, rows, self._left_out())[0] for bad in verdict.bad), rows)
        rollback = Rollback(step, saved.step, samples, verdict.reason, self.weights.nonfinite(gradients))
        if self.ranks.main:
            write_rollbacks(self.run.directory, [*self.rollbacks, rollback])
        self.rollbacks.append(rollback)
        self.weights.drop_gradients()
        self._restore(saved)
        self._cut_back()

    def _cut_back(self) -> None:
        """Drop checkpoints and rows from after the step that was restored; see that every rollback has its row."""
        if not self.ranks.main:
            return
        for step in steps_in(self.checkpoints):
            if step > self.step:  # they did not verify or were rolled back, and would push good ones out
                set_aside(step_path(self.checkpoints, step))
        point_at_best(self.checkpoints)  # in any case: a process killed between the two left it to this one
        self.metrics.open_at(self.step, self.observed == self.step)
        logged = sum(row["kind"] == "event" and row["event"] == "rollback" for row in self.metrics.rows())
        for rollback in self.rollbacks[logged:]:
            self._write({"kind": "event", "step": self.step, "event": "rollback", **rollback.row()})

    def run_to_the_end(self) -> Result:
        """Alternate steps with what is due between them, until the horizon or a reason to stop."""
        while True:
            reason = self._stop_reason()
            if reason is None and self.observed != self.step and not self._observe():
                reason = self._stop_reason() or "a stop was asked for"
            if reason is not None:
                self._save()
                return self._result("stopped", reason)
            if self.step >= self.plan.horizon:
                self._save()
                return self._result("finished", "")
            if self.run.stop_at_step is not None and self.step >= self.run.stop_at_step:
                self._save()
                return self._result("milestone", f"step {self.run.stop_at_step:,} was asked for")
            if self._save_due():
                self._save(background=self.plan.checkpoint.background)
            with self.run.around(self.step + 1):
                rows = self.train_step()
            for row in rows:
                self._write(row)

    def _result(self, status: Literal["finished", "milestone", "stopped"], reason: str) -> Result:
        seconds = time.monotonic() - self.began
        if status != "finished" and self.step != self.saved_step:
            lost = f"step {self.step:,} could not be saved, the newest checkpoint is of step {self.saved_step:,}"
            raise EnvironmentFault(f"stopping ({reason}): {lost}; the same command continues from there")
        if self.weights.average and status == "finished":
            self.weights.average.swap()
        model = self.weights.whole_model() if status == "finished" else self.model
        return Result(status, self.step, self.tokens, seconds, reason, self.saved, model)

    def _stop_reason(self) -> str | None:
        """Why to stop here, or None; the same verdict on every rank, whichever was told."""
        return self.ranks.first(self._own_reason())

    def _own_reason(self) -> str | None:
        stop_file = self.run.directory / "stop"
        if self.ranks.main and stop_file.exists():
            stop_file.unlink(missing_ok=True)
            return "the file `stop`"
        limit = self.run.max_seconds
        if limit is not None and time.monotonic() - self.began >= limit:
            return f"--max-time {limit:g} s"
        return self.run.stop()

    def _observe(self) -> bool:
        """Run the tasks that are due; False if one was abandoned, and then nothing of this step is logged."""
        due = [task for task in self.run.tasks if task.due(self.step, self.plan.horizon)]
        found: list[Row] = []
        self.model.eval()
        for task in due:
            try:
                with eager(self.model):
                    rows = self._ask(task)
            except Exception as error:  # whatever it is, the steps since the last save must not be lost with it
                # One that not all ranks have leaves the others in the task: they would not come to the save.
                if not isinstance(error, NumericalError) and self.ranks.all_have(error):
                    self._save()
                raise
            if rows is None:
                return False
            found += rows
        for row in found:
            self._write({"kind": row["kind"], "step": self.step, "tokens": self.tokens, **row})
        self.observed = self.step
        self.valid_loss = next((row["valid_loss"] for row in found if row["kind"] == "eval"), None)
        return True

    def _ask(self, task: Task) -> list[Row] | None:
        """Call a task; its rows, with the scores of the averaged weights where it asks for them."""
        rows = self._called(task)
        if rows is None or not (task.averaged and self.weights.average):
            return rows
        with self.weights.average.swapped_in():
            again = self._called(task)
        scores = ("valid_loss", "bits_per_byte")
        if again is None:
            return None
        return [
            row | {f"ema_{key}": other[key] for key in scores if key in other}
            for row, other in zip(rows, again, strict=True)
        ]

    def _called(self, task: Task) -> list[Row] | None:
        """Its rows, on every rank; None if it was abandoned."""
        if task.by_all:
            rows = task.call(self.model)
            self.ranks.at_rest(self.model)
            return rows
        model = self.weights.whole_model()
        return self.ranks.from_main(lambda: task.call(model))

    def _write(self, row: Row) -> None:
        if not self.ranks.main:
            return
        self.metrics.write(row)
        self.run.report(row)

    def _save_due(self) -> bool:
        """Whether to save between these two steps; also tells of a save in the background that has ended."""
        self.run.beat()
        wanted, fault = False, list[Exception]()
        if self.ranks.main:
            try:
                wanted = self._main_wants_to_save()
            except Exception as error:
                fault.append(error)
        due, failed = self.ranks.any(wanted, bool(fault))
        if failed:
            self.ranks.from_main(lambda: _raise(fault[0]))
        return due

    def _main_wants_to_save(self) -> bool:
        self._settle()
        save_file = self.run.directory / "save"
        asked = save_file.exists()
        save_file.unlink(missing_ok=True)
        if self.step in (self.saved_step, self.saver.pending):
            if asked:
                where = "is being saved" if self.saver.pending else f"is saved already: {self.saved}"
                text = f"step {self.step:,} {where}" if self.step else "nothing to save before the first step"
                self.run.report({"kind": "note", "event": "asked", "step": self.step, "text": text})
            return False
        config = self.plan.checkpoint
        late = config.every_minutes is not None and time.monotonic() - self.saved_at >= config.every_minutes * 60
        return asked or late or (config.every is not None and self.step % config.every == 0)

    def _save(self, *, background: bool = False) -> None:
        """Commit a checkpoint of this step, once, or begin to; before the first step there is nothing to save."""
        begin = time.monotonic()
        self._await_save()
        if self.step == self.saved_step:
            return
        self.ranks.from_main(self.metrics.sync)
        tensors, share = self.weights.saved()
        self.saved_at = time.monotonic()
        said = self._state(), self._about()
        self.saver.save(self.step, tensors, *said, background=background, since=begin, share=share)
        if not background:
            self._await_save()

    def _await_save(self) -> None:
        """Let the save in flight end; then all ranks know the newest checkpoint, or raise what the main one does."""
        mine: Exception | None = None
        if not self.ranks.main:
            try:
                self.saver.poll(wait=True)
            except Exception as error:  # the main rank was told too, and decides
                mine = error
        try:
            self.saved, self.saved_step = self.ranks.from_main(self._settled)
        except Exception as error:
            if mine is not None:
                raise error from mine
            raise

    def _settled(self) -> tuple[Path | None, int]:
        self._settle(wait=True)
        return self.saved, self.saved_step

    def _state(self) -> dict[str, Any]:
        """The scalars of a checkpoint."""
        return {
            "step": self.step,
            "updates": self.updates,
            "tokens": self.tokens,
            "targets": self.targets,
            "observed": self.observed,
            "guard": self.guard.state(),
            "rollbacks": [rollback.row() for rollback in self.rollbacks],
            "data": self.loader.state(self.consumed, self.skipped_ranges),
            "seed": self.plan.config.seed,
            "schedule": {"name": self.plan.optim.schedule, "horizon": self.plan.horizon},
            "optimizer": [
                {key: value for key, value in group.items() if key in ("lr", "betas", "eps", "weight_decay", "names")}
                for group in self.optimizer.param_groups
            ],
        }

    def _about(self) -> dict[str, Any]:
        """What the manifest of a checkpoint says besides its files."""
        loss = self.valid_loss if self.observed == self.step else None
        scored = loss if loss is not None and math.isfinite(loss) else None
        return {**self.run.about, "data": self.loader.store.fingerprint, "valid_loss": scored}

    def _settle(self, *, wait: bool = False) -> None:
        """Tell how the save in flight ended, if it has. Raises: EnvironmentFault if it failed and on_error is stop."""
        try:
            done = self.saver.poll(wait=wait)
            if done is None:
                return
            self.saved, self.saved_step = done.path, done.step
            waited = f", {done.waited:.1f} s of it waited for" if done.waited < done.seconds else ""
            text = f"saved step {done.step:,} in {done.seconds:.1f} s{waited}: {done.path}"
            self.run.report({"kind": "note", "event": "saved", "step": done.step, "text": text})
            if done.trouble:
                raise done.trouble
        except EnvironmentFault as error:
            if self.plan.checkpoint.on_error == "stop":
                raise
            self.run.report(
                {"kind": "warning", "text": f"{error}; the run goes on without it (checkpoint.on_error: continue)"}
            )

    @contextlib.contextmanager
    def saves_ended(self) -> Iterator[None]:
        """Wait for the save in flight before an error leaves, and tell of it; a second signal waits two seconds."""
        try:
            yield
        except Exception:
            try:
                self._settle(wait=True)
            except Exception as error:
                self.run.report({"kind": "warning", "text": str(error)})
            raise
        except BaseException:
            self.saver.abandon()
            raise

    def resume(self) -> None:
        """Continue from the newest checkpoint that verifies, or start at step 0; what came after it is set aside."""
        saved, self.rollbacks = self.ranks.from_main(self._found)
        if saved is not None:
            self._restore(saved)
        else:
            self.weights.begin(self.run.initialise)
        self.ranks.check_shared(self.run.directory)
        self.ranks.from_main(self.run.begin)
        if not self.ranks.main:
            self.run.begin()
        self._cut_back()
        if saved is not None:
            text = f"resuming at step {self.step:,} ({self.tokens:,} tokens seen)"
            self.run.report({"kind": "note", "event": "resumed", "step": self.step, "text": text})

    def _found(self) -> tuple[Saved | None, list[Rollback]]:
        """The checkpoint to continue from, and the rollbacks of the run."""
        if self.checkpoints.is_dir():
            clean_leftovers(self.checkpoints)
        rollbacks = read_rollbacks(self.run.directory)
        verify, wanted = self.plan.checkpoint.verify, self.run.resume_from
        if wanted is not None:
            return verify_step(wanted, verify), rollbacks
        saved, faults = newest_of_run(self.checkpoints, rollbacks, verify)
        self._tell(faults)
        return saved, rollbacks

    def _tell(self, faults: list[str]) -> None:
        for fault in faults:
            self.run.report({"kind": "warning", "text": f"{fault}; trying the checkpoint before it"})

    def _restore(self, saved: Saved) -> None:
        state = saved.state
        try:
            consumed, skipped_ranges = self.loader.check(state["data"])
            names = [group["names"] for group in state["optimizer"]]
            if names != [group["names"] for group in self.optimizer.param_groups]:
                raise CheckpointError(f"{saved.path}: the optimizer's parameter groups are others; check optim.decay")
            load_tensors(saved, self.weights.live(), self.weights.places())
            self.guard.restore(state["guard"])
            known = as_rollbacks(state["rollbacks"], saved.path / "state.json")
            self.rollbacks = known if len(known) > len(self.rollbacks) else self.rollbacks
            self.step, self.updates = int(state["step"]), int(state["updates"])
            self.tokens, self.targets = int(state["tokens"]), int(state["targets"])
            self.observed, self.valid_loss = int(state["observed"]), saved.manifest.get("valid_loss")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{saved.path / 'state.json'} is incomplete: {error!r}") from error
        trained, skipped = self.step * self.plan.rows, sum(stop - start for start, stop in skipped_ranges)
        if consumed != trained + skipped:
            expected = f"{self.step:,} steps of {self.plan.rows} sequences are {trained:,} and {skipped:,} were skipped"
            raise CheckpointError(f"{saved.path}: {consumed:,} samples were consumed, but {expected}")
        self.consumed, self.skipped_ranges = consumed, skipped_ranges
        self.saved, self.saved_step = saved.path, self.step


def _raise(error: Exception) -> None:
    raise error


def _step_seed(seed: int, step: int, stream: int) -> int:
    """Return the seed of the random numbers of a step: a resumed run draws what an uninterrupted one would."""
    words = f"{seed}|dropout|{step}" + (f"|{stream}" if stream else "")
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "little") >> 1
