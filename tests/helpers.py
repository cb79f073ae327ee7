"""Small models of Moshi's structure for the tests."""

from typing import Any

import torch

from ttt import TTTArgs, TTTLMModel, build_model
from ttt.layers import blocks
from ttt.layers.mixer_state import TTTMixerState

DELAYS = [0, 0, 1, 1, 1, 0, 1, 1, 1]
"""Text, four Moshi codebooks, four user codebooks; delayed as in Moshi."""


def tiny_lm_kwargs(**overrides: Any) -> dict[str, Any]:
    """1 + 4 + 4 streams, two layers. LayerNorm and sine positions keep float64 throughout, where
    the RMSNorm and RoPE of Moshi itself compute in float32."""
    return {
        "dim": 16,
        "text_card": 30,
        "existing_text_padding_id": 3,
        "n_q": 8,
        "dep_q": 4,
        "card": 20,
        "num_heads": 2,
        "num_layers": 3,
        "hidden_scale": 4,
        "causal": True,
        "context": 12,
        "max_period": 10000,
        "gating": "silu",
        "norm": "layer_norm",
        "positional_embedding": "sin",
        "depformer_dim": 16,
        "depformer_num_heads": 2,
        "depformer_num_layers": 1,
        "depformer_dim_feedforward": 64,
        "depformer_multi_linear": True,
        "depformer_context": 4,
        "depformer_gating": "silu",
        "depformer_pos_emb": "none",
        "depformer_weights_per_step": True,
        "delays": DELAYS,
        **overrides,
    }


def moshi_like(**overrides: Any) -> dict[str, Any]:
    """The same with the norm and positions of Moshi."""
    return tiny_lm_kwargs(norm="rms_norm_f32", positional_embedding="rope", **overrides)


def tiny_args(**overrides: Any) -> TTTArgs:
    """Layers 0 and 2 of the tiny model learn, every 5 frames, with a visible effect; in the
    published form."""
    options: dict[str, Any] = {
        "start_layer": 0,
        "layer_frequency": 2,
        "chunk_size": 5,
        "learning_rate": 0.5,
    }
    options |= {"lr_scale": "none", "write": "sum", "target": "text"}
    return TTTArgs(**{"enabled": True, **options, **overrides})


def tiny_relative_args(**overrides: Any) -> TTTArgs:
    """The same with updates relative to the norms, of the default step size."""
    options = {} if overrides.get("write") == "delta" else {"learning_rate": 3.0}
    return tiny_args(**{"lr_scale": "relative", "learning_rate": None, **options, **overrides})


def tiny_linear_args(**overrides: Any) -> TTTArgs:
    """The same layers with TTT-Linear, or TTT-MLP, in mini-batches of 4 frames."""
    options: dict[str, Any] = {
        "start_layer": 0,
        "layer_frequency": 2,
        "method": "linear",
        "mini_batch_size": 4,
    }
    # Groups end inside the sequences of the tests.
    options |= {"base_lr": 4.0, "scan_checkpoint_group_size": 2}
    return TTTArgs(**{"enabled": True, **options, **overrides})


def tiny_delta_args(**overrides: Any) -> TTTArgs:
    """The same with `write: delta`."""
    return tiny_args(write="delta", learning_rate=TTTArgs.learning_rate, **overrides)


def tiny_model(
    args: TTTArgs | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    trained: bool = True,
    **lm_overrides: Any,
) -> TTTLMModel:
    """`trained`: TTT's parameters are as after some training, so that TTT has an effect."""
    torch.manual_seed(seed)
    lm_kwargs = tiny_lm_kwargs(**lm_overrides)
    model = build_model(lm_kwargs, args or tiny_args(), device="cpu", dtype=dtype).eval()
    if trained:
        for module in model.ttt_layers.values():
            as_if_trained(module)
    return model


def as_if_trained(module: Any) -> None:
    # A position's share of the step, 1/4 and more, must stay above zero.
    noise: dict[str, Any] = {"target_proj": 0.1, "token_offset": 0.05}
    for name, parameter in module.ttt_parameters().items():
        if name == "target_conv":
            torch.nn.init.normal_(parameter)
        elif name == "target_gate":
            parameter.data.fill_(0.1)
        elif name != "log_write_strength":
            parameter.data += noise.get(name, 0.2) * torch.randn_like(parameter)
        if name == "gate":
            parameter.data += 1.0


def fast_state(module: Any) -> list[Any]:
    """What a TTT module's stream depends on, as far as it means anything: the places of pending
    frames that have not come yet hold leftovers."""
    state = module._streaming_state
    kept = [x.clone() for x in state.fast_weights()]
    for name, x in state.tensors().items():
        if name.startswith("pending"):
            # The frames first, as the other method has them.
            x = x.transpose(1, 2) if isinstance(state, TTTMixerState) else x
            kept += [x[row, : state.num_pending[row]].clone() for row in range(len(x))]
        elif name in ("num_pending", "tail"):
            kept.append(x.clone())
    return kept


def random_codes(
    batch: int = 2,
    num_frames: int = 23,
    seed: int = 1,
    num_streams: int = 9,
    text_card: int = 30,
    card: int = 20,
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, text_card, (batch, 1, num_frames), generator=generator)
    audio = torch.randint(0, card, (batch, num_streams - 1, num_frames), generator=generator)
    return torch.cat([text, audio], dim=1)


def assert_layer_keeps_alone(model: TTTLMModel, codes: torch.Tensor, x: torch.Tensor) -> None:
    """Assert that of all that is as large as its input x, a layer keeps x for its backward pass."""
    rope = model._rope_table(codes)
    weights = blocks.layer_of(model.transformer.layers[1])
    kept: set[int] = set()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().nbytes() >= x.nbytes:
            kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    model.execution.layer(blocks.layer_block, x, weights, rope)  # compiles
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.execution.layer(blocks.layer_block, x, weights, rope).sum().backward()
    assert kept == {x.untyped_storage().data_ptr()}
