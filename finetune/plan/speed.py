"""The time of a training step is estimated from the few that were measured (docs/benchmarks.md).

All are of Moshi 7B on one NVIDIA H200, which computes as an H100 does, with compiled layers.
"""

from typing import NamedTuple

from finetune.config import TrainArgs
from finetune.data import count_frames
from finetune.distributed import shard_size
from finetune.model import count_by_role
from finetune.plan.memory import keeping_layers
from ttt import TTTLMModel
from ttt.layers import layer_class

MEASURED_FRAMES = 16 * 1250
SEC_PER_FRAME = 1.61 / MEASURED_FRAMES
"""With LoRA of rank 128, without TTT, with activation checkpointing."""
SEC_PER_FRAME_PARAMETERS = 7.687e9
"""Of the model that this was measured with, without LoRA."""
SELECTIVE_FACTOR = 0.77
"""Of the same, relative, with gradient_checkpointing: selective."""
KEEPING_SHARE = 0.202
"""Of the same: what is spared where all of the main transformer's layers keep their products, and
as much of it as layers do so."""
FLOAT8_FACTOR = 0.723
"""Of the same, with base_precision: float8: 1.141 s to 1.578 s. What TTT adds is not less."""
FULL_FACTOR = 1.17
"""Of training all weights, relative to LoRA: measured with the model sharded over two GPUs."""
REPLICA_FACTOR, SHARDED_FACTOR = 0.99, 0.94
"""Share of one GPU's speed that each of several has: measured on two GPUs of one host, joined by
NVLink, with LoRA. What more hosts cost is not known."""
FEW_FRAMES = MEASURED_FRAMES // 2
"""Below, what a step takes whatever its frames are may be a large part of it."""
SMALLEST_SEC = 0.433
"""The smallest step that was measured, in nf4: 1250 frames, LoRA of rank 64, TTT, moments in int8.
(One of 10,000 frames took 0.904 s, which lies between the bounds that are made of this one.)"""
SMALLEST_FRAMES = 1250
OVERHEAD_SEC = 0.33
"""What that step took beyond its arithmetic, which is that of bfloat16. Making weights from 4 bits,
moments and the starts of kernels does not grow with frames: so steps are taken to have no more of
it, for each micro-batch."""


SMALL_SHARE = 0.1
"""Of Moshi 7B's parameters. With fewer, the starts of kernels may take most of a step, and these do
not shrink with the parameters."""


class StepTime(NamedTuple):
    """Seconds between which a step lies; the same, where such steps were measured.

    Attributes:
        not_measured: words for the time that was not measured; empty where it was.
        why: what the bounds are from; empty where the upper one is none.
    """

    low_sec: float
    high_sec: float
    not_measured: str = ""
    why: str = ""

    @property
    def is_known(self) -> bool:
        return not self.not_measured


def step_time(args: TrainArgs, model: TTTLMModel, num_gpus: int) -> StepTime:
    """Return the time of a step on H100s or H200s."""
    frames = args.batch_size * count_frames(args.duration_sec)
    counts = count_by_role(model)
    size = (counts["base"][0] + counts["embedding"][0]) / SEC_PER_FRAME_PARAMETERS
    factor = FLOAT8_FACTOR if args.base_precision == "float8" else 1.0
    keeping = len(keeping_layers(args, model)) / len(model.transformer.layers)
    is_checkpointed = args.gradient_checkpointing is True
    factor *= 1 - KEEPING_SHARE * keeping if is_checkpointed else SELECTIVE_FACTOR
    factor += _ttt_share(args, model)
    factor *= FULL_FACTOR if args.full_finetuning else 1.0
    if num_gpus > 1:
        factor /= SHARDED_FACTOR if shard_size(args, num_gpus) > 1 else REPLICA_FACTOR
    arithmetic_sec = frames * args.num_microbatches * SEC_PER_FRAME * size * factor
    is_nf4 = args.base_precision == "nf4"
    if size < SMALL_SHARE:
        few = f"{SMALL_SHARE * SEC_PER_FRAME_PARAMETERS / 1e9:.2g} billion parameters"
        return StepTime(arithmetic_sec, arithmetic_sec, f"a step of a model of fewer than {few}")
    if frames >= FEW_FRAMES and not is_nf4:
        return StepTime(arithmetic_sec, arithmetic_sec)
    high_sec = arithmetic_sec + args.num_microbatches * OVERHEAD_SEC * size
    # A larger step in nf4 takes no less than the smallest.
    low_sec = arithmetic_sec
    if is_nf4 and frames >= SMALLEST_FRAMES:
        low_sec = min(max(low_sec, SMALLEST_SEC * size), high_sec)
    not_measured = "a step with base_precision: nf4 of this size"
    which = "with nf4 that was measured"
    if not is_nf4:
        few = f"fewer than {FEW_FRAMES} frames"
        not_measured = f"a step of {few} with base_precision: {args.base_precision}"
        which = f"of {few} that was measured, with nf4,"
    why = (
        f"the smallest step {which} took {SMALLEST_SEC:.2f} s for {SMALLEST_FRAMES} frames, "
        f"{SMALLEST_SEC - OVERHEAD_SEC:.2f} s of it arithmetic"
    )
    return StepTime(low_sec, high_sec, not_measured, why)


def _ttt_share(args: TrainArgs, model: TTTLMModel) -> float:
    """Return what TTT adds to a step in bfloat16, relative to that without TTT."""
    cost = layer_class(args.ttt.method).cost(args.ttt)
    if cost is None:
        return 0.0
    keeping = keeping_layers(args, model)
    factors = [
        cost.kept_time_factor if i in keeping else cost.time_factor for i in model.ttt_layers
    ]
    # As measured in five of 32 layers.
    return (sum(factors) - len(factors)) / len(model.transformer.layers) * 32 / 5
