"""The commands: `moshi-ttt SUBCOMMAND`, and `train.py`, which is `moshi-ttt train`.

The program's parts are imported where a command needs them, so that help and mistakes come at once.
A command is a function of a dataclass, its options. What it would write over, or could not
write or listen on, it finds before it imports what is slow.
"""

if __name__ == "__main__":
    import runpy

    # All programs begin there, before these imports.
    runpy.run_module("finetune", run_name="__main__")

import shlex
import sys
from pathlib import Path
from typing import Any

from finetune.command_line import COMMANDS, command, data_command, print_all
from finetune.command_line import run as run  # who calls a command from Python looks for it here
from finetune.config import (
    CompletionOptions,
    EncodeOptions,
    InitOptions,
    KeyOptions,
    PlanOptions,
    PlotOptions,
    TrainOptions,
    ask_for_missing,
    completion_script,
    explain,
    load_config,
    pages,
)
from finetune.demo import DemoDataOptions, DemoOptions
from finetune.errors import UserError, counted
from finetune.evaluation import Options as EvaluateOptions
from finetune.kept import require_free_folder
from finetune.recall import RecallOptions
from finetune.recordings import (
    AnnotateOptions,
    CheckOptions,
    IndexOptions,
    ShowOptions,
    StatsOptions,
)
from finetune.serve import ExportOptions, GenerateOptions, ServeOptions
from finetune.spoken import RecallAudioOptions, RecallScoreOptions
from finetune.sweep import SweepOptions, require_sound_sweep


@command
def train(options: TrainOptions, overrides: dict[str, Any]) -> None:
    """Train as a YAML file says.

    Any of its keys may be given as well: --optim.lr=1e-4 --ttt.chunk_size=64 --resume
    """
    args = load_config(options.config, overrides, inputs_exist=True)
    from finetune.checkpoint import next_commands, require_own_folder
    from finetune.trainer import Trainer

    if "run_dir" not in overrides:
        require_own_folder(options.config, Path(args.run_dir))

    trainer = Trainer(args, config=options.config, force=options.force)
    if status := trainer.train():
        sys.exit(status)
    if trainer.world.is_main:
        print_all(next_commands(args))


@command
def config(options: KeyOptions) -> None:
    """Explain a key of a run's configuration: its type, bounds, default and meaning."""
    print(explain(options.key))


@command
def plan(options: PlanOptions, overrides: dict[str, Any]) -> None:
    """Say what a run would take, without a GPU: memory, steps, tokens, hours.

    The exit status is 0 if `train` can be expected to start: where the run does not fit, or names
    data or files with which `train` would end, as seen from this machine, it is 1. With
    --memory_only it says whether the run fits, whatever else it lacks. With --table, which is about
    any run, it is 0.
    """
    args = load_config(options.config, overrides)
    from finetune.plan import planned

    print_all(planned(options, args, overrides))


# --- data ----------------------------------------------------------------------------------------


@data_command
def data_index(options: IndexOptions) -> None:
    """Find the recordings of a folder, measure them, and write the JSONL that training reads.

    Hidden files are passed over. With --pair, two mono files for each dialogue are listed:
    moshi-ttt data index FOLDER --pair '{id}_left.wav,{id}_right.wav'
    """
    from finetune.recordings import index_folder

    print_all(index_folder(options))


@data_command
def data_annotate(options: AnnotateOptions) -> None:
    """Find when each word is said, and write the transcripts that training reads.

    Beside NAME.wav, `--engine align` looks for NAME.left.txt and NAME.right.txt, or for NAME.txt
    with lines that begin with A: (left) or B: (right). What is done is not done again.
    """
    from finetune.recordings import annotate_data

    print_all(annotate_data(options))


@data_command
def data_check(options: CheckOptions, overrides: dict[str, Any]) -> None:
    """Inspect recordings and transcripts before a run is trained on them.

    It may be stopped at any time and started again. The exit status is 1 if there are errors: what
    training on would be wrong. Of a JSONL, the keys data.main_channel, data.room_tone and
    data.word_start may be given; of a run's YAML file, all.
    """
    from finetune.recordings import check_data

    if not check_data(options, overrides):
        sys.exit(1)


@data_command
def data_show(options: ShowOptions, overrides: dict[str, Any]) -> None:
    """Draw a segment, and cut it out to listen to: waveforms, words and, with --config, tokens.

    Words in red have nothing, or far less than the other side, on the side of their speaker. The
    exit status is 1 if the recording or its transcript has an error, as data check says it.
    """
    from finetune.recordings import show_segment

    lines, is_sound = show_segment(options, overrides)
    print_all(lines)
    if not is_sound:
        sys.exit(1)


@data_command
def data_stats(options: StatsOptions, overrides: dict[str, Any]) -> None:
    """Count hours, words and tokens: who speaks how much, how fast, and when both do."""
    from finetune.recordings import describe_data

    print_all(describe_data(options, overrides))


@data_command
def data_encode(options: EncodeOptions, overrides: dict[str, Any]) -> None:
    """Encode all data of a run ahead of it, into data.cache_dir.

    It may be stopped at any time and started again. On several GPUs:
    torchrun --nproc-per-node 8 --no-python moshi-ttt data encode --config X.yaml
    """
    # Of the language model nothing but its shape is needed: an earlier stage may still train.
    weights = {"moshi_paths.init_from", "moshi_paths.moshi_path"}
    args = load_config(options.config, overrides, inputs_exist=True, unread=weights)
    from finetune.encode import encode_data

    encode_data(args)


@command
def init(options: InitOptions) -> None:
    """Write a commented configuration that fits your GPUs and data; what is missing is asked for.

    moshi-ttt init my.yaml --data talks/data.jsonl --goal remember --gpu_memory 80
    """

    def check_data(data: Path) -> None:
        from finetune.plan import recording_lengths

        recording_lengths("--data", data)

    answers = ask_for_missing(options, {"data": check_data})
    from finetune.checkpoint import free_run_dir
    from finetune.plan import Wanted, write_config

    run_dir = free_run_dir(answers.run_dir)
    wanted = Wanted(
        answers.data,
        answers.eval_data,
        answers.goal,
        answers.gpus,
        answers.gpu_memory,
        run_dir,
        answers.repo,
    )
    if run_dir != answers.run_dir:
        print(f"{answers.run_dir} holds something already: the run's folder is to be {run_dir}")
    print_all(write_config(wanted, answers.out))


@command
def generate(options: GenerateOptions) -> None:
    """Let Moshi listen to recordings and speak: one, a folder, a tree, or the rest of a dialogue.

    The answer to a recording is as long as the recording; its words are beside it, as .json. A
    recording that cannot be read is named, and the others are answered. docs/talk.md has more.
    """
    from finetune.monitoring import setup_logging
    from finetune.serve import held_session, list_jobs

    setup_logging()
    jobs = list_jobs(options)
    if options.prompt_sec:
        from finetune.serve import continue_recording

        text, out = continue_recording(options, jobs[0])
        print(f"Moshi: {text}\nwrote {out}")
        return
    with held_session(options) as session:
        from finetune.serve import answer_recordings

        outcome = answer_recordings(options, jobs, session)
    if len(outcome.texts) == 1:
        print(f"Moshi: {next(iter(outcome.texts.values()))}")
    if outcome.written:
        more = f" and {len(outcome.written) - 1} more" if len(outcome.written) > 1 else ""
        print(f"wrote {outcome.written[0]}{more}")
    wrong = [outcome.unsaved] if outcome.unsaved else []
    if problems := outcome.problems.values():
        heading = f"{counted(len(problems), 'recording was', 'recordings were')} not answered:"
        wrong.append("\n  - ".join([heading, *problems]))
    if wrong:
        raise UserError("\n".join(wrong))


@command
def serve(options: ServeOptions) -> None:
    """Let people call the model: a page to talk to it, and the protocol of stock moshi.client.

    On SIGTERM no new calls are taken, and those that there are may end. docs/talk.md has more.
    """
    from finetune.serve import listen

    with listen(options) as listening:
        from finetune.serve import serve as answer_calls

        answer_calls(options, listening)


@command
def export(options: ExportOptions) -> None:
    """Write a checkpoint as stock moshi loads it, TTT's weights beside, with a model card.

    It is loaded into stock moshi and compared before it is called done. docs/talk.md has more.
    """
    require_free_folder(options.out)
    from finetune.serve import export_checkpoint

    done = export_checkpoint(options)
    print(f"stock moshi's logits differ by {done.difference:.1e} of their norm, TTT off")
    print(f"wrote {options.out}: {', '.join(path.name for path in done.files)}")


@command
def evaluate(options: EvaluateOptions) -> None:
    """Measure whether TTT helps: loss by position, likelihood of pairs, health, spoken recall.

    Writes results.json, tables and report.html; called again, it continues where it was stopped.
    docs/evaluation.md explains what is measured.
    """
    from finetune.evaluation import evaluate_checkpoint

    for sentence in evaluate_checkpoint(options)["conclusions"]:
        print(f"- {sentence}")
    print(f"wrote {options.out / 'report.html'}, and the numbers in {options.out / 'results.json'}")


@command
def plot(options: PlotOptions) -> None:
    """Draw the loss curves of a run."""
    from finetune.monitoring import plot_losses

    print(f"wrote {plot_losses(options.run_dir, options.png)}")


@command
def sweep(options: SweepOptions, overrides: dict[str, Any]) -> None:
    """Train named variations of one configuration, one after another, and compare them.

    What is finished is not run again; what was interrupted goes on. See docs/sweeps.md. Keys of a
    run's configuration count for all runs: --max_steps=20 --sweep_dir=runs/try
    """
    require_sound_sweep(options, overrides)
    from finetune.sweep import run_command

    status = run_command(options, overrides)
    if status:
        sys.exit(status)


@command
def recall(options: RecallOptions) -> None:
    """Train small Moshis on an experiment: do they recall what attention has long forgotten?

    Runs that are in the folder already are not repeated. docs/recall.md explains what is measured.
    """
    from finetune.recall import run_command

    print(run_command(options))
    print(f"\nwrote {options.folder / 'report.md'}, recall.png beside it, and each run in runs")


@command
def recall_audio(options: RecallAudioOptions) -> None:
    """Write talks of a scripted user as audio, for any model that listens and speaks.

    The user tells facts, and asks for them seconds to an hour later. Then `generate` with
    --input_dir, or another model, answers, and recall-score counts. docs/spoken_recall.md has more.
    """
    from finetune.monitoring import setup_logging
    from finetune.spoken import write_recall_audio

    setup_logging()
    print_all(write_recall_audio(options))


@command
def recall_score(options: RecallScoreOptions) -> None:
    """Score what a model answered to the talks of recall-audio: recall by distance.

    Beside each input.wav it reads output.json, words with their times, or output.txt.
    """
    from finetune.spoken import score_recall

    print_all(score_recall(options))


@command
def demo(options: DemoOptions, overrides: dict[str, Any]) -> None:
    """Memory, and then the whole way from data to a dialogue to listen to, in minutes on a CPU.

    example/memory, a small Moshi, is asked for facts that its attention has lost, with TTT and
    without. Then another is trained. Keys of example/demo.yaml may be given as well.
    """
    from finetune.demo import run_demo

    run_demo(options.out, overrides, force=options.force)


@command
def demo_data(options: DemoDataOptions) -> None:
    """Make synthetic stereo dialogues with transcripts, to train on without any download."""
    from finetune.demo import make_dialogues, training_command

    out = options.out
    is_new = make_dialogues(
        out,
        num_dialogues=options.num_dialogues,
        min_sec=options.min_sec,
        max_sec=options.max_sec,
        seed=options.seed,
    )
    what = f"{options.num_dialogues} dialogues, listed in train.jsonl and eval.jsonl"
    print(f"wrote {out}: {what}" if is_new else f"{out} holds them already: {what}")
    print(f"next: moshi-ttt data check {shlex.quote(str(out / 'train.jsonl'))}")
    print(f"then: {training_command(out)}")


@command
def completion(options: CompletionOptions) -> None:
    """Print what makes a shell complete commands, options and keys.

    Now: eval "$(moshi-ttt completion bash)". For good: write that line into ~/.bashrc, or the one
    for zsh into ~/.zshrc.
    """
    print(completion_script(COMMANDS, options.shell), end="")


def write_docs() -> None:
    """Write what is generated of `docs/`; the current folder is the project's."""
    for name, text in pages(COMMANDS).items():
        Path("docs", name).write_text(text, encoding="utf-8")
