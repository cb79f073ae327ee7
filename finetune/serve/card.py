"""The page that tells strangers what an exported model is."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.checkpoint import earlier_parts_of
from finetune.config import DataArgs, TrainArgs, load_run_config, parse_sources
from finetune.data import in_training, listed_recordings, num_different
from finetune.errors import UserError, counted
from finetune.serve.options import ExportOptions
from ttt import TTTArgs

_MOSHI_LICENSE = "cc-by-4.0"
_SETTINGS = (
    "max_steps", "batch_size", "duration_sec", "seed", "param_dtype", "base_precision",
    "full_finetuning",
    "text_padding_weight", "first_codebook_weight_multiplier",
)  # fmt: skip

_FLAGS = {
    "config_path": "config-path",
    "moshi_weights": "moshi-weight",
    "mimi_weights": "mimi-weight",
    "tokenizer": "tokenizer",
    "lora_weights": "lora-weight",
}
"""Of `moshi.server`, by the arguments of `CheckpointInfo.from_hf_repo`."""


def model_card(args: TrainArgs, options: ExportOptions, config: Mapping[str, Any]) -> str:
    """The README.md of an export. No path of the machine that trained it is in it.

    Args:
        config: what the export's config.json holds.
    """
    base = _base(args)
    is_kyutai = base is not None and base.startswith("kyutai/")
    front = ["---", "library_name: moshi", "tags: [speech, full-duplex, test-time-training]"]
    front.append(f"license: {_MOSHI_LICENSE if is_kyutai else 'other'}")
    front += [f"base_model: {base}"] if base else []
    name = options.checkpoint.absolute().name
    return "\n".join(
        [
            *front,
            "---",
            "",
            f"# {options.out.absolute().name}",
            "",
            f"Fine-tuned from {base or 'a model of its own'} with Moshi-TTT, checkpoint `{name}`.",
            "",
            "## How to run it",
            "",
            *_how_to_run(args, options, base, config),
            "",
            "## Training",
            "",
            *_training(args, options.checkpoint),
            *_earlier_parts(options.checkpoint),
            "",
            "## Evaluation",
            "",
            *_evaluation(args.data, options.checkpoint),
            "",
            "## License",
            "",
            f"The weights of {base} are licensed under CC-BY 4.0; so are these, and Kyutai is to "
            "be named."
            if is_kyutai
            else "That of the base model, and of the data; whoever publishes this must say which.",
            "",
        ]
    )


def _base(args: TrainArgs) -> str | None:
    repo = args.moshi_paths.hf_repo_id
    return None if repo is None or args.moshi_paths.random_init or Path(repo).exists() else repo


def _how_to_run(
    args: TrainArgs, options: ExportOptions, base: str | None, config: Mapping[str, Any]
) -> list[str]:
    repo = options.push or "THIS_REPOSITORY"
    if options.form == "merged":
        lines = ["With stock [`moshi`](https://github.com/kyutai-labs/moshi), from the hub:", ""]
        lines += ["```sh", f"python -m moshi.server --hf-repo {repo}", "```"]
    else:
        lines = ["Adapters alone, for stock [`moshi`](https://github.com/kyutai-labs/moshi):", ""]
        lines += [
            "```sh",
            f"python -m moshi.server --hf-repo {base or 'BASE'} --lora-weight lora.safetensors "
            "--config-path config.json",
            "```",
        ]
    lines += _from_local_files(options, config)
    differs = []
    if args.ttt.enabled:
        differs += [
            "**Stock `moshi` cannot run test-time training.** It computes the fine-tuned model as "
            "if its TTT layers were not there: `ttt.safetensors` is not read."
        ]
    if args.ttt.attention_context is not None:
        differs += [
            "**Stock `moshi` gives attention as many frames in all layers.** This model was "
            f"trained with {args.ttt.attention_context} in some, which `ttt.safetensors` says."
        ]
    if differs:
        lines += [
            "",
            *differs,
            "",
            "As it was trained:",
            "",
            "```sh",
            "moshi-ttt serve --checkpoint FOLDER   # a local copy, of the merged form",
            "```",
        ]
    return lines


def _from_local_files(options: ExportOptions, config: Mapping[str, Any]) -> list[str]:
    """Return how stock `moshi` loads the folder without asking the hub for anything: every file is
    named, as a path."""
    places = {
        "config_path": "config.json",
        "moshi_weights": "model.safetensors",
        "mimi_weights": config["mimi_name"],
        "tokenizer": config["tokenizer_name"],
    }
    if options.form == "adapters":
        places |= {"moshi_weights": "BASE/model.safetensors", "lora_weights": "lora.safetensors"}
    lines = ["", "From local files, without the hub, in this folder:", ""]
    if "mimi_config_name" in config:
        # The server has no option for it, and would look on the hub.
        places["mimi_config_path"] = config["mimi_config_name"]
    else:
        flags = [f"--{_FLAGS[key]} {name}" for key, name in places.items()]
        lines += ["```sh", f"python -m moshi.server --static none {' '.join(flags)}"]
        lines += ["python -m moshi.client   # in another terminal", "```", "", "or in Python:", ""]
    return [
        *lines,
        "```python",
        "from pathlib import Path",
        "",
        "from moshi.models.loaders import CheckpointInfo",
        "",
        "info = CheckpointInfo.from_hf_repo(",
        '    "none",',
        *[f'    {key}=Path("{name}"),' for key, name in places.items()],
        ")",
        'moshi, mimi = info.get_moshi("cuda"), info.get_mimi("cuda")',
        "tokenizer = info.get_text_tokenizer()",
        "```",
    ]


def _training(args: TrainArgs, checkpoint: Path) -> list[str]:
    settings: dict[str, Any] = {key: getattr(args, key) for key in _SETTINGS if hasattr(args, key)}
    settings["optim"] = dataclasses.asdict(args.optim)
    if args.lora.enable:
        settings["lora"] = dataclasses.asdict(args.lora)
    settings["ttt"] = _ttt(args.ttt)
    names = [Path(part.split(":")[0]).name for part in (args.data.train_data or "").split(",")]
    data = ", ".join(f"`{name}`" for name in names if name) or "not known"
    before = ""
    if _had_other_data(checkpoint):
        before = " An earlier training may have had others: name them too."
    return [f"Data: {data}.{before} Describe here whose voices they are, and who agreed.", "",
            "```json", json.dumps(settings, indent=1, default=str), "```"]  # fmt: skip


def _had_other_data(checkpoint: Path) -> bool:
    """Return whether other data than the configuration's may have trained the model: of the run
    that this one began from, or of this one before it was resumed."""
    path = checkpoint / "args.yaml"
    began = load_run_config(path).moshi_paths.init_from if path.is_file() else None
    return bool(began) or any(
        "data.train_data" in part["before"] for part in earlier_parts_of(checkpoint)
    )


def _earlier_parts(checkpoint: Path) -> list[str]:
    """Return which of the settings were others before the training was resumed; without values,
    which may be paths."""
    parts = [
        f"until step {part['until_step']} {', '.join(f'`{key}`' for key in part['before'])}"
        for part in earlier_parts_of(checkpoint)
    ]
    return ["", f"These settings are of the end. Others were {'; '.join(parts)}."] if parts else []


def _ttt(args: TTTArgs) -> dict[str, Any]:
    """Return the options that its method reads."""
    if not args.enabled:
        return {"enabled": False}
    return {name: v for name, v in dataclasses.asdict(args).items() if args.reads(name)}


def _evaluation(data: DataArgs, checkpoint: Path) -> list[str]:
    try:
        found = json.loads((checkpoint / "info.json").read_text(encoding="utf-8"))
        loss, step = found["eval_loss"], found["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return ["None that this export knows of."]
    more = "`moshi-ttt evaluate` measures more."
    if loss is None:
        return [f"Step {step}; its loss was not measured. {more}"]
    return [f"Step {step}; loss on {_evaluated(data, checkpoint)}: {loss:.3f} nats a token. {more}"]


def _evaluated(data: DataArgs, checkpoint: Path) -> str:
    """Return what the recordings of `eval_data` are to a model that `train_data` has trained."""
    trained_on = "recordings that it was trained on"
    paths, trained_paths = (
        {path for path, _ in parse_sources(spec, "data")}
        for spec in (data.eval_data, data.train_data)
    )
    if paths <= trained_paths:  # so it is, wherever they are now
        return trained_on
    try:
        evaluated = listed_recordings(data.eval_data, key="data.eval_data")
        trained = listed_recordings(data.train_data, key="data.train_data")
    except UserError:
        return "recordings of which this export cannot see whether it was trained on them"
    num_shared, total = len(in_training(trained, evaluated)), num_different(evaluated)
    if not num_shared:
        if _had_other_data(checkpoint):
            return "recordings that its last training did not have"
        return "held-out recordings"
    if num_shared == total:
        return trained_on
    return f"{counted(total, 'recording')}, {num_shared} trained on"
