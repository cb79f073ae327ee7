"""The folder of a run: whose it is, what the run continues from, and what it replaces.

One process of a run has it, from before anything is loaded until the run's end. Whatever was in the
folder stays as it is until nothing else can be wrong with the new run, and comes back if that ends
without a checkpoint.
"""

import logging
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain, count
from pathlib import Path

from moshi.models import loaders

from finetune.checkpoint import manifest
from finetune.checkpoint.replaceable import OWN_FILES, require_replaceable
from finetune.checkpoint.replacing import delete_replaced, set_aside, settle
from finetune.checkpoint.run_dir import list_checkpoints, load_resume_state
from finetune.checkpoint.run_record import LOCK_NAME, Found, RunRecord
from finetune.config import (
    TrainArgs,
    changed_keys,
    changed_meaning,
    flatten,
    list_problems,
    load_run_config,
    public_dict,
    save_config,
)
from finetune.distributed import World
from finetune.errors import UserError, counted
from finetune.kept import FileLock, make_folder, step_of
from finetune.model import frozen_fingerprint
from finetune.monitoring import RunLog, metrics_path
from ttt import TTTLMModel

logger = logging.getLogger(__name__)


def holds_something(run_dir: Path) -> bool:
    """Return whether a folder has more in it than a start that failed leaves behind."""
    if not RunRecord(run_dir).exists():
        return run_dir.is_dir() and any(path.name != LOCK_NAME for path in run_dir.iterdir())
    metrics = metrics_path(run_dir, "train")
    return (run_dir / "checkpoints").exists() or (metrics.exists() and metrics.stat().st_size > 0)


def free_run_dir(run_dir: Path) -> Path:
    """Return the folder, or if it holds something, one of a similar name that does not."""
    names = (run_dir.with_name(f"{run_dir.name}-{number}") for number in count(2))
    return next(each for each in chain([run_dir], names) if not holds_something(each))


def require_own_folder(config: Path, run_dir: Path) -> None:
    """Refuse a configuration that lies in a run's folder, or in a checkpoint of it, and names
    another folder: the run was moved or copied, or the path counts from another folder than this;
    what it would go on with, or replace, is not the run that it is of.

    Raises:
        UserError: it is so.
    """
    folder = config.parent
    if folder.parent.name == "checkpoints":
        folder = folder.parent.parent
    if folder.resolve() != run_dir.resolve() and RunRecord(folder).exists():
        own = shlex.quote(str(folder))
        raise UserError(
            f"run_dir: {config} is of the run in {folder}, and names {run_dir}, which is another "
            "folder: the run was moved or copied, or began in another working folder. Say which is "
            f"meant: --run_dir={own} for the run there, or the folder of a new one."
        )


class RunFolder:
    """Entered around training; `starting` around what comes before.

    Args:
        config: the file of the configuration, where there is one.
    """

    def __init__(self, args: TrainArgs, world: World, *, config: Path | None = None) -> None:
        self.run_dir = Path(args.run_dir)
        self.record = RunRecord(self.run_dir)
        self._args = args
        self._world = world
        self._config = config
        self._lock = FileLock(
            self.run_dir / LOCK_NAME,
            f"run_dir: {self.run_dir}",
            "Stop that run first, or choose another folder.",
            enabled=world.is_main,
        )
        self._log = RunLog(enabled=world.is_main)
        self._made: list[Path] = []
        self._had_lock_file = True

    @property
    def resuming(self) -> str:
        """Return the options that continue the run. The command may have named another `run_dir`
        than its file, which may have a run there as well."""
        return f"--resume --run_dir={shlex.quote(str(self.run_dir))}"

    # --- before the first step --------------------------------------------------------------------

    @contextmanager
    def starting(self) -> Iterator[None]:
        """A start that fails in here leaves everything as it was."""
        try:
            yield
        except BaseException as error:
            self._leave(error)
            raise

    def open(self) -> list[Path]:
        """Take the lock, put right what an earlier start has left half done, and check that the
        run may write here. Every process calls this.

        Returns:
            The checkpoints that the run may continue from, the newest first; none: a new run.

        Raises:
            UserError: the folder is in use, or cannot be written to; it holds something else, or
                nothing to resume from; or it would be overwritten and must not be.
        """
        return self._world.done_by_first(self._open)

    def _open(self) -> list[Path]:
        with self._errors_named():
            self._take()
            settle(self.run_dir)
            return self._check()

    def _take(self) -> None:
        if self.run_dir.exists() and not self.run_dir.is_dir():
            raise UserError(f"run_dir: {self.run_dir} is a file. Choose another name.")
        missing = [p for p in (self.run_dir, *self.run_dir.parents) if not p.exists()]
        self._made.extend(reversed(missing))
        make_folder(self.run_dir)
        self._had_lock_file = (self.run_dir / LOCK_NAME).exists()
        self._lock.take()

    def _check(self) -> list[Path]:
        args, run_dir = self._args, self.run_dir
        checkpoints = list_checkpoints(run_dir)[::-1]
        if args.resume is True and not checkpoints:
            raise UserError(
                f"resume: there is no complete checkpoint in {run_dir / 'checkpoints'}. Check "
                f"run_dir, or start anew with --resume=auto, which continues where there is one."
            )
        if args.resume:
            return checkpoints[:1] if args.resume is True else checkpoints
        if not holds_something(self.run_dir):
            return []
        if not args.overwrite_run_dir:
            what = "already holds a run" if self.record.exists() else "already holds files"
            ways = self._ways_out(checkpoints)
            raise UserError(f"run_dir: {run_dir} {what}. Choose another folder, {ways}.")
        require_replaceable(self.record, args, self._config)
        return []

    def _ways_out(self, checkpoints: list[Path]) -> str:
        """Return what is not refused where the folder holds something."""
        ways = ["continue a run that is there with --resume"] if checkpoints else []
        try:
            require_replaceable(self.record, self._args, self._config)
            which = "it" if ways else "a run that is there, which has no complete checkpoint,"
            ways.append(f"replace {which} with --overwrite_run_dir")
        except UserError:
            ways = ways or ["move away what is there"]
        return ", ".join([*ways[:-1], f"or {ways[-1]}"])

    @contextmanager
    def begun(self, *, is_complete: bool) -> Iterator[ExitStack]:
        """The run begins in here, on the first process: nothing else is wrong with it.

        What writes into the folder from then on is put on the stack: if the start fails after all
        it is closed, before another run's files are back.

        Args:
            is_complete: there is nothing left to train.

        Raises:
            UserError: the folder cannot be written to.
        """
        if not self._world.is_main:
            yield ExitStack()
            return
        with self._errors_named(), ExitStack() as started:
            if self._args.overwrite_run_dir and self.record.exists():
                self._set_aside(self.record.found())
            if not self.record.exists():
                self.record.create()
                if self._args.resume:
                    self._adopt()
            for tree in self.record.read().trees:
                if tree.endswith(".incomplete"):
                    self.record.delete(tree)
            self.record.add(OWN_FILES, trees=self._own_trees())
            if not is_complete:  # else the file says how the weights were made
                save_config(self._args, self.run_dir / "args.yaml")
            self._log.open(self.run_dir, is_new=not self._args.resume)
            before = self._tensorboard_files()
            try:
                with ExitStack() as opened:
                    yield opened
                    started.push(opened.pop_all())
            finally:
                self.record.add(self._tensorboard_files() - before)
            started.pop_all()

    def _set_aside(self, found: Found) -> None:
        kept = [name for name in found.foreign if "/" not in name] or found.foreign
        if kept:
            names = ", ".join(kept[:5])
            logger.warning("left where it is in %s, as no run wrote it: %s", self.run_dir, names)
        if found.units:
            set_aside(self.run_dir, found)

    def _adopt(self) -> None:
        """Take down a run of a version that kept no record, which is being resumed."""
        for checkpoint in list_checkpoints(self.run_dir):
            if manifest.is_whole(checkpoint):
                names = (*manifest.read(checkpoint), manifest.NAME)
                folder = checkpoint.relative_to(self.run_dir).as_posix()
                self.record.add(f"{folder}/{name}" for name in names)
        self.record.add(self._tensorboard_files())

    def _own_trees(self) -> list[str]:
        return [] if (self.run_dir / "wandb").exists() else ["wandb"]

    def _tensorboard_files(self) -> set[str]:
        return {f"tb/{path.name}" for path in (self.run_dir / "tb").glob("events.*")}

    # --- while it trains, and at its end ----------------------------------------------------------

    def earn(self) -> None:
        """Delete what this run replaces: a checkpoint is complete, or the run has come to its end.
        Called again it does nothing."""
        if self._world.is_main:
            try:
                delete_replaced(self.run_dir)
            except OSError as error:
                logger.warning("could not delete the replaced run in %s: %s", self.run_dir, error)

    def set_damaged_apart(self, checkpoints: list[Path]) -> None:
        """Rename checkpoints that the run does not continue from and will write again."""
        for path in checkpoints if self._world.is_main else []:
            new = path.with_name(f"{path.name}.damaged")
            with self._errors_named():
                path.rename(new)
            logger.warning("%s is called %s now; look at it, or delete it", path, new.name)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        self._leave(error)

    def _leave(self, error: BaseException | None) -> None:
        """Put back what has been replaced, unless the run has earned its place, and let go."""
        self._log.end(error)
        if self._lock.is_held:
            try:
                settle(self.run_dir)
            except OSError as error:
                logger.error(
                    "could not put the earlier run back: %s. It is whole in %s/.replaced; the "
                    "next start tries again.",
                    error,
                    self.run_dir,
                )
            if not self._had_lock_file and not self.record.exists():
                (self.run_dir / LOCK_NAME).unlink(missing_ok=True)
            self._lock.release()
        for folder in reversed(self._made):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        self._made.clear()

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"run_dir: cannot write to {self.run_dir}: {error.strerror or error}."
            ) from error


def cautions_of_resuming(args: TrainArgs, checkpoint: Path) -> Iterator[str]:
    """Yield what is not as it was when a checkpoint was made, and that nothing is left to do."""
    for key, (old, new) in changed_keys(checkpoint / "args.yaml", args).items():
        yield f"{key} was {old} when the checkpoint was made, and is {new} now"
    if step_of(checkpoint) >= args.max_steps:
        yield (
            f"nothing is left to train after {counted(args.max_steps, 'step')}: raise max_steps to "
            "go on"
        )


def require_same_parameters(args: TrainArgs, checkpoint: Path) -> None:
    """Check that a run trains the parameters that a checkpoint holds, means by them the same, and
    keeps their moments alike.

    Raises:
        UserError: naming the keys by which it does not.
    """
    made_with = checkpoint / "args.yaml"
    problems = [*_resuming_problems(load_run_config(made_with), args)]
    if problems:
        raise UserError(list_problems(f"resuming {checkpoint}, made with {made_with},", problems))


def frozen_base(
    args: TrainArgs, model: TTTLMModel, info: loaders.CheckpointInfo, checkpoint: Path | None
) -> dict[str, str | None]:
    """Return what a checkpoint keeps of the frozen weights, which it does not hold.

    Args:
        model: the run's, on `meta`.
        checkpoint: what the run continues from: it must have been trained on the same weights,
            wherever they lie now.

    Raises:
        UserError: it was trained on others; the message names the keys that say so.
    """
    base = {"fingerprint": frozen_fingerprint(model, args, info)}
    if checkpoint is None or load_resume_state(checkpoint).get("base", base) == base:
        return base
    changed = [
        f"{key} was {old} when the checkpoint was made, and is {new} now"
        for key, (old, new) in changed_keys(checkpoint / "args.yaml", args).items()
        if key.startswith("moshi_paths.") or (key == "seed" and args.moshi_paths.random_init)
    ]
    raise UserError(
        f"{checkpoint} was trained on other frozen weights than these: "
        f"{'; '.join(changed) or 'the files that moshi_paths names were replaced'}. Name the same "
        "weights again (they may have been moved, not changed), or start a new run_dir."
    )


def _resuming_problems(earlier: TrainArgs, now: TrainArgs) -> Iterator[str]:
    for key, there, here in _changed_parameters(earlier, now):
        yield (
            f"{key}: was {there} when the checkpoint was made, and is {here} now; set it to "
            f"{there}, or start a new run_dir"
        )


def _changed_parameters(earlier: TrainArgs, now: TrainArgs) -> Iterator[tuple[str, str, str]]:
    """Yield keys with their earlier value and their present one."""
    before, after = (flatten(public_dict(each)) for each in (earlier, now))
    keys = ["full_finetuning", "lora.enable", "ttt.enabled", "optim.state"]
    keys += [f"model.{name}" for name in ("norm", "gating", "positional_embedding")]
    if earlier.lora.enable and now.lora.enable:
        keys += ["lora.rank", "lora.scaling", "lora.ft_embed"]
    yield from ((key, before[key], after[key]) for key in keys if before[key] != after[key])
    if earlier.ttt.enabled and now.ttt.enabled:
        for name, there, here in changed_meaning(earlier.ttt, now.ttt):
            yield f"ttt.{name}", there, here
