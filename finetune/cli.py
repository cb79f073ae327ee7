"""The command line: `moshi-ttt SUBCOMMAND`, and `train.py`, which is `moshi-ttt train`.

The program's parts are imported where a command needs them, so that help and mistakes come at once.
"""

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fire

from finetune.errors import UserError


def main() -> None:
    commands = {
        "train": train,
        "generate": generate,
        "plot": plot,
        "demo": demo,
        "demo-data": demo_data,
    }
    sys.exit(run(lambda: fire.Fire(commands, name="moshi-ttt")))


def run(command: Callable[[], Any]) -> int:
    """Run `command`; a user's mistake is a message, not a traceback. Returns the exit status."""
    try:
        command()
    except UserError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def train(config: str, **overrides: Any) -> None:
    """Train as a YAML file says.

    Args:
        config: the YAML file; docs/configuration.md lists its keys.
        overrides: any of these keys, dotted: --optim.lr=1e-4 --ttt.chunk_size=64 --resume
    """
    from finetune.config import load_config
    from finetune.trainer import Trainer

    status = Trainer(load_config(config, overrides)).train()
    if status:
        sys.exit(status)


def generate(
    checkpoint: str,
    audio: str,
    out: str = "continuation.wav",
    prompt_sec: float = 5.0,
    seed: int = 0,
    temperature: float = 0.8,
    text_temperature: float = 0.7,
    device: str = "auto",
) -> None:
    """Continue a recorded dialogue: Moshi hears the user's channel to its end, and answers.

    Args:
        checkpoint: a folder run_dir/checkpoints/checkpoint_NNNNNN.
        audio: a stereo recording, left Moshi, right the user; with a transcript (.json) beside it,
            the prompt has its words.
        out: the stereo wav to write.
        prompt_sec: seconds in which Moshi says what it says in the recording.
        seed: of the sampling.
        temperature: of the audio; 0 is not allowed, small is almost greedy.
        text_temperature: of the text.
        device: auto, cpu or cuda.
    """
    import soundfile

    from finetune.generate import continue_dialogue, load_for_inference

    target = Path(out)
    if target.suffix != ".wav" or not target.absolute().parent.is_dir():
        raise UserError(f"--out: {out} must be a .wav file in a folder that exists.")
    model, codec = load_for_inference(Path(checkpoint), device)
    continuation = continue_dialogue(
        model,
        codec,
        codec.read_recording(Path(audio)),
        prompt_sec=prompt_sec,
        seed=seed,
        temperature=temperature,
        text_temperature=text_temperature,
    )
    soundfile.write(target, continuation.audio.T.numpy(), codec.sample_rate_hz)
    print(f"Moshi: {continuation.text}")
    print(f"wrote {target}")


def plot(run_dir: str, out: str | None = None) -> None:
    """Draw the loss curves of a run.

    Args:
        run_dir: the run's folder.
        out: the PNG to write; RUN_DIR/loss.png if not given.
    """
    from finetune.plots import plot_losses

    print(f"wrote {plot_losses(Path(run_dir), Path(out or Path(run_dir) / 'loss.png'))}")


def demo(out: str = "runs/demo", **overrides: Any) -> None:
    """The whole way in a few minutes on a CPU: data, training, evaluation, a dialogue to listen to.

    Args:
        out: the run folder; what an earlier demonstration left there is replaced.
        overrides: keys of example/demo.yaml, dotted.
    """
    from finetune.demo.run import run_demo

    run_demo(Path(out), overrides)


def demo_data(
    out_dir: str,
    num_dialogues: int = 60,
    min_sec: float = 20.0,
    max_sec: float = 40.0,
    seed: int = 0,
) -> None:
    """Make synthetic stereo dialogues with transcripts, to train on without any download.

    Args:
        out_dir: where to write train.jsonl, eval.jsonl, and the .wav and .json files.
        num_dialogues: how many; about a tenth is for evaluation.
        min_sec: shortest length of a dialogue.
        max_sec: longest length.
        seed: the same seed gives the same bytes.
    """
    from finetune.demo.dialogues import make_dialogues

    make_dialogues(
        Path(out_dir), num_dialogues=num_dialogues, min_sec=min_sec, max_sec=max_sec, seed=seed
    )
