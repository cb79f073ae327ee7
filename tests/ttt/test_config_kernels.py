"""What the configuration says of the GPU kernels, without PyTorch, is what they take."""

from ttt.config import MLP_KERNEL_SIZES, TTTArgs
from ttt.ops.inner_loop.ttt_linear_mlp import kernel_sizes


def test_what_mlp_keeps_is_what_its_kernels_can() -> None:
    assert kernel_sizes(2) == MLP_KERNEL_SIZES
    assert TTTArgs(enabled=True, method="mlp").keeps_writes
    assert not TTTArgs(enabled=True, method="mlp", mini_batch_size=64).keeps_writes
    assert not TTTArgs(enabled=True, method="mlp", scan_checkpoint_group_size=16).keeps_writes
    assert not TTTArgs(enabled=True, method="linear").keeps_writes
