"""The command line: `moshi-ttt SUBCOMMAND`, and `train.py`, which is `moshi-ttt train`.

The program's parts are imported where a command needs them, so that help and mistakes come at once.
A command is a function of a dataclass, its options; fire hands over the words that were typed.
"""

import difflib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_type_hints

import fire
from annotated_types import Ge, Le

from finetune.config import (
    POSITIONAL,
    FilePath,
    Size,
    help_page,
    load_config,
    pages,
    read_options,
)
from finetune.demo import DemoDataOptions, DemoOptions
from finetune.errors import UserError
from finetune.evaluation import Options as EvaluateOptions
from finetune.interrupt import ending_on_signals, signal_of
from finetune.recall import RecallOptions
from finetune.safety import learn_from_words, not_too_long, outlets, redact
from finetune.serve import ExportOptions, GenerateOptions, ServeOptions
from finetune.sweep import SweepOptions
from ttt.options import abbreviated

Words = Callable[..., None]
COMMANDS: dict[str, Words] = {}
"""What `moshi-ttt` can do, by name."""


def command(function: Callable[..., None]) -> Words:
    """Make a command of a function of options and, if it takes them, of a configuration's keys."""
    cls = get_type_hints(function)["options"]
    with_overrides = "overrides" in inspect.signature(function).parameters

    # Values come as they were typed: fire would make `2026_11_22` a number.
    @fire.decorators.SetParseFn(str)
    def words(*words: str, **given: Any) -> None:
        options, overrides = read_options(cls, words, given, with_overrides=with_overrides)
        function(options, overrides) if with_overrides else function(options)

    words.__doc__ = function.__doc__
    vars(words).update(options=cls, with_overrides=with_overrides)
    COMMANDS[function.__name__.replace("_", "-")] = words
    return words


def main() -> None:
    sys.exit(call(COMMANDS, name="moshi-ttt"))


def call(component: Mapping[str, Words] | Words, *, name: str) -> int:
    """Have fire call what the command line names. Returns the exit status."""
    learn_from_words(typed := sys.argv[1:])
    with outlets(), ending_on_signals():
        return run(lambda: _follow(not_too_long(typed), component, name))


def _follow(typed: list[str], component: Mapping[str, Words] | Words, name: str) -> None:
    wants_help = not {"--help", "-h"}.isdisjoint(typed)
    if not isinstance(component, Mapping):
        chosen = component
    elif typed and typed[0] in component:
        name, chosen = typed[0], component[typed[0]]
        typed = typed[1:]
    elif wants_help or not typed:
        print("\n".join([f"{name} COMMAND [--OPTION=VALUE ...]; {name} COMMAND --help", ""]))
        for each, function in component.items():
            print(f"  {each:<12} {str(function.__doc__).splitlines()[0]}")
        return
    else:
        _refuse_command(typed[0], component)
    if wants_help:
        print(help_page(name, chosen))
    else:
        fire.Fire(chosen, command=typed, name=name)


def _refuse_command(word: str, known: Mapping[str, Words]) -> NoReturn:
    close = difflib.get_close_matches(word[:100], known, n=1)
    hint = f"Did you mean {close[0]}?" if close else f"There are {', '.join(known)}."
    raise UserError(f"unknown command: {abbreviated(redact(word))}. {hint}")


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


@dataclass(frozen=True)
class ConfigOptions:
    config: Annotated[FilePath, POSITIONAL]
    """The YAML file of the run; docs/configuration.md lists its keys."""


@command
def train(options: ConfigOptions, overrides: dict[str, Any]) -> None:
    """Train as a YAML file says.

    Any of its keys may be given as well: --optim.lr=1e-4 --ttt.chunk_size=64 --resume
    """
    args = load_config(options.config, overrides)
    from finetune.trainer import Trainer

    status = Trainer(args, config=options.config).train()
    if status:
        sys.exit(status)


@dataclass(frozen=True)
class PlanOptions:
    config: FilePath
    """The YAML file of the run."""

    gpus: Size = 1
    """How many GPUs, on all hosts together."""

    gpu_memory: Annotated[float, Ge(1), Le(1e5)] = 80.0
    """Memory of each GPU, in GB."""


@command
def plan(options: PlanOptions, overrides: dict[str, Any]) -> None:
    """Say what a run would take, without a GPU: memory, steps, tokens, hours."""
    args = load_config(options.config, overrides)
    from finetune.plan import plan as lines_of

    for line in lines_of(args, num_gpus=options.gpus, gpu_memory_gb=options.gpu_memory):
        print(line)


@dataclass(frozen=True)
class EncodeOptions:
    config: FilePath
    """The YAML file of the run."""


@command
def encode(options: EncodeOptions, overrides: dict[str, Any]) -> None:
    """Encode all data of a run ahead of it, into data.cache_dir.

    It may be stopped at any time and started again. On several GPUs:
    torchrun --nproc-per-node 8 --no-python moshi-ttt encode --config X.yaml
    """
    args = load_config(options.config, overrides)
    from finetune.encode import encode_data

    encode_data(args)


@command
def generate(options: GenerateOptions) -> None:
    """Let Moshi listen to recordings and speak: one, a folder, a tree, or the rest of a dialogue.

    The answer to a recording is as long as the recording; its words are beside it, as .json. A
    recording that cannot be read is named, and the others are answered. docs/talk.md has more.
    """
    options.check()
    if options.prompt_sec:
        return _continue(options)
    from finetune.monitoring import setup_logging
    from finetune.serve import answer_recordings

    setup_logging()
    outcome = answer_recordings(options)
    if len(outcome.texts) == 1:
        print(f"Moshi: {next(iter(outcome.texts.values()))}")
    if outcome.written:
        more = f" and {len(outcome.written) - 1} more" if len(outcome.written) > 1 else ""
        print(f"wrote {outcome.written[0]}{more}")
    if outcome.problems:
        lines = [f"{len(outcome.problems)} recordings were not answered:"]
        raise UserError("\n  - ".join([*lines, *outcome.problems.values()]))


def _continue(options: GenerateOptions) -> None:
    from finetune.inference import continue_recording

    assert options.audio is not None
    out = options.out or Path("continuation.wav")
    text = continue_recording(
        options.checkpoint,
        options.audio,
        out,
        device=options.device,
        prompt_sec=options.prompt_sec,
        seed=options.seed,
        temperature=options.temperature,
        text_temperature=options.text_temperature,
    )
    print(f"Moshi: {text}")
    print(f"wrote {out}")


@command
def serve(options: ServeOptions) -> None:
    """Let people call the model: a page to talk to it, and the protocol of stock moshi.client.

    On SIGTERM no new calls are taken, and those that there are may end. docs/talk.md has more.
    """
    from finetune.serve import serve as answer_calls

    answer_calls(options)


@command
def export(options: ExportOptions) -> None:
    """Write a checkpoint as stock moshi loads it, TTT's weights beside, with a model card.

    It is loaded into stock moshi and compared before it is called done. docs/talk.md has more.
    """
    from finetune.serve import export_checkpoint

    done = export_checkpoint(options)
    print(f"stock moshi's logits differ by {done.difference:.1e} of their norm, TTT off")
    print(f"wrote {options.out}: {', '.join(path.name for path in done.files)}")


@command
def evaluate(options: EvaluateOptions) -> None:
    """Measure whether TTT helps: loss by position with controls, likelihood of pairs, health.

    Writes results.json, tables and report.html; called again, it continues where it was stopped.
    docs/evaluation.md explains what is measured.
    """
    options.check()
    from finetune.evaluation import evaluate_checkpoint

    for sentence in evaluate_checkpoint(options)["conclusions"]:
        print(f"- {sentence}")
    print(f"wrote {options.out / 'report.html'}, and the numbers in {options.out / 'results.json'}")


@dataclass(frozen=True)
class PlotOptions:
    run_dir: Annotated[FilePath, POSITIONAL]
    """The run's folder."""

    out: FilePath | None = None
    """The PNG to write; null: RUN_DIR/loss.png."""


@command
def plot(options: PlotOptions) -> None:
    """Draw the loss curves of a run."""
    from finetune.monitoring import plot_losses

    print(f"wrote {plot_losses(options.run_dir, options.out or options.run_dir / 'loss.png')}")


@command
def sweep(options: SweepOptions, overrides: dict[str, Any]) -> None:
    """Train named variations of one configuration, one after another, and compare them.

    What is finished is not run again; what was interrupted goes on. See docs/sweeps.md. Keys of a
    run's configuration count for all runs: --max_steps=20
    """
    from finetune.sweep import run_command

    status = run_command(options, overrides)
    if status:
        sys.exit(status)


@command
def recall(options: RecallOptions) -> None:
    """Train small Moshis on an experiment: do they recall what attention has long forgotten?

    Runs that are in the folder already are not repeated. docs/recall.md explains what is measured.
    """
    options.check()
    from finetune.recall import run_command

    print(run_command(options))


@command
def demo(options: DemoOptions, overrides: dict[str, Any]) -> None:
    """The whole way in a few minutes on a CPU: data, training, evaluation, a dialogue to listen to.

    Keys of example/demo.yaml may be given as well.
    """
    from finetune.demo import run_demo

    run_demo(options.out, overrides)


@command
def demo_data(options: DemoDataOptions) -> None:
    """Make synthetic stereo dialogues with transcripts, to train on without any download."""
    from finetune.demo import make_dialogues

    make_dialogues(
        options.out_dir,
        num_dialogues=options.num_dialogues,
        min_sec=options.min_sec,
        max_sec=options.max_sec,
        seed=options.seed,
    )


def write_docs() -> None:
    """Write what is generated of `docs/`; the current folder is the project's."""
    for name, text in pages(COMMANDS).items():
        Path("docs", name).write_text(text, encoding="utf-8")
