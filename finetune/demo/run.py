"""The demonstration: data, training, evaluation, a picture and a dialogue, in one go."""

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import soundfile

from finetune.checkpoint import list_checkpoints
from finetune.config import load_config
from finetune.demo.dialogues import make_dialogues
from finetune.errors import UserError
from finetune.inference import continue_dialogue, load_for_inference
from finetune.monitoring import console, format_duration, metrics_path, plot_losses, read_metrics
from finetune.trainer import Trainer

CONFIG = Path("example/demo.yaml")
PROMPT_SEC = 5.0


def run_demo(run_dir: Path, overrides: Mapping[str, object], *, force: bool = False) -> None:
    """Make the data if it is not there, train `example/demo.yaml`, and show what came out.

    Raises:
        UserError: not called from the project's folder, or one of the steps cannot be done.
    """
    if not CONFIG.is_file():
        raise UserError(
            f"there is no {CONFIG} here ({Path.cwd()}): the demonstration runs in the folder of "
            "the project, where README.md is."
        )
    needed = {"do_eval": True, "do_ckpt": True}
    args = load_config(
        CONFIG, {"run_dir": run_dir, "overwrite_run_dir": True, **overrides, **needed}
    )
    started_at = time.monotonic()
    data_dir = Path(args.data.train_data).parent
    console.print(f"[1/4] making dialogues in {data_dir}")
    make_dialogues(data_dir)

    console.print("[2/4] training a small Moshi with test-time training")
    status = Trainer(args, config=CONFIG, force=force).train()
    if status:
        sys.exit(status)

    console.print("[3/4] drawing the loss curve")
    picture = plot_losses(run_dir, run_dir / "loss.png")

    console.print("[4/4] continuing a dialogue that it has not heard")
    checkpoint = list_checkpoints(run_dir)[-1]
    model, codec = load_for_inference(checkpoint, args.device)
    heard = _first_recording(Path(args.data.eval_data))
    continuation = continue_dialogue(
        model, codec, codec.read_recording(heard), prompt_sec=PROMPT_SEC
    )
    sound = run_dir / "continuation.wav"
    soundfile.write(sound, continuation.audio.T.numpy(), codec.sample_rate_hz)
    (run_dir / "continuation.txt").write_text(continuation.text + "\n", encoding="utf-8")

    # As one can type it here, whether or not the environment is active.
    programs = os.path.relpath(Path(sys.executable).parent)
    first, last = (read_metrics(metrics_path(run_dir, "eval"))[i] for i in (0, -1))
    fall = 1 - last["loss"] / first["loss"]
    console.print(
        f"""
Done in {format_duration(time.monotonic() - started_at)}.

A Moshi of {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters learned from \
nothing, with TTT in layers {", ".join(map(str, model.ttt_layers))}.
On dialogues it has not heard, its loss fell from {first["loss"]:.2f} to {last["loss"]:.2f} nats \
({fall:.0%}): text {first["text_loss"]:.2f} to {last["text_loss"]:.2f}, audio \
{first["audio_loss"]:.2f} to {last["audio_loss"]:.2f}.
Then it took over Moshi's part in {heard.name} after {PROMPT_SEC:.0f} s (|):
  {continuation.text}

  {picture}   the loss curve
  {sound}   listen: left Moshi, right the user
  {checkpoint}   the weights
  {run_dir / "metrics.train.jsonl"}   all numbers; or: tensorboard --logdir {run_dir / "tb"}

Next: change something in example/demo.yaml and train it again,
  {programs}/python train.py --config example/demo.yaml --run_dir runs/mine --ttt.chunk_size=50
or the real model, on your data:
  {programs}/torchrun --nproc-per-node 1 train.py --config example/moshi_ttt.yaml
""",
        soft_wrap=True,
        markup=False,
    )


def _first_recording(jsonl: Path) -> Path:
    with jsonl.open(encoding="utf-8") as lines:
        return jsonl.parent / json.loads(next(lines))["path"]
