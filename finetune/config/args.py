"""Everything a training run can be told, as dataclasses: one section of the YAML each.

The string below a field is its documentation: `docs/configuration.md` is made from it.
`finetune.config.read` reads a file into these classes and checks the values.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from finetune.config.data_args import DataArgs
from finetune.config.must_exist import EARLIER_RUN, MODEL_FILE, REPOSITORY
from finetune.config.values import PathText
from ttt.config import TTTArgs
from ttt.options import (
    HARMLESS,
    LARGEST,
    MEASURED,
    START,
    Count,
    Frames,
    NonNegative,
    Positive,
)
from ttt.registry import METHODS

Size = Annotated[int, Ge(1), Le(2**16)]
Precision = Literal["bfloat16", "float8", "nf4"]
Seed = Annotated[int, Ge(0), Lt(2**63)]


@dataclass
class ModelPaths:
    """Sources of the base model's weights."""

    hf_repo_id: Annotated[PathText | None, REPOSITORY] = "kyutai/moshiko-pytorch-bf16"
    """A Hugging Face model repository, or a local folder of the same layout."""

    mimi_path: Annotated[PathText | None, MODEL_FILE] = None
    """File of Mimi's weights; null: the one in `hf_repo_id`."""

    moshi_path: Annotated[PathText | None, MODEL_FILE] = None
    """File of the language model's weights; null: the one in `hf_repo_id`."""

    tokenizer_path: Annotated[PathText | None, MODEL_FILE] = None
    """File of the SentencePiece text tokenizer; null: the one in `hf_repo_id`."""

    config_path: Annotated[PathText | None, MODEL_FILE] = None
    """JSON file with the language model's shape; null: the one in `hf_repo_id`, or Moshi 7B's
    where there is none."""

    mimi_config_path: Annotated[PathText | None, MODEL_FILE] = None
    """JSON file with Mimi's shape; null: the one in `hf_repo_id`, or that of Moshi's own Mimi
    where there is none."""

    random_init: bool = False
    """Start the language model from random weights: for demonstrations and benchmarks."""

    init_from: Annotated[PathText | None, EARLIER_RUN] = None
    """A checkpoint of an earlier run, `RUN/checkpoints/checkpoint_NNNNNN`, or the folder of an
    exported model, whose trained weights (base, LoRA, TTT) this run starts from, in place of
    `moshi_path` or random weights. Exported adapters need their base as `hf_repo_id`. Optimizer,
    schedule, step and data start anew; TTT that was not there is added untrained."""

    def on_this_machine(self) -> Iterator[tuple[str, str]]:
        """Yield what is no name on the hub, by its key."""
        for key, name in vars(self).items():
            if not isinstance(name, str) or not name or name.startswith(("hf://", "file://")):
                continue
            if key != "hf_repo_id" or Path(name).is_dir():
                yield key, name


@dataclass
class ModelArgs:
    """Changes to the model's shape; all but the window need `moshi_paths.random_init`."""

    attention_context: Frames | None = None
    """Frames that attention sees, in all layers but those for which `ttt.attention_context` says
    otherwise; null: as the checkpoint has it (3000 in Moshi)."""

    norm: Literal["layer_norm", "rms_norm_f32"] | None = None
    """Normalization in both transformers; null: as in config.json (`rms_norm_f32` in Moshi)."""

    gating: Literal["none", "silu"] | None = None
    """The MLPs of the main transformer: `silu`: gated, with hidden width h; `none`: a plain MLP
    (GELU) of width 3h/2, which has as many parameters; null: as in config.json (`silu` in
    Moshi)."""

    positional_embedding: Literal["sin", "rope"] | None = None
    """Positions in the main transformer: sines added to its input, or queries and keys turned;
    null: as in config.json (`rope` in Moshi)."""

    def problems(self, random_init: bool, ttt: TTTArgs) -> Iterator[tuple[str, str]]:
        """Yield what contradicts these values elsewhere: dotted keys, and the problem with its
        remedy."""
        for name in ("norm", "gating", "positional_embedding"):
            if getattr(self, name) is not None and not random_init:
                yield (
                    f"model.{name}, moshi_paths.random_init",
                    "trained weights are of the shape in their config.json, which can be changed "
                    f"for random weights alone; remove model.{name}, or set random_init to true",
                )
        if self.gating == "none" and ttt.enabled and METHODS[ttt.method].replaces_mlp:
            others = [name for name, method in METHODS.items() if not method.replaces_mlp]
            yield (
                "model.gating, ttt.method",
                f"{ttt.method} learns in gated MLPs, and with gating none there are none; set "
                f"ttt.method to {' or '.join(others)}, ttt.enabled to false, or gating to silu",
            )


@dataclass
class OptimArgs:
    """AdamW and its one-cycle schedule."""

    lr: NonNegative = 1e-4
    """Highest learning rate of everything that trains except the TTT parameters."""

    ttt_lr: NonNegative = 3e-4
    """Highest learning rate of the TTT parameters. Not `ttt.learning_rate`, the step size of the
    fast weights."""

    weight_decay: NonNegative = 0.1
    """Weight decay."""

    state: Literal["float32", "bfloat16", "int8"] = "float32"
    """How the optimizer keeps the two moments of a parameter between steps: in 8, 4 or (`int8`) 2
    bytes for both. 10 more go to the weight, its float32 copy and its gradient. `int8` needs
    bitsandbytes, and a model that is not sharded."""

    pct_start: Annotated[float, Gt(0), Lt(1)] = 0.05
    """Share of `max_steps` over which the learning rates rise, between 0 and 1."""


@dataclass
class LoraArgs:
    """Low-rank adapters on the linear layers, instead of training all weights."""

    enable: bool = False
    """Whether to train LoRA adapters."""

    rank: Annotated[int, Ge(0), Le(2**16)] = 64
    """Rank of the adapters."""

    scaling: Annotated[float, Ge(-LARGEST), Le(LARGEST)] = 2.0
    """Factor on the adapters' output."""

    ft_embed: bool = False
    """Whether the embeddings train as well, in full."""


@dataclass
class ParallelArgs:
    """Several processes, on one host or many; see [distributed.md](distributed.md)."""

    shard_size: Annotated[Count | Literal["auto"], HARMLESS] = "auto"
    """Processes that share one copy of the model: each holds a part of all weights, gradients and
    optimizer states (FSDP2). 1: every process holds all of it, and they exchange gradients alone.
    It must divide the number of processes: 8 on 16 makes two copies. `auto`: all processes if all
    weights train, else 1."""

    hang_timeout_sec: Annotated[float, Gt(0), Le(1e7), HARMLESS] = 600.0
    """Seconds after which a process that has not moved on ends the run, with a message that names
    it and the place where it stands."""


@dataclass
class WandbArgs:
    """Weights & Biases."""

    project: str | None = None
    """Project to log to; null: wandb is not used."""

    offline: bool = False
    """Log to files in the run folder, to be sent later with `wandb sync`."""

    key: str | None = field(default=None, repr=False)
    """API key; null: the one that wandb finds itself (`wandb login`, `WANDB_API_KEY`). It is never
    written to the run folder or to a log."""

    run_name: str | None = None
    """Name of the run; null: the name of `run_dir`."""


@dataclass
class TrainArgs:
    """A training run."""

    data: DataArgs
    """What to train and evaluate on: stereo audio and transcripts, see [data.md](data.md)."""

    run_dir: Annotated[PathText, START]
    """Folder for everything the run writes. It must be new or empty, unless `resume` or
    `overwrite_run_dir` say otherwise."""

    moshi_paths: ModelPaths = field(default_factory=ModelPaths)
    """Where the weights come from."""

    model: ModelArgs = field(default_factory=ModelArgs)
    """Changes to the model's shape."""

    full_finetuning: bool = False
    """Train all weights of the language model. With this and `lora.enable` both false, the TTT
    parameters train alone."""

    lora: LoraArgs = field(default_factory=LoraArgs)
    """LoRA: low-rank adapters on the linear layers, trained instead of all weights."""

    ttt: TTTArgs = field(default_factory=TTTArgs)
    """Test-time training: layers whose weights keep learning while the model reads."""

    first_codebook_weight_multiplier: NonNegative = 1.0
    """Weight in the loss of the first (semantic) codebook of the audio; the others have 1."""

    text_padding_weight: NonNegative = 0.5
    """Weight in the loss of text padding and end-of-padding; words have 1."""

    duration_sec: Annotated[float, Ge(0.08), Le(86_400)] = 10.0
    """Length of a training sequence, in seconds (12.5 frames each)."""

    batch_size: Size = 1
    """Sequences per device and forward pass."""

    num_microbatches: Size = 1
    """Forward passes whose gradients are accumulated into one step."""

    max_steps: Count = 100
    """Optimizer steps to train for."""

    max_norm: Positive = 1.0
    """Upper bound on the norm of the gradient; a larger gradient is scaled down to it."""

    gradient_checkpointing: Annotated[bool | Literal["selective"], HARMLESS] = True
    """What the forward pass keeps for the backward pass. `true`: the inputs of layers alone; all
    else is computed again, for the least memory and about a quarter more time. `selective`: also
    the results of attention and of large matrix products, which take most of that time. `false`:
    everything."""

    selective_layers: Annotated[int, Ge(0), Le(10_000), HARMLESS] = 0
    """How many of the main transformer's layers keep what `selective` does, where
    `gradient_checkpointing: true` leaves memory free: each makes the step shorter. Those with TTT
    come last. `moshi-ttt plan` says how many fit."""

    compile: Annotated[bool | None, HARMLESS] = None
    """Whether to compile the layers with `torch.compile`: the first step takes a minute or so, all
    others are faster. null: on a GPU. Needs gcc or clang: on a GPU in any case, for the kernels,
    and on a CPU (with `param_dtype: float32`) if true."""

    optim: OptimArgs = field(default_factory=OptimArgs)
    """The optimizer, AdamW, with a one-cycle schedule."""

    param_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the parameters in the forward pass. The optimizer's own copy is always float32."""

    base_precision: Precision = "bfloat16"
    """How the frozen weights of both transformers are kept, where LoRA or TTT alone train.
    `bfloat16`: as `param_dtype` says. `float8`: one byte a weight, and products in 8 bits, which
    Ada and Hopper GPUs do at twice the speed. `nf4`: 4.5 bits a weight, for the least memory. See
    [small-gpus.md](small-gpus.md)."""

    device: Annotated[Literal["auto", "cpu", "cuda"], HARMLESS] = "auto"
    """Where to train; `auto`: on the GPU if there is one."""

    seed: Seed = 0
    """Seed of the data order and of new parameters."""

    log_freq: Annotated[Count, HARMLESS] = 1
    """Steps between two logged lines of training metrics."""

    profile_steps: Annotated[list[int] | None, HARMLESS] = None
    """First and last of the steps to profile, as `[10, 12]`: a trace for
    [Perfetto](https://ui.perfetto.dev) in `profile/` of the run folder, one a process. Profiled
    steps are slower."""

    do_eval: Annotated[bool, MEASURED] = False
    """Whether to evaluate on `data.eval_data`."""

    eval_freq: Annotated[int, Ge(-(10**9)), Le(10**9), MEASURED] = 0
    """Steps between two evaluations, if `do_eval`; below 1: only after the last step. There is one
    before the first step as well."""

    health_sec: Annotated[float, Ge(0), Le(3600), MEASURED] = 6.0
    """At every evaluation the model continues two of its segments for this long, and the log warns
    if what it says is no longer like speech; 0: do not. It takes a `duration_sec` of 3 s or more,
    and a model that is not sharded. See [evaluation.md](evaluation.md)."""

    do_ckpt: Annotated[bool, MEASURED] = True
    """Whether to write checkpoints."""

    ckpt_freq: Annotated[int, Ge(-(10**9)), Le(10**9), HARMLESS] = 0
    """Steps between two checkpoints, if `do_ckpt`; below 1: only after the last step."""

    ckpt_async: Annotated[bool, HARMLESS] = True
    """Whether training goes on while a checkpoint is written, from a copy of it in the host's
    memory. `false` needs no such copy."""

    num_ckpt_keep: Annotated[Count | None, HARMLESS] = 3
    """How many of the latest checkpoints to keep, besides the best; null: all. Those whose
    evaluation was not finite are not counted."""

    save_adapters: Annotated[bool, MEASURED] = True
    """With LoRA: write the adapters alone. False: merge them into the weights and write those."""

    resume: Annotated[bool | Literal["auto"], START] = False
    """Continue from the latest checkpoint in `run_dir`. `true`: there must be one; `auto`: if there
    is one, else start anew."""

    overwrite_run_dir: Annotated[bool, START] = False
    """Replace the run that `run_dir` holds. What that run wrote is deleted when the new one has
    written its first checkpoint, or has come to its end; files of your own stay."""

    max_nonfinite_steps: Annotated[Count, HARMLESS] = 10
    """Steps in a row with a loss or gradient that is not finite (each is skipped) after which the
    run stops with an explanation. Whatever this is, a run whose last evaluation or weights are not
    finite ends in an error."""

    parallel: ParallelArgs = field(default_factory=ParallelArgs)
    """Several processes: what they share, and how long they wait for each other."""

    wandb: Annotated[WandbArgs, HARMLESS] = field(default_factory=WandbArgs)
    """Logging to Weights & Biases."""
