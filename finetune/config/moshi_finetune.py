"""A configuration file of `moshi-finetune` is read unchanged, and what it means otherwise here is
said."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.config.args import TrainArgs
from finetune.config.read import IGNORED, flatten, read_yaml

_KEYS = {
    *("run_dir", "seed", "num_microbatches", "duration_sec", "batch_size", "max_norm", "max_steps"),
    *("log_freq", "ckpt_freq", "save_adapters", "do_ckpt", "num_ckpt_keep", "eval_freq", "do_eval"),
    *("gradient_checkpointing", "world_size", "full_finetuning", "param_dtype"),
    *("overwrite_run_dir", "first_codebook_weight_multiplier", "text_padding_weight"),
    *("data.train_data", "data.eval_data", "data.shuffle"),
    *("moshi_paths.hf_repo_id", "moshi_paths.mimi_path", "moshi_paths.moshi_path"),
    *("moshi_paths.tokenizer_path", "moshi_paths.config_path"),
    *("optim.lr", "optim.weight_decay", "optim.pct_start"),
    *("lora", "lora.enable", "lora.rank", "lora.scaling", "lora.ft_embed"),
    *("wandb.project", "wandb.offline", "wandb.key", "wandb.run_name"),
}
"""All that `moshi-finetune` reads."""


def changed_since_moshi_finetune(path: Path, args: TrainArgs) -> Iterator[str]:
    """Yield a line for each key of a `moshi-finetune` file that means something else here, or
    nothing.

    A file that has any key of this project's own is not such a file: its writer knows.

    Args:
        args: what was read from it, and from the command line.
    """
    written = flatten(read_yaml(path))
    if not written.keys() <= _KEYS:
        return
    for keys, text in _differences(written, args):
        yield f"unlike in moshi-finetune, {keys}: {text}"


def _differences(written: Mapping[str, Any], args: TrainArgs) -> Iterator[tuple[str, str]]:
    order = [key for key in ("data.shuffle", "seed") if key in written]
    if order:
        yield (
            ", ".join(order),
            "the order of the data depends on nothing else, so that it is the same on any number "
            "of devices; it is another order than there",
        )
    if "eval_freq" in written and args.do_eval:
        yield "eval_freq", "there is an evaluation before the first step as well"
    if "num_ckpt_keep" in written and args.num_ckpt_keep is not None:
        yield "num_ckpt_keep", "the best checkpoint is kept besides"
    if args.num_microbatches > 1 and "num_microbatches" in written:
        yield (
            "num_microbatches",
            "the loss of a step is one mean over all its tokens, not a mean of the microbatches' "
            "means",
        )
    if args.overwrite_run_dir and "overwrite_run_dir" in written:
        yield (
            "overwrite_run_dir",
            "what an earlier run wrote is deleted, once this one has something to take its place; "
            "other files stay",
        )
    for key in IGNORED & written.keys():
        yield key, "it means nothing here; torchrun says how many processes there are"
