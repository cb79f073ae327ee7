"""A configuration whose values are all of the right type is checked for what does not fit
together."""

import dataclasses
from collections.abc import Collection, Iterator

from finetune.config.args import TrainArgs
from finetune.config.fields import Problem
from ttt.config import TTTArgs


def cross_checks(args: TrainArgs, given: Collection[str] = ()) -> Iterator[Problem]:
    """Yield values that contradict each other.

    Args:
        given: options of `ttt` that somebody has set, be it to their defaults.
    """
    yield from _check_what_trains(args)
    yield from args.model.problems(args.moshi_paths.random_init, args.ttt)
    yield from _check_lora(args)
    yield from _check_profile(args)
    yield from _check_paths(args)
    yield from _check_run(args)
    yield from ((f"ttt.{field}", text) for field, text in args.ttt.problems(given))


def _check_what_trains(args: TrainArgs) -> Iterator[Problem]:
    if args.full_finetuning and args.lora.enable:
        yield (
            "full_finetuning, lora.enable",
            "both are true, but LoRA is trained instead of the full weights; set one to false",
        )
    if args.full_finetuning and args.base_precision != "bfloat16":
        yield (
            "full_finetuning, base_precision",
            f"weights in {args.base_precision} cannot train; set full_finetuning to false (LoRA or "
            "TTT alone), or base_precision to bfloat16",
        )
    if not (args.full_finetuning or args.lora.enable or args.ttt.enabled):
        yield (
            "full_finetuning, lora.enable, ttt.enabled",
            "all are false, so nothing would train; set at least one to true",
        )


def _check_lora(args: TrainArgs) -> Iterator[Problem]:
    if args.lora.enable and args.lora.rank < 1:
        yield "lora.rank", f"must be 1 or more, got {args.lora.rank}"
    if args.lora.enable and args.lora.scaling <= 0:
        yield "lora.scaling", f"must be more than 0, got {args.lora.scaling}"


def _check_profile(args: TrainArgs) -> Iterator[Problem]:
    steps = args.profile_steps
    if steps is None:
        return
    if len(steps) != 2 or not 1 <= steps[0] <= steps[1] <= args.max_steps:
        yield (
            "profile_steps",
            f"must be the first and the last step to profile, between 1 and max_steps "
            f"({args.max_steps}), as [10, 12]; got {steps}",
        )


def _check_paths(args: TrainArgs) -> Iterator[Problem]:
    if not args.run_dir:
        yield "run_dir", "empty; name a new folder for what the run writes"
    if not args.data.train_data:
        yield "data.train_data", "empty; name a .jsonl file or a folder of them"
    if args.do_eval and not args.data.eval_data:
        yield (
            "do_eval, data.eval_data",
            "evaluation is on without data; name a .jsonl file, or set do_eval to false",
        )
    paths = args.moshi_paths
    if paths.random_init and paths.moshi_path:
        yield (
            "moshi_paths.random_init, moshi_paths.moshi_path",
            "random weights and weights from a file contradict; set one of the two only",
        )
    if paths.init_from and paths.moshi_path:
        yield (
            "moshi_paths.init_from, moshi_paths.moshi_path",
            "both say which weights to start from; set one of the two only",
        )
    missing = [
        f"moshi_paths.{name}"
        for name in ("moshi_path", "mimi_path", "tokenizer_path")
        if not getattr(paths, name) and not (name == "moshi_path" and paths.init_from)
    ]
    if missing and not paths.hf_repo_id and not paths.random_init:
        yield (
            f"moshi_paths.hf_repo_id, {', '.join(missing)}",
            "without a repository each file must be named; name what is null, or set hf_repo_id",
        )


def _check_run(args: TrainArgs) -> Iterator[Problem]:
    if args.selective_layers and args.gradient_checkpointing is not True:
        value = str(args.gradient_checkpointing).lower()
        yield (
            "selective_layers, gradient_checkpointing",
            f"with {value} no layer keeps less than that; set selective_layers to 0, or "
            "gradient_checkpointing to true",
        )
    if args.resume and args.overwrite_run_dir:
        yield (
            "resume, overwrite_run_dir",
            "one would continue from what the other deletes; set one of the two only",
        )


_TTT_MAY_CHANGE = {
    "enabled",
    "chunk_size",
    "learning_rate",
    "write_strength",
    "state_decay",
    "max_delta_norm",
    "keep_writes",
    "base_lr",
    "gate_init",
    "scan_checkpoint_group_size",
    "attention_context",
}
"""Options that trained TTT parameters do not depend on; all others say what they mean."""


def may_change(name: str) -> bool:
    """Return whether an option of `ttt` may be another where trained TTT parameters are used."""
    return name in _TTT_MAY_CHANGE


def changed_meaning(earlier: TTTArgs, now: TTTArgs) -> Iterator[tuple[str, str, str]]:
    """Yield the options by which parameters trained under `earlier` would mean something else: each
    as its name, its earlier value and its present one, as they are written in YAML.

    Of two methods, options of one alone say nothing more than that.
    """
    for field in dataclasses.fields(now):
        there, here = (getattr(each, field.name) for each in (earlier, now))
        if field.name == "chunk_edge":
            # null means one of the two.
            there, here = ("carry" if each.carries else "cut" for each in (earlier, now))
        is_read = earlier.reads(field.name) and now.reads(field.name)
        if is_read and not may_change(field.name) and there != here:
            yield field.name, _in_yaml(there), _in_yaml(here)


def _in_yaml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)
