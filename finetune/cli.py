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
    words = sys.argv[1:]
    if "--" not in words and not {"--help", "-h"}.isdisjoint(words):
        # Commands take any option, this one too: after the two dashes it is fire's.
        words = [word for word in words if word not in ("--help", "-h")] + ["--", "--help"]
    return run(lambda: fire.Fire(component, command=words, name=name))


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


def _require(**given: str) -> None:
    """Of options without a default: as parameters without one, fire would show its usage and not
    say that an option is misspelt."""
    for name, value in given.items():
        if not value:
            raise UserError(f"--{name} is missing. Ask for --help to see what it is.")


def _flag(name: str, value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise UserError(f"--{name}: is on or off; give --{name} alone, got {value!r}.")
    return value.lower() == "true"


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


def _items(name: str, values: str) -> list[str]:
    """What stands between the commas, each once."""
    found = [value.strip() for value in values.split(",") if value.strip()]
    if not found:
        raise UserError(f"--{name}: expected at least one, with a comma between each; got nothing.")
    return list(dict.fromkeys(found))


def _whole_numbers(name: str, values: str, *, low: int) -> list[int]:
    numbers = [_whole_number(name, value, low=low) for value in _items(name, values)]
    return list(dict.fromkeys(numbers))


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
    _refuse(unexpected, unknown)
    _require(checkpoint=checkpoint, audio=audio)
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
    wandb = {
        name: unknown.pop(f"wandb.{name}", None) for name in ("project", "offline", "run_name")
    }
    _refuse(unexpected, unknown)
    _require(checkpoint=checkpoint)
    from finetune.evaluation.options import (
        ARMS,
        TASKS,
        HealthOptions,
        Options,
        PairOptions,
        choices,
        default_out,
        one_of,
    )  # fmt: skip
    from finetune.evaluation.run import evaluate_checkpoint

    def optional(name: str, value: str | None) -> int | None:
        return None if value is None else _whole_number(name, value, low=1)

    place = Path(out) if out else default_out(Path(checkpoint))
    results = evaluate_checkpoint(
        Options(
            checkpoint=Path(checkpoint),
            out=place,
            tasks=choices("tasks", tasks or f"position,health{',pairs' * bool(pairs)}", TASKS),
            data=data,
            pairs=None if pairs is None else Path(pairs),
            arms=choices("arms", arms, ARMS),
            reset_frames=optional("reset_frames", reset_frames),
            baseline=None if baseline is None else Path(baseline),
            bin_sec=_number("bin_sec", bin_sec, low=0.08),
            max_sec=None if max_sec is None else _number("max_sec", max_sec, low=0.08),
            limit=optional("limit", limit),
            batch_size=_whole_number("batch_size", batch_size, low=1),
            block_frames=_whole_number("block_frames", block_frames, low=1),
            device=one_of("device", device, ("auto", "cpu", "cuda")),
            seed=_whole_number("seed", seed, low=0),
            pair=PairOptions(
                side=one_of("pair_side", pair_side, ("moshi", "user")),
                text=one_of("pair_text", pair_text, ("padding", "transcript")),
                text_weight=_number("pair_text_weight", pair_text_weight, low=0.0),
                first_codebook_weight=_number(
                    "pair_first_codebook_weight", pair_first_codebook_weight, low=0.0
                ),
                other_codebooks_weight=_number(
                    "pair_other_codebooks_weight", pair_other_codebooks_weight, low=0.0
                ),
                length_norm=one_of("pair_length_norm", pair_length_norm, ("mean", "sum")),
            ),
            health=HealthOptions(
                num_continuations=_whole_number("num_continuations", num_continuations, low=1),
                prompt_sec=_number("prompt_sec", prompt_sec, low=0.08),
                health_sec=_number("health_sec", health_sec, low=1.0),
                temperature=_number("temperature", temperature, low=0.0),
                text_temperature=_number("text_temperature", text_temperature, low=0.0),
            ),
            wandb_project=wandb["project"],
            wandb_run_name=wandb["run_name"],
            wandb_offline=str(wandb["offline"] or "false").lower() != "false",
        )
    )
    for sentence in results["conclusions"]:
        print(f"- {sentence}")
    print(f"wrote {place / 'report.html'}, and the numbers in {place / 'results.json'}")


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
def sweep(
    file: str,
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
    _refuse(unexpected)
    from finetune.sweep.command import run_command

    status = run_command(
        Path(file),
        overrides,
        folder=Path(sweep_dir) if sweep_dir else None,
        only=only.split(",") if only else [],
        table_only=_flag("table", table),
        slurm=_flag("slurm", slurm),
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
    given = {k for k, v in locals().items() if isinstance(v, str)} - {"out", "study"}
    _refuse(unexpected, unknown)
    from finetune.recall.command import default_out, run_key_study, run_recall, run_scale_study

    _refuse_unread(study, given)
    place = Path(out) if out else default_out(study, preset or "cpu", variant or "text")
    where: dict[str, Any] = {
        "seeds": [0] if seeds is None else _whole_numbers("seeds", seeds, low=0),
        "device": device or "auto",
        "workers": 1 if workers is None else _whole_number("workers", workers, low=1),
    }
    if study is not None:
        wide = [] if widths is None else _whole_numbers("widths", widths, low=16)
        if study == "keys":
            print(run_key_study(place, widths=wide))
        else:
            print(run_scale_study(place, widths=wide, **where))
        return
    longer = None if lengths is None else _whole_numbers("lengths", lengths, low=0)
    if longer == [0]:
        longer = []
    if longer and min(longer) < 2:
        raise UserError(
            "--lengths: expected whole numbers of at least 2 (the trained length is always "
            f"measured), or 0 alone for none, got {lengths!r}."
        )
    text = run_recall(
        place,
        size=preset or "cpu",
        variant=variant or "text",
        arms=[] if arms is None else _items("arms", arms),
        num_steps=None if steps is None else _whole_number("steps", steps, low=2),
        lengths=longer,
        **where,
    )
    print(text)


def _refuse_unread(study: str | None, given: set[str]) -> None:
    """Options of `moshi-ttt recall` that what is asked for does not read."""
    common = {"seeds", "workers", "device"}
    read = {
        None: {"preset", "variant", "arms", "steps", "lengths"} | common,
        "scale": {"widths"} | common,
        "keys": {"widths"},
    }
    if study not in read:
        raise UserError(f"--study: there is no {study!r}; choose scale or keys.")
    if given - read[study]:
        unread = ", ".join(f"--{name}" for name in sorted(given - read[study]))
        mode = f"with --study {study}" if study else "without --study"
        raise UserError(f"{unread}: not read {mode}; leave it out.")


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
