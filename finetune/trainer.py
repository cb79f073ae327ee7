"""The training loop: next batch, step, log, evaluate, save."""

import logging
import math
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from finetune.checkpoint import (
    CheckpointWriter,
    RunFolder,
    cautions_of_resuming,
    checkpoint_bytes,
    eval_loss_of,
    fill_shards,
    first_whole,
    frozen_base,
    load_resume_state,
    parts_before,
    require_same_parameters,
    require_sound_start,
    step_of,
)
from finetune.config import TrainArgs, public_dict
from finetune.data import Batch, build_loaders
from finetune.distributed import (
    Watch,
    build_sharding,
    join_world,
    num_processes,
    peak_memory_gb,
    shard_size,
)
from finetune.errors import UserError, counted
from finetune.evaluation import build_speech_check, evaluate
from finetune.interrupt import Interrupt
from finetune.model import build_codec, find_checkpoint, load_model, trainable_by_role
from finetune.monitoring import (
    EffectWatch,
    MetricsLogger,
    Phases,
    Progress,
    StepProfiler,
    describe,
    setup_logging,
)
from finetune.plan import describe_run, explained, require_room, write_summary
from finetune.step import LossWeights, LostSteps, Optimizer, StepResult, accumulate_gradients
from ttt import TTTLMModel, measuring

logger = logging.getLogger(__name__)


class Trainer:
    """A training run.

    Raises:
        UserError: whatever is wrong with the configuration, its files or the run folder; before
            the first step as far as it can be known there.
    """

    def __init__(self, args: TrainArgs, *, config: Path | None = None, force: bool = False):
        """
        Args:
            config: the file that `args` are from.
            force: go on where the memory cannot be enough by estimate.
        """
        self.args = args
        self.config = config
        self.run_dir = Path(args.run_dir)
        self.world = join_world(
            args.device,
            shard_size=shard_size(args, num_processes()),
            timeout=timedelta(seconds=1.5 * args.parallel.hang_timeout_sec + 60),
        )
        setup_logging(self.world.rank)
        self.folder = RunFolder(args, self.world, config=config)
        with self.folder.starting():
            self.assemble(args, force=force)

    def assemble(self, args: TrainArgs, *, force: bool) -> None:
        """Assemble all parts of the run, and its folder."""
        resume_from, damaged = first_whole(self.folder.open(), self.world)
        if resume_from is not None:
            require_same_parameters(args, resume_from)
        self.checkpoint_info = info = find_checkpoint(args.moshi_paths, is_new_run=not resume_from)
        require_sound_start(args.moshi_paths, self.world)
        self.sharding = build_sharding(args, self.world)

        def check(planned: TTTLMModel) -> None:
            sizes = checkpoint_bytes(args, planned, self.world)
            require_room(args, info, planned, self.world, *sizes, force=force)
            self.frozen_base = frozen_base(args, planned, info, resume_from)

        places = self.world.device, self.sharding
        self.model = load_model(args, info, *places, check=check, is_new_run=not resume_from)
        self.codec = build_codec(info, self.model, word_start=args.data.word_start)
        self.loss_weights = LossWeights(
            args.text_padding_weight, args.first_codebook_weight_multiplier
        )
        self.optimizer = Optimizer(
            trainable_by_role(self.model),
            args.optim,
            max_steps=args.max_steps,
            sharding=self.sharding,
        )
        self.train_data, self.eval_data = build_loaders(args, self.codec, self.world)
        self.speech_check = build_speech_check(args, self.codec, self.world)
        self.phases = Phases(self.world.device)
        self.step = 0
        self.lost_steps = LostSteps(args)
        self.effect = EffectWatch(args)
        self.eval_loss: float | None = None  # of this step; None: it was not evaluated
        self.watch = Watch(self.world, hang_timeout_sec=args.parallel.hang_timeout_sec)
        self.writer = CheckpointWriter(
            args,
            self.checkpoint_info,
            self.world,
            self.sharding,
            record=self.folder.record,
            on_wait=lambda: self.watch.at(self.step, "checkpoint"),
            on_saved=self.folder.earn,
        )
        if resume_from is not None:
            self.resume(resume_from)
        self.profiler = StepProfiler(
            args.profile_steps,
            self.run_dir,
            rank=self.world.rank,
            num_done=self.step,
            num_ranks=self.world.size,
            announce=self.folder.record.add,
        )
        self.folder.set_damaged_apart(damaged)
        # Only now, when nothing else can be wrong: it may take the place of an older run.
        with self.folder.begun(is_complete=self.is_complete) as opened:
            self.metrics = MetricsLogger(
                self.run_dir,
                wandb_args=args.wandb,
                config=public_dict(args),
                enabled=self.world.is_main,
                resumed_step=None if resume_from is None else self.step,
            )
            opened.push(self.metrics)
            if self.world.is_main and not self.is_complete:
                write_summary(args, self.model, self.train_data, self.world)
        self.progress = Progress(total=args.max_steps, start=self.step, enabled=self.world.is_main)
        self.interrupt = Interrupt()

    def train(self) -> int:
        """Train to the last step, or until a signal.

        Returns:
            An exit status: 0, or 128 + the signal that ended the run.
        """
        data = self.train_data, self.eval_data
        for line in describe_run(self.args, self.model, *data, self.world, self.config):
            logger.info(line)
        with self.folder, self.interrupt, self.metrics, self.progress:
            try:
                with self.watch:
                    self.metrics.exit_status = self.loop()
                return self.metrics.exit_status
            finally:
                self.profiler.close()
                self.writer.close()
                self.train_data.close()
                self.world.close()

    def loop(self) -> int:
        if self.step == 0 or (self.is_due(self.args.eval_freq) and self.eval_loss is None):
            self.evaluate()  # after a resume: a signal has stopped this evaluation before
            self.writer.add_eval_loss(self.step, self.eval_loss)
        while not self.is_complete and not self.interrupted():
            self.profiler.before_step(self.step + 1)
            with explained(self.args, self.world.device, f"step {self.step + 1}", trains=True):
                self.train_step()
            self.lost_steps.stop_if_too_many()
            if self.is_due(self.args.eval_freq):
                self.evaluate()
            if self.args.do_ckpt and self.is_due(self.args.ckpt_freq):
                with self.phases.phase("save"):
                    self.save()
            self.profiler.after_step(self.step)
        return self.leave()

    def train_step(self) -> None:
        """Take one optimizer step on the next batches."""
        started_at = time.monotonic()
        self.phases.clear()
        self.watch.at(self.step + 1, "data")
        with self.phases.phase("data_wait", on_device=False):
            batches = self.next_batches()
        self.step += 1
        self.eval_loss = None
        self.watch.at(self.step, "forward and backward")
        with (
            self.phases.phase("forward_backward"),
            measuring(self.model, enabled=self.is_due(self.args.log_freq)) as ttt,
        ):
            losses = self.forward_backward(batches)
        is_loss_finite = math.isfinite(sum(losses))
        self.watch.at(self.step, "optimizer step")
        with self.phases.phase("optimizer"):
            result = self.optimizer.step(
                max_norm=self.args.max_norm, world=self.world, is_loss_finite=is_loss_finite
            )
        self.lost_steps.count(self.step, losses, result)
        step_sec = time.monotonic() - started_at
        self.watch.at(self.step, "log")
        with self.phases.phase("log"):
            self.log(batches, losses, result, ttt, step_sec=step_sec)

    def next_batches(self) -> list[Batch]:
        """The micro-batches of a step.

        Raises:
            UserError: a recording is broken; what was trained so far is saved.
        """
        position = self.train_data.state_dict()
        try:
            return [next(self.train_data) for _ in range(self.args.num_microbatches)]
        except UserError:
            # With several processes the others are elsewhere, and cannot save with this one.
            if self.args.do_ckpt and self.world.size == 1 and self.step > self.writer.last_step:
                self.save(position)
                self.writer.wait()
            raise

    def forward_backward(self, batches: list[Batch]) -> tuple[float, float]:
        """Gradients of the loss over all batches of all processes; its text and audio parts."""
        codes = [batch.codes for batch in batches]
        return accumulate_gradients(self.model, codes, self.loss_weights, self.world)

    def log(
        self,
        batches: list[Batch],
        losses: tuple[float, float],
        result: StepResult,
        ttt: dict[str, torch.Tensor],
        *,
        step_sec: float,
    ) -> None:
        if not self.is_due(self.args.log_freq):
            self.progress.update(self.step, {})
            return
        frames = sum(batch.codes[:, 0].numel() for batch in batches) * self.world.data_size
        measured = {name: value.item() for name, value in ttt.items()}
        metrics = {
            "loss": sum(losses),
            "text_loss": losses[0],
            "audio_loss": losses[1],
            "grad_norm": result.grad_norm,
            **{f"grad_norm/{role}": norm for role, norm in result.grad_norm_by_role.items()},
            **result.learning_rates,
            "step_sec": step_sec,
            **self.phases.seconds(),
            "tokens_per_sec": frames * (1 + self.model.dep_q) / step_sec,
            "epoch": self.train_data.epoch,
            "skipped_segments": self.train_data.num_skipped,
            "encoded_segments": self.num_encoded,
            "nonfinite_steps": self.lost_steps.nonfinite_steps,
            "peak_memory_gb": peak_memory_gb(self.world.device),
            **{f"ttt/{name}": value for name, value in measured.items()},
        }
        self.metrics.log("train", self.step, metrics)
        self.progress.update(self.step, metrics)
        self.effect.look(self.step, measured)

    @property
    def num_encoded(self) -> int:
        """Segments that this process has encoded."""
        return self.train_data.num_encoded + (self.eval_data.num_encoded if self.eval_data else 0)

    def evaluate(self) -> None:
        """Evaluate if the configuration asks for it; at step 0 too, for a comparison."""
        if self.eval_data is None:
            return

        def should_stop() -> bool:
            self.watch.at(self.step, "evaluation")
            return self.interrupt.signal_number is not None

        started_at = time.monotonic()
        what = f"the evaluation after {counted(self.step, 'step')}"
        with (
            self.phases.phase("evaluate"),
            explained(self.args, self.world.device, what, trains=False),
        ):
            metrics = evaluate(
                self.model, self.eval_data, self.loss_weights, self.world, should_stop=should_stop
            )
        metrics["eval_sec"] = time.monotonic() - started_at
        if self.interrupted():
            return
        self.eval_loss = metrics["loss"]
        if self.speech_check is not None:
            metrics |= self.speech_check(
                self.model, self.eval_data, step=self.step, after_frame=should_stop
            )
        self.metrics.log("eval", self.step, metrics)
        self.progress.message(
            f"eval at step {self.step}: {describe(metrics)}, perplexity text "
            f"{metrics['text_perplexity']:.1f} audio {metrics['audio_perplexity']:.1f}"
        )

    def save(self, data_position: dict[str, Any] | None = None) -> None:
        """Begin a checkpoint of this step; `data_position` is the loader's own if not given.

        Raises:
            UserError: weights are not finite.
        """
        self.watch.at(self.step, "checkpoint")
        self.lost_steps.require_finite_weights(self.step, self.optimizer, self.world)
        self.writer.save(
            self.model,
            self.optimizer,
            step=self.step,
            eval_loss=self.eval_loss,
            resume_state={
                "data": data_position or self.train_data.state_dict(),
                "base": self.frozen_base,
                "effect": self.effect.state_dict(),
                "counts": {"step": self.step, **self.lost_steps.state_dict()},
            },
        )

    def resume(self, checkpoint: Path) -> None:
        """Continue where `checkpoint` was saved, to the bit."""
        state = load_resume_state(checkpoint)
        try:
            self.optimizer.restore(
                state["optimizer"],
                fill=lambda tensors: fill_shards(checkpoint, tensors, self.world, self.sharding),
            )
        except UserError:  # of the files; a ValueError of their content
            raise
        except ValueError as error:
            raise UserError(
                f"{checkpoint} does not belong to this configuration: {error}. Resume with the "
                f"configuration in {checkpoint / 'args.yaml'}, or start a new run_dir."
            ) from error
        self.train_data.load_state_dict(state["data"])
        self.effect.load_state_dict(state["effect"])
        self.lost_steps.load_state_dict(state["counts"])
        self.step = state["counts"]["step"]
        self.eval_loss = eval_loss_of(checkpoint)
        assert self.step == step_of(checkpoint)
        self.writer.last_step = self.step
        self.writer.earlier_parts = parts_before(self.args, checkpoint, self.frozen_base)
        logger.info("resuming %s after step %d", checkpoint, self.step)
        if self.world.is_main:
            for caution in cautions_of_resuming(self.args, checkpoint):
                logger.warning(caution)

    @property
    def is_complete(self) -> bool:
        """Return whether all steps are done."""
        return self.step >= self.args.max_steps

    def interrupted(self) -> bool:
        """Return whether a process has got a signal to stop; all of them agree."""
        return self.world.any(self.interrupt.signal_number is not None)

    def leave(self) -> int:
        if self.is_complete and (self.eval_data is None or self.eval_loss is not None):
            self.writer.wait()
            self.require_finite_end()
            self.folder.earn()
            return 0
        if self.step == 0:
            logger.info("stopped before the first step; there is nothing to save")
        elif self.args.do_ckpt:
            if self.step > self.writer.last_step:
                self.save()
            self.writer.wait()
            logger.info("stopped after step %d; continue with %s", self.step, self.folder.resuming)
        else:
            self.folder.earn()
            logger.info("stopped after step %d; nothing saved (do_ckpt: false)", self.step)
        # Only now: until a checkpoint is written, its thread exchanges what it must the same way.
        return 128 + (self.world.first(self.interrupt.signal_number) or 0)

    def require_finite_end(self) -> None:
        """Check that the run has not diverged; if it is sure, its last checkpoint is set apart."""
        self.lost_steps.require_finite_weights(self.step, self.optimizer, self.world)
        try:
            self.lost_steps.require_finite_end(self.step, self.eval_loss)
        except UserError:
            if self.eval_loss is not None:  # else steps are lost, which have changed nothing
                self.writer.set_apart(self.step)
            raise

    def is_due(self, every: int) -> bool:
        """Return whether something that is done every so many steps is due at this one."""
        return (every >= 1 and self.step % every == 0) or self.step == self.args.max_steps
