"""The command line: `moshi-ttt SUBCOMMAND`, and `train.py`, which is `moshi-ttt train`.

The program's parts are imported where a command needs them, so that help and mistakes come at once.
"""

import math
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
        "plan": plan,
        "encode": encode,
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


# The mark that `SetParseFn` leaves on a function; with an underscore, help does not list it.
fire.decorators.FIRE_METADATA = "_fire_metadata"


def _literal(function: Callable[..., None]) -> Callable[..., None]:
    """Have fire pass all values on as they were typed: it would make `2026_11_22` a number."""
    return fire.decorators.SetParseFn(str)(function)


def _refuse(unexpected: tuple[str, ...], unknown: dict[str, Any] | None = None) -> None:
    """fire complains of arguments that nobody takes only when the command has run."""
    for word in unexpected:
        hint = f" Did you mean --{word}?" if "=" in word else ""
        raise UserError(f"unexpected argument: {word}.{hint}")
    for name in unknown or {}:
        raise UserError(f"unknown option: --{name}. Ask for --help to see those there are.")


def _number(name: str, value: str, *, low: float) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not low <= number < math.inf:
        raise UserError(f"--{name}: expected a number of at least {low:g}, got {value!r}.")
    return number


def _whole_number(name: str, value: str, *, low: int) -> int:
    if not value.lstrip("-").isdigit() or int(value) < low:
        raise UserError(f"--{name}: expected a whole number of at least {low}, got {value!r}.")
    return int(value)


@_literal
def train(config: str, *unexpected: str, **overrides: Any) -> None:
    """Train as a YAML file says.

    Args:
        config: the YAML file; docs/configuration.md lists its keys.
        overrides: any of these keys, dotted: --optim.lr=1e-4 --ttt.chunk_size=64 --resume
    """
    _refuse(unexpected)
    from finetune.config import load_config
    from finetune.trainer import Trainer

    status = Trainer(load_config(config, overrides)).train()
    if status:
        sys.exit(status)


@_literal
def plan(
    *unexpected: str,
    config: str,
    gpus: str = "1",
    gpu_memory: str = "80",
    **overrides: Any,
) -> None:
    """Say what a run would take, without a GPU: memory, steps, tokens, hours.

    Args:
        config: the YAML file of the run.
        gpus: how many, on all hosts together.
        gpu_memory: of each, in GB.
        overrides: keys of the configuration, dotted.
    """
    _refuse(unexpected)
    from finetune.config import load_config
    from finetune.plan import plan as lines_of

    for line in lines_of(
        load_config(config, overrides),
        num_gpus=_whole_number("gpus", gpus, low=1),
        gpu_memory_gb=_number("gpu_memory", gpu_memory, low=1.0),
    ):
        print(line)


@_literal
def encode(*unexpected: str, config: str, **overrides: Any) -> None:
    """Encode all data of a run ahead of it, into data.cache_dir.

    It may be stopped at any time and started again. On several GPUs:
    torchrun --nproc-per-node 8 --no-python moshi-ttt encode --config X.yaml

    Args:
        config: the YAML file of the run.
        overrides: any of its keys, dotted: --data.cache_dir=codes --duration_sec=100
    """
    _refuse(unexpected)
    from finetune.config import load_config
    from finetune.encode import encode_data

    encode_data(load_config(config, overrides))


@_literal
def generate(
    *unexpected: str,
    checkpoint: str,
    audio: str,
    out: str = "continuation.wav",
    prompt_sec: str = "5",
    seed: str = "0",
    temperature: str = "0.8",
    text_temperature: str = "0.7",
    device: str = "auto",
    **unknown: Any,
) -> None:
    """Continue a recorded dialogue: Moshi hears the user's channel to its end, and answers.

    Args:
        checkpoint: a folder run_dir/checkpoints/checkpoint_NNNNNN.
        audio: a stereo recording, left Moshi, right the user; with a transcript (.json) beside it,
            the prompt has its words.
        out: the stereo wav to write.
        prompt_sec: seconds in which Moshi says what it says in the recording.
        seed: of the sampling.
        temperature: of the audio; 0 always takes the likeliest code.
        text_temperature: of the text.
        device: auto, cpu or cuda.
    """
    _refuse(unexpected, unknown)
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
        prompt_sec=_number("prompt_sec", prompt_sec, low=0.0),
        seed=_whole_number("seed", seed, low=0),
        temperature=_number("temperature", temperature, low=0.0),
        text_temperature=_number("text_temperature", text_temperature, low=0.0),
    )
    soundfile.write(target, continuation.audio.T.numpy(), codec.sample_rate_hz)
    print(f"Moshi: {continuation.text}")
    print(f"wrote {target}")


@_literal
def plot(run_dir: str, *unexpected: str, out: str | None = None, **unknown: Any) -> None:
    """Draw the loss curves of a run.

    Args:
        run_dir: the run's folder.
        out: the PNG to write; RUN_DIR/loss.png if not given.
    """
    _refuse(unexpected, unknown)
    from finetune.plots import plot_losses

    print(f"wrote {plot_losses(Path(run_dir), Path(out or Path(run_dir) / 'loss.png'))}")


@_literal
def demo(*unexpected: str, out: str = "runs/demo", **overrides: Any) -> None:
    """The whole way in a few minutes on a CPU: data, training, evaluation, a dialogue to listen to.

    Args:
        out: the run folder; what an earlier demonstration left there is replaced.
        overrides: keys of example/demo.yaml, dotted.
    """
    _refuse(unexpected)
    from finetune.demo.run import run_demo

    run_demo(Path(out), overrides)


@_literal
def demo_data(
    out_dir: str,
    *unexpected: str,
    num_dialogues: str = "60",
    min_sec: str = "20",
    max_sec: str = "40",
    seed: str = "0",
    **unknown: Any,
) -> None:
    """Make synthetic stereo dialogues with transcripts, to train on without any download.

    Args:
        out_dir: where to write train.jsonl, eval.jsonl, and the .wav and .json files.
        num_dialogues: how many; about a tenth is for evaluation.
        min_sec: shortest length of a dialogue.
        max_sec: longest length.
        seed: the same seed gives the same bytes.
    """
    _refuse(unexpected, unknown)
    from finetune.demo.dialogues import make_dialogues

    make_dialogues(
        Path(out_dir),
        num_dialogues=_whole_number("num_dialogues", num_dialogues, low=2),
        min_sec=_number("min_sec", min_sec, low=4.0),
        max_sec=_number("max_sec", max_sec, low=4.0),
        seed=_whole_number("seed", seed, low=0),
    )
