"""Writing checkpoints while training goes on.

At a checkpoint's step everything is copied to the host: of the optimizer's state each process
copies its own part, and of the exported weights (`consolidated/`) the first process has all,
gathered tensor by tensor. A thread in every process then writes, checks and counts: the checkpoint
gets its name when all of it lies on the disk. Until then it is `….incomplete`, which nothing ever
reads.
"""

import dataclasses
import json
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from moshi.models import loaders
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from finetune.checkpoint import manifest
from finetune.checkpoint.consolidated import consolidated, consolidated_texts
from finetune.checkpoint.earlier_parts import EARLIER, Part, earlier_parts_of
from finetune.checkpoint.run_dir import INFO, delete_old, list_checkpoints
from finetune.checkpoint.run_record import RunRecord, fsync
from finetune.checkpoint.snapshot import SPARE_BYTES, Snapshot
from finetune.config import TrainArgs, save_config
from finetune.distributed import Sharding, World, like_parameter
from finetune.errors import UserError
from finetune.kept import DIVERGED
from finetune.model import adapter_roles
from finetune.step import Optimizer
from ttt import TTTLMModel

logger = logging.getLogger(__name__)

LEAVING_SEC = 60.0
"""How long a run that ends by an error waits for a checkpoint that is being written."""

# `finetune.kept`, torch.save, safetensors and DCP report a full disk as errors of their own.
_WRITING_ERRORS = (OSError, UserError, RuntimeError, SafetensorError, CheckpointException)


class CheckpointWriter:
    """Writes the checkpoints of a run; all processes do the same with it.

    A checkpoint that cannot be written is an error in the log, and training goes on: what was saved
    before is whole, and the next one may succeed. `wait` raises if the latest has failed.
    """

    def __init__(
        self,
        args: TrainArgs,
        info: loaders.CheckpointInfo,
        world: World,
        sharding: Sharding | None,
        *,
        record: RunRecord,
        on_wait: Callable[[], None] = lambda: None,
        on_saved: Callable[[], None] = lambda: None,
    ) -> None:
        self.args = args
        self.info = info
        self.world = world
        self.sharding = sharding
        self.on_wait = on_wait
        """Called now and then while the training waits for a disk."""
        self.on_saved = on_saved
        """Called by the first process, in the thread, when a checkpoint is complete."""
        self.record = record
        self.last_step = 0
        """Of the latest checkpoint that was begun."""
        self.earlier_parts: list[Part] = []
        """Of this training, see `earlier_parts.py`."""
        # Asked once: what the run started from may be gone when it saves.
        self._adapter_roles = adapter_roles(args)
        self._folder = Path(args.run_dir) / "checkpoints"
        self._thread: threading.Thread | None = None
        self._error: str | None = None

    def save(
        self,
        model: TTTLMModel,
        optimizer: Optimizer,
        *,
        step: int,
        eval_loss: float | None,
        resume_state: dict[str, Any],
    ) -> None:
        """Begin the checkpoint of `step`; the one before is completed first."""
        self._join()
        self._error = None
        self.last_step = step
        snapshot = Snapshot(
            step,
            eval_loss,
            dict(self._weights(model)),
            dict(self._shards(optimizer)),
            {"optimizer": optimizer.summary(), **resume_state},
        )
        self._error = self.world.first(self._prepare(snapshot))
        if self._error is not None:
            self._report()
            return
        self._error = f"the checkpoint of step {step} was not completed."
        if self.args.ckpt_async:
            self._thread = threading.Thread(
                target=self._write, args=(snapshot,), name="checkpoint", daemon=True
            )
            self._thread.start()
        else:
            self._write(snapshot)

    def add_eval_loss(self, step: int, eval_loss: float | None) -> None:
        """Note the loss in a checkpoint that was saved before the evaluation of its step; does
        nothing where there is no such checkpoint of this run, or no loss.

        Whenever the process may be killed, the checkpoint is whole: the manifest does not list the
        file while that is replaced.
        """
        final, partial = self._final(step), self._partial(step)
        if eval_loss is None or not self.world.is_main:
            return
        if not self.record.found_at(f"{self._name(final)}/{INFO}").units:
            return
        try:
            self.record.delete(self._name(partial))
            self.record.add(trees=[self._name(partial)])
            partial.mkdir()
            _write_info(partial, step, eval_loss, earlier_parts_of(final))
            others = {name: e for name, e in manifest.read(final).items() if name != INFO}
            all_entries = others | manifest.describe(partial, [partial / INFO])
            manifest.write(partial, others)
            _replace(partial / manifest.NAME, final)
            _replace(partial / INFO, final)
            manifest.write(partial, all_entries)
            _replace(partial / manifest.NAME, final)
        except (OSError, ValueError) as error:
            logger.warning("could not note the loss of the evaluation in %s: %s", final, error)
        self._remove(partial)

    def set_apart(self, step: int) -> None:
        """Give the checkpoint of `step`, if this run has one, a name by which nothing goes on from
        it: its model has diverged."""
        final = self._final(step)
        new = final.with_name(f"{final.name}{DIVERGED}")
        if not self.world.is_main or not self.record.found_at(self._name(final)).units:
            return
        try:
            self.record.delete(self._name(new))  # of an earlier try
            self.record.add(trees=[self._name(new)])
            os.replace(final, new)
            logger.warning("%s is called %s now: nothing goes on from it", final, new.name)
        except OSError as error:
            logger.warning("could not rename %s: %s; delete it", final, error)

    def wait(self) -> None:
        """Until the latest checkpoint is complete.

        Raises:
            UserError: it could not be written; older checkpoints are untouched.
        """
        self._join()
        if self._error is not None:
            raise UserError(self._error)

    def close(self) -> None:
        """End; for a while at most, as the other processes may be gone."""
        self._join(math.inf if self.world.size == 1 else LEAVING_SEC)

    def _join(self, timeout_sec: float = math.inf) -> None:
        started_at = time.monotonic()
        while self._thread is not None and time.monotonic() < started_at + timeout_sec:
            self.on_wait()
            self._thread.join(timeout=1.0)
            if not self._thread.is_alive():
                self._thread = None

    # --- into memory ------------------------------------------------------------------------------

    def _weights(self, model: TTTLMModel) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for name, tensors in consolidated(self.args, model, self._adapter_roles).items():
            on_host = {}
            if self.sharding is None and not self.world.is_main:
                continue
            for key, tensor in tensors:
                # All processes gather; one keeps, and not on its GPU.
                if self.world.is_main:
                    on_host[key] = self._hold(tensor).cpu().contiguous()
            if self.world.is_main:
                yield name, on_host

    def _shards(self, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
        for name, (tensor, parameter) in optimizer.tensors().items():
            yield name, like_parameter(self._hold(tensor.detach()), parameter, self.sharding)

    def _hold(self, tensor: Tensor) -> Tensor:
        return tensor.to("cpu", copy=True) if self.args.ckpt_async else tensor

    # --- onto the disk ----------------------------------------------------------------------------

    def _prepare(self, snapshot: Snapshot) -> str | None:
        """Make the folder, if there is room; what is wrong if not."""
        if not self.world.is_main:
            return None
        try:
            partial = self._partial(snapshot.step)
            if partial.exists() and not self.record.delete(self._name(partial)):
                raise OSError(f"{partial} holds something that no run wrote: move it away")
            self.record.add(trees=[self._name(partial)])
            (partial / "consolidated").mkdir(parents=True)
            free, needed = shutil.disk_usage(partial).free, snapshot.num_bytes + SPARE_BYTES
            if free < needed:
                self.record.delete(self._name(partial))
                raise OSError(f"it needs {needed / 1e9:.2f} GB")
        except OSError as error:
            return self._explain(snapshot.step, error)
        return None

    def _write(self, snapshot: Snapshot) -> None:
        """Write this process's files in the thread, then the rest together with the others.
        Meanwhile the training must not exchange anything through `world.gather`."""
        if self.world.device.type == "cuda":
            # A thread begins on the first GPU; DCP asks for the current one, though all is on the
            # host.
            torch.cuda.set_device(self.world.device)
        partial = self._partial(snapshot.step)
        entries: manifest.Entries = {}
        error = None
        try:
            self._write_shards(snapshot, partial / "resume")
            if self.world.is_main:
                self._write_rest(snapshot, partial)
            entries = manifest.describe(partial, self._own_files(partial))
        except _WRITING_ERRORS as problem:
            error = self._explain(snapshot.step, problem)
        everything = self.world.gather((entries, error))
        self._error = next((text for _, text in everything if text is not None), None)
        if self.world.is_main:
            if self._error is None:
                self._error = self._complete(snapshot.step, [entry for entry, _ in everything])
            if self._error is not None:
                self._remove(partial)
        self._error = self.world.first(self._error)
        self._report()

    def _write_shards(self, snapshot: Snapshot, folder: Path) -> None:
        dcp.save(
            dict(snapshot.shards),
            storage_writer=dcp.FileSystemWriter(folder),
            process_group=self.world.host_group,
            no_dist=self.world.size == 1,
        )

    def _write_rest(self, snapshot: Snapshot, partial: Path) -> None:
        for name, tensors in snapshot.weights.items():
            path = partial / "consolidated" / name
            metadata = None
            if name == "ttt.safetensors":
                metadata = {"ttt_args": json.dumps(dataclasses.asdict(self.args.ttt))}
            save_file(tensors, path, metadata=metadata)
        for name, content in consolidated_texts(self.args, self.info).items():
            path = partial / "consolidated" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content, indent=2), encoding="utf-8")
        save_config(self.args, partial / "args.yaml")
        torch.save(snapshot.resume_state, partial / "resume.pt")
        _write_info(partial, snapshot.step, snapshot.eval_loss, self.earlier_parts)

    def _own_files(self, partial: Path) -> list[Path]:
        """Return the files that this process has written."""
        own = list((partial / "resume").glob(f"__{self.world.rank}_*"))
        if self.world.is_main:
            own += [path for path in partial.rglob("*") if path.is_file() and path.name[:2] != "__"]
        return own

    def _complete(self, step: int, entries: list[manifest.Entries]) -> str | None:
        """The last step, by one process; what went wrong, if anything."""
        partial, final = self._partial(step), self._final(step)
        try:
            manifest.write(partial, {name: e for each in entries for name, e in each.items()})
            for file in partial.rglob("*"):
                fsync(file)
            name = self._name(final)
            self.record.add(
                f"{name}/{file.relative_to(partial).as_posix()}"
                for file in partial.rglob("*")
                if file.is_file()
            )
            os.replace(partial, final)
            fsync(self._folder)
        except OSError as error:
            return self._explain(step, error)
        self.on_saved()
        delete_old(self.args, final, self.record)
        return None

    def _remove(self, partial: Path) -> None:
        try:
            self.record.delete(self._name(partial))
        except OSError as error:
            logger.warning("could not delete %s: %s", partial, error)

    def _name(self, checkpoint: Path) -> str:
        return f"{self._folder.name}/{checkpoint.name}"

    def _final(self, step: int) -> Path:
        return self._folder / f"checkpoint_{step:06d}"

    def _partial(self, step: int) -> Path:
        return self._folder / f"checkpoint_{step:06d}.incomplete"

    def _explain(self, step: int, error: BaseException) -> str:
        free_gb = shutil.disk_usage(self.args.run_dir).free / 1e9
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        return (
            f"the checkpoint of step {step} could not be written to {self._folder} ({free_gb:.2f} "
            f"GB free): {reason}. {self._explain_what_there_is()}"
        )

    def _explain_what_there_is(self) -> str:
        if list_checkpoints(Path(self.args.run_dir)):
            return (
                "Older checkpoints are untouched: make room, then continue from the latest with "
                "--resume."
            )
        return "No checkpoint was saved before: make room, then start anew with --resume=auto."

    def _report(self) -> None:
        if not self.world.is_main:
            return
        if self._error is None:
            logger.info("saved %s", self._final(self.last_step))
        elif self.last_step < self.args.max_steps:
            text = "%s Training goes on; the next checkpoint tries again, if there is room by then."
            logger.error(text, self._error)
        else:
            logger.error(self._error)


def _write_info(folder: Path, step: int, eval_loss: float | None, parts: list[Part]) -> None:
    info: dict[str, Any] = {"step": step, "eval_loss": eval_loss}
    info |= {EARLIER: parts} if parts else {}
    (folder / INFO).write_text(json.dumps(info), encoding="utf-8")


def _replace(file: Path, folder: Path) -> None:
    """Move a file into a folder, in the place of that of its name, in one step."""
    fsync(file)
    os.replace(file, folder / file.name)
    fsync(folder)
