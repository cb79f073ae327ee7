"""The command line: `moshi-ttt SUBCOMMAND`, and `train.py`, which is `moshi-ttt train`.

The program's parts are imported where a command needs them, so that help and mistakes come at once.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fire

from finetune.config import flag, number, refuse, require, whole_number
from finetune.errors import UserError
from finetune.interrupt import ending_on_signals, signal_of
from finetune.safety import learn_from_words, not_too_long, outlets


def main() -> None:
    commands = {
        "train": train,
        "plan": plan,
        "encode": encode,
        "generate": generate,
        "evaluate": evaluate,
        "plot": plot,
        "sweep": sweep,
        "recall": recall,
        "demo": demo,
        "demo-data": demo_data,
    }
    sys.exit(call(commands, name="moshi-ttt"))


def call(component: Any, *, name: str) -> int:
    """Have fire call what the command line names. Returns the exit status."""
    learn_from_words(words := sys.argv[1:])
    if not {"--help", "-h"}.isdisjoint(words):
        # After two dashes help is fire's; with an option besides, it would run the command first.
        wanted = words[:1] if isinstance(component, dict) else []
        words = [word for word in wanted if not word.startswith("-")] + ["--", "--help"]
    with outlets(), ending_on_signals():
        return run(lambda: fire.Fire(component, command=not_too_long(words), name=name))


def run(command: Callable[[], Any]) -> int:
    """Run `command`; a user's mistake is a message, not a traceback. Returns the exit status."""
    try:
        command()
        return 0
    except UserError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"\nstopped by {signal_of(error).name}", file=sys.stderr)
        return 128 + signal_of(error)


# The mark that `SetParseFn` leaves on a function; with an underscore, help does not list it.
fire.decorators.FIRE_METADATA = "_fire_metadata"


def _literal(function: Callable[..., None]) -> Callable[..., None]:
    """Have fire pass all values on as they were typed: it would make `2026_11_22` a number."""
    return fire.decorators.SetParseFn(str)(function)


@_literal
def train(config: str = "", *unexpected: str, **overrides: Any) -> None:
    """Train as a YAML file says.

    Args:
        config: the YAML file; docs/configuration.md lists its keys.
        overrides: any of these keys, dotted: --optim.lr=1e-4 --ttt.chunk_size=64 --resume
    """
    refuse(unexpected)
    require(overrides, config=config)
    from finetune.config import load_config
    from finetune.trainer import Trainer

    status = Trainer(load_config(config, overrides), config=Path(config)).train()
    if status:
        sys.exit(status)


@_literal
def plan(
    *unexpected: str,
    config: str = "",
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
    refuse(unexpected)
    require(overrides, config=config)
    from finetune.config import load_config
    from finetune.plan import plan as lines_of

    for line in lines_of(
        load_config(config, overrides),
        num_gpus=whole_number("gpus", gpus, low=1),
        gpu_memory_gb=number("gpu_memory", gpu_memory, low=1.0),
    ):
        print(line)


@_literal
def encode(*unexpected: str, config: str = "", **overrides: Any) -> None:
    """Encode all data of a run ahead of it, into data.cache_dir.

    It may be stopped at any time and started again. On several GPUs:
    torchrun --nproc-per-node 8 --no-python moshi-ttt encode --config X.yaml

    Args:
        config: the YAML file of the run.
        overrides: any of its keys, dotted: --data.cache_dir=codes --duration_sec=100
    """
    refuse(unexpected)
    require(overrides, config=config)
    from finetune.config import load_config
    from finetune.encode import encode_data

    encode_data(load_config(config, overrides))


@_literal
def generate(
    *unexpected: str,
    checkpoint: str = "",
    audio: str = "",
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
    refuse(unexpected, unknown)
    require(checkpoint=checkpoint, audio=audio)
    from finetune.inference import continue_recording

    text = continue_recording(
        Path(checkpoint),
        Path(audio),
        Path(out),
        device=device,
        prompt_sec=number("prompt_sec", prompt_sec, low=0.0),
        seed=whole_number("seed", seed, low=0),
        temperature=number("temperature", temperature, low=0.0),
        text_temperature=number("text_temperature", text_temperature, low=0.0),
    )
    print(f"Moshi: {text}")
    print(f"wrote {out}")


@_literal
def evaluate(
    *unexpected: str,
    checkpoint: str = "",
    tasks: str = "",
    data: str | None = None,
    pairs: str | None = None,
    out: str | None = None,
    arms: str = "on,off,reset,carried",
    reset_frames: str | None = None,
    baseline: str | None = None,
    bin_sec: str = "10",
    max_sec: str | None = None,
    limit: str | None = None,
    batch_size: str = "4",
    block_frames: str = "250",
    pair_side: str = "moshi",
    pair_text: str = "padding",
    pair_text_weight: str = "0",
    pair_first_codebook_weight: str = "1",
    pair_other_codebooks_weight: str = "0",
    pair_length_norm: str = "mean",
    num_continuations: str = "8",
    prompt_sec: str = "5",
    health_sec: str = "20",
    temperature: str = "0.8",
    text_temperature: str = "0.7",
    seed: str = "0",
    device: str = "auto",
    **unknown: Any,
) -> None:
    """Measure whether TTT helps: loss by position with controls, likelihood of pairs, health.

    Writes results.json, tables and report.html; called again, it continues where it was stopped.
    docs/evaluation.md explains what is measured. For Weights & Biases: --wandb.project=NAME,
    --wandb.offline, --wandb.run_name=NAME.

    Args:
        checkpoint: a folder run_dir/checkpoints/checkpoint_NNNNNN, or of a stock Moshi.
        tasks: of position, pairs, health; position and health if not given, and pairs with --pairs.
        data: a JSONL of recordings as for training; the run's data.eval_data if not given.
        pairs: a JSONL of {"good": "a.wav", "bad": "b.wav", "id": "17", "group": "agreement"}.
        out: the folder to write to; evaluation/RUN/CHECKPOINT if not given.
        arms: of loss by position: with TTT, without, TTT reset now and then, TTT starting from the
            state of another recording.
        reset_frames: how often the arm `reset` resets, more than a chunk; what attention sees, and
            at least two chunks, if not given.
        baseline: the output folder of an evaluation of another checkpoint, to compare with.
        bin_sec: width of the bins of position.
        max_sec: read no more than this of each recording.
        limit: read no more than the first so many recordings.
        batch_size: recordings side by side.
        block_frames: frames computed at once; bounds the memory, changes no result.
        pair_side: moshi or user: whose voice a mono recording is; the other side is silent.
        pair_text: padding, or transcript: the words of the .json beside each recording.
        pair_text_weight: of the text stream in the likelihood.
        pair_first_codebook_weight: of the first codebook.
        pair_other_codebooks_weight: of each other codebook.
        pair_length_norm: mean: divide by the number of frames; sum: do not.
        num_continuations: for health.
        prompt_sec: seconds of each recording before Moshi takes over.
        health_sec: seconds of each continuation.
        temperature: of the audio of continuations.
        text_temperature: of their text.
        seed: of continuations and of the bootstrap.
        device: auto, cpu or cuda.
    """
    given = {name: value for name, value in locals().items() if isinstance(value, str)}
    wandb = {
        name: unknown.pop(f"wandb.{name}", None) for name in ("project", "offline", "run_name")
    }
    refuse(unexpected, unknown)
    require(checkpoint=checkpoint)
    from finetune.evaluation import evaluate_checkpoint, read_options

    options = read_options(given, wandb)
    results = evaluate_checkpoint(options)
    for sentence in results["conclusions"]:
        print(f"- {sentence}")
    print(f"wrote {options.out / 'report.html'}, and the numbers in {options.out / 'results.json'}")


@_literal
def plot(run_dir: str = "", *unexpected: str, out: str | None = None, **unknown: Any) -> None:
    """Draw the loss curves of a run.

    Args:
        run_dir: the run's folder.
        out: the PNG to write; RUN_DIR/loss.png if not given.
    """
    refuse(unexpected, unknown)
    require(run_dir=run_dir)
    from finetune.monitoring import plot_losses

    print(f"wrote {plot_losses(Path(run_dir), Path(out or Path(run_dir) / 'loss.png'))}")


@_literal
def sweep(
    file: str = "",
    *unexpected: str,
    only: str | None = None,
    sweep_dir: str | None = None,
    table: str = "false",
    slurm: str = "false",
    **overrides: Any,
) -> None:
    """Train named variations of one configuration, one after another, and compare them.

    What is finished is not run again; what was interrupted goes on. See docs/sweeps.md.

    Args:
        file: the sweep's YAML file.
        only: names of runs, with commas between them; all if not given.
        sweep_dir: the folder to write to, instead of the file's.
        table: run nothing, show what there is.
        slurm: run nothing, write a script for a SLURM job array.
        overrides: keys of a run's configuration, dotted, for all runs: --max_steps=20
    """
    refuse(unexpected)
    require(overrides, file=file)
    from finetune.sweep import run_command

    status = run_command(
        Path(file),
        overrides,
        folder=Path(sweep_dir) if sweep_dir else None,
        only=only.split(",") if only else [],
        table_only=flag("table", table),
        slurm=flag("slurm", slurm),
    )
    if status:
        sys.exit(status)


@_literal
def recall(
    *unexpected: str,
    out: str | None = None,
    preset: str | None = None,
    variant: str | None = None,
    arms: str | None = None,
    seeds: str | None = None,
    steps: str | None = None,
    lengths: str | None = None,
    study: str | None = None,
    widths: str | None = None,
    workers: str | None = None,
    device: str | None = None,
    **unknown: Any,
) -> None:
    """An experiment: does a small Moshi recall what attention has long forgotten?

    Runs that are in the folder already are not repeated. docs/recall.md explains what is measured.

    Args:
        out: the folder for results, table (report.md, recall.csv) and picture (recall.png);
            runs/recall/VARIANT, runs/recall/gpu_VARIANT or runs/recall/study_NAME if not given.
        preset: cpu (if not given), ten minutes on two cores; gpu, 64 million parameters.
        variant: where the facts are: text (if not given), audio (the first codebook), joint (the
            key in the text, the value in the codebook, one frame) or segments (heard twice).
        arms: a comma between each; all of the preset if not given.
        seeds: a comma between each; 0 if not given.
        steps: optimizer steps; the preset's if not given.
        lengths: how many times longer sequences are tried after training, as in 4,16; 0: none; the
            preset's if not given.
        study: instead: scale: how the forms of the update fare over sizes of embeddings, widths
            and chunks; keys: how well untrained models tell keys apart.
        widths: of a study's models; all if not given.
        workers: runs at a time; 1 if not given.
        device: auto (if not given), cpu or cuda.
    """
    given = {name: value for name, value in locals().items() if isinstance(value, str)}
    refuse(unexpected, unknown)
    from finetune.recall import run_command

    print(run_command(given))


@_literal
def demo(*unexpected: str, out: str = "runs/demo", **overrides: Any) -> None:
    """The whole way in a few minutes on a CPU: data, training, evaluation, a dialogue to listen to.

    Args:
        out: the run folder; what an earlier demonstration left there is replaced.
        overrides: keys of example/demo.yaml, dotted.
    """
    refuse(unexpected)
    from finetune.demo import run_demo

    run_demo(Path(out), overrides)


@_literal
def demo_data(
    out_dir: str = "",
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
    refuse(unexpected, unknown)
    require(out_dir=out_dir)
    from finetune.demo import make_dialogues

    make_dialogues(
        Path(out_dir),
        num_dialogues=whole_number("num_dialogues", num_dialogues, low=2),
        min_sec=number("min_sec", min_sec, low=4.0),
        max_sec=number("max_sec", max_sec, low=4.0),
        seed=whole_number("seed", seed, low=0),
    )
