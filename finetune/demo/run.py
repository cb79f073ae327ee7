"""The demonstration: memory, data, training, evaluation, a picture and a dialogue, in one go."""

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from finetune.checkpoint import list_checkpoints, run_wrote
from finetune.config import TrainArgs, load_config, load_run_config
from finetune.demo.dialogues import make_dialogues
from finetune.demo.memory import ARMS, Memory, remember
from finetune.demo.memory_report import (
    PICTURE_NAME,
    WIDTH,
    accuracy,
    answers,
    sound_name,
    transcripts,
    write_memory,
)
from finetune.distributed import join_world
from finetune.errors import UserError
from finetune.inference import continue_dialogue, load_for_inference
from finetune.kept import write_wav, write_whole
from finetune.monitoring import console, format_duration, metrics_path, plot_losses, read_metrics
from finetune.trainer import Trainer
from ttt import TTTLMModel

CONFIG = Path("example/demo.yaml")
MEMORY_MODEL = Path("example/memory")
NUM_DIALOGUES = 20
PROMPT_SEC = 5.0
MEMORY, LOSS_PICTURE, CONTINUATION = Path("memory"), Path("loss.png"), Path("continuation.wav")
OWN_FILES = (
    *(MEMORY / name for name in (PICTURE_NAME, *map(sound_name, ARMS))),
    *(LOSS_PICTURE, CONTINUATION, CONTINUATION.with_suffix(".txt")),
)
"""What the demonstration adds to the run that it trains. A run that anybody trains has none."""


def run_demo(run_dir: Path, overrides: Mapping[str, object], *, force: bool = False) -> None:
    """Show the memory of `example/memory`; then make the data if it is not there, train
    `example/demo.yaml`, and show what came out.

    Raises:
        UserError: not called from the project's folder, one of the steps cannot be done, or
            `run_dir` holds a run that is no demonstration.
    """
    args = _read_config(run_dir, overrides)
    started_at = time.monotonic()
    trainer = _prepare(args, force=force)
    memory = _recall(run_dir, args.device)
    _train(trainer)
    picture = _draw_loss(run_dir)
    continued = _continue(run_dir, args)
    took = format_duration(time.monotonic() - started_at)
    console.print(
        f"""
Done in {took}.

{_memory_story(memory, run_dir)}

{_training_story(continued, run_dir)}

{_list_of_files(continued, picture, run_dir)}

{_next_steps()}
""",
        soft_wrap=True,
        markup=False,
    )


# --- the steps ------------------------------------------------------------------------------------


def _read_config(run_dir: Path, overrides: Mapping[str, object]) -> TrainArgs:
    if "run_dir" in overrides:
        raise UserError("run_dir: the folder of the demonstration is given by --out.")
    for needed_here in (CONFIG, MEMORY_MODEL / "model.safetensors"):
        if not needed_here.is_file():
            raise UserError(
                f"there is no {needed_here} here ({Path.cwd()}): the demonstration runs in the "
                "folder of the project, where README.md is."
            )
    own = {"run_dir": run_dir, "overwrite_run_dir": _holds_demonstration(run_dir)}
    needed = {"do_eval": True, "do_ckpt": True}
    return load_config(CONFIG, {**own, **overrides, **needed})


def _prepare(args: TrainArgs, *, force: bool) -> Trainer:
    """Make the data, and what trains on them: what is wrong with the run or its folder is said
    now, and the demonstration's files may lie there from now on."""
    join_world(args.device)  # a device that is not there is said before anything is made
    data_dir = Path(args.data.train_data).parent
    console.print(f"[1/5] making dialogues in {data_dir}, to train on")
    make_dialogues(data_dir)
    trainer = Trainer(args, config=CONFIG, force=force)
    trainer.folder.record.add(path.as_posix() for path in OWN_FILES)
    return trainer


def _recall(run_dir: Path, device: str) -> Memory:
    console.print(f"[2/5] memory: {MEMORY_MODEL}, a small Moshi that is trained already")
    return show_memory(run_dir / MEMORY, device)


def _train(trainer: Trainer) -> None:
    """Train to the last step; where training was interrupted, the program ends here."""
    console.print("[3/5] training another small Moshi, with test-time training, from nothing")
    status = trainer.train()
    if status:
        sys.exit(status)


def _draw_loss(run_dir: Path) -> Path:
    console.print("[4/5] drawing the loss curve")
    return plot_losses(run_dir, run_dir / LOSS_PICTURE)


@dataclass(frozen=True)
class _Continued:
    """A recording of which the trained model has taken over Moshi's part.

    Args:
        text: what was said, in the prompt too.
    """

    checkpoint: Path
    model: TTTLMModel
    heard: Path
    text: str


def _continue(run_dir: Path, args: TrainArgs) -> _Continued:
    """Let the model that was trained continue a recording, and keep what it says."""
    console.print("[5/5] continuing a dialogue that it has not heard")
    checkpoint = list_checkpoints(run_dir)[-1]
    model, codec = load_for_inference(checkpoint, args.device)
    heard = _first_recording(Path(args.data.eval_data))
    dialogue = codec.read_recording(heard)
    continuation = continue_dialogue(model, codec, dialogue, prompt_sec=PROMPT_SEC)
    sound = run_dir / CONTINUATION
    write_wav(sound, continuation.audio.T.numpy(), codec.sample_rate_hz)
    write_whole(sound.with_suffix(".txt"), continuation.text + "\n")
    return _Continued(checkpoint, model, heard, continuation.text)


def _holds_demonstration(run_dir: Path) -> bool:
    """Return whether a folder has what an earlier demonstration left, and nobody trained on."""
    recorded = run_dir / "args.yaml"
    if not recorded.is_file() or not run_wrote(run_dir, OWN_FILES[0].as_posix()):
        return False
    return load_run_config(recorded).resume is False


# --- what came out --------------------------------------------------------------------------------


def _memory_story(memory: Memory, run_dir: Path) -> str:
    return f"""\
Memory. A trained Moshi was asked for facts that attention had lost. With TTT it answered \
{memory.share("on"):.0%} of the questions rightly, without TTT {memory.share("off"):.0%}; a guess \
is right in {1 / memory.num_values:.0%}.
  {run_dir / MEMORY / sound_name("on")}   listen: left Moshi, right the user
  {run_dir / MEMORY / sound_name("off")}   the same user, and Moshi without TTT
  {run_dir / MEMORY / PICTURE_NAME}   what the fast weights did"""


def _training_story(continued: _Continued, run_dir: Path) -> str:
    million = sum(p.numel() for p in continued.model.parameters()) / 1e6
    layers = ", ".join(map(str, continued.model.ttt_layers))
    first, last = (read_metrics(metrics_path(run_dir, "eval"))[i] for i in (0, -1))
    fall = 1 - last["loss"] / first["loss"]
    return f"""\
Training. A Moshi of {million:.1f} million parameters learned from nothing, with TTT in layers \
{layers}.
On dialogues it has not heard, its loss fell from {first["loss"]:.2f} to {last["loss"]:.2f} nats \
({fall:.0%}): text {first["text_loss"]:.2f} to {last["text_loss"]:.2f}, audio \
{first["audio_loss"]:.2f} to {last["audio_loss"]:.2f}.
Then it took over Moshi's part in {continued.heard.name} after {PROMPT_SEC:.0f} s (|):
  {continued.text}"""


def _list_of_files(continued: _Continued, picture: Path, run_dir: Path) -> str:
    metrics, tensorboard = run_dir / "metrics.train.jsonl", run_dir / "tb"
    return f"""\
  {picture}   the loss curve
  {run_dir / CONTINUATION}   listen: left Moshi, right the user
  {continued.checkpoint}   the weights
  {metrics}   all numbers; or: tensorboard --logdir {tensorboard}"""


def _next_steps() -> str:
    # As one can type it here, whether or not the environment is active.
    programs = os.path.relpath(Path(sys.executable).parent)
    return f"""\
Next: change something in example/demo.yaml and train it again,
  {programs}/python train.py --config example/demo.yaml --run_dir runs/mine --ttt.chunk_size=50
or the real model, on your data:
  {programs}/torchrun --nproc-per-node 1 train.py --config example/moshi_ttt.yaml"""


def show_memory(folder: Path, device: str) -> Memory:
    """Show a dialogue with TTT and without, say how many answers of several are right, and leave
    sounds and a picture in `folder`."""
    model, codec = load_for_inference(MEMORY_MODEL, device)
    memory = remember(
        model, codec, num_dialogues=NUM_DIALOGUES, say=lambda line: console.print(f"      {line}")
    )
    write_memory(memory, folder)
    console.print(
        "\nThe first dialogue. The user tells facts, and asks for them when they are out of "
        f"attention's reach, {memory.reach_sec:.1f} s here: only the fast weights can know them.\n",
        width=WIDTH,
    )
    console.print(transcripts(memory))
    console.print(answers(memory))
    console.print(f"All {NUM_DIALOGUES} dialogues; a guess is right in 1 of {memory.num_values}:\n")
    console.print(accuracy(memory))
    return memory


def _first_recording(jsonl: Path) -> Path:
    with jsonl.open(encoding="utf-8") as lines:
        return jsonl.parent / json.loads(next(lines))["path"]
