"""A new TTT method needs its own file, one line of the registry and one of the tests' list: here is
one, and the whole program runs with it."""

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from recordings_tools import call
from safetensors.torch import load_file
from test_model import INVARIANTS
from torch import Tensor, nn
from training_tools import (
    assert_same_weights,
    checkpoint,
    logged,
    random_batch,
    saved_weights,
    stop_after,
    train,
    trainer,
)

from finetune.config import explain, load_config
from finetune.errors import UserError
from finetune.evaluation import Options, evaluate_checkpoint
from finetune.plan import plan
from finetune.trainer import Trainer
from ttt import TTTArgs, without_ttt
from ttt.layers import TTTLayer, TTTState, layer_class
from ttt.registry import METHODS, Method


@dataclass
class GatedDeltaState(TTTState):
    memory: Tensor
    """[B, H, f, f], S."""

    def fast_weights(self) -> tuple[torch.Tensor]:
        return (self.memory,)


class GatedDelta(TTTLayer[GatedDeltaState]):
    """Per head, S ← a S; S ← S + b (v − S k) kᵀ; o = S q, at every frame."""

    def __init__(self, place: Any, args: TTTArgs) -> None:
        super().__init__(place, args)
        self.num_heads = args.num_heads or place.num_heads

        def new(*shape: Any) -> Any:
            return nn.Parameter(torch.empty(*shape, device=place.device, dtype=place.dtype))

        self.in_proj = new(3 * self.width, self.width)
        self.rates = new(2 * self.num_heads, self.width)
        self.out_proj = new(self.width, self.width)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.normal_(self.in_proj, std=self.width**-0.5)
        nn.init.normal_(self.rates, std=0.02)
        self.out_proj.zero_()

    def forward(
        self, x: torch.Tensor, token_embeddings: torch.Tensor | None, is_frame: torch.Tensor | None
    ) -> torch.Tensor:
        normed = F.rms_norm(x, (self.width,))
        wide = torch.promote_types(x.dtype, torch.float32)
        heads = F.linear(normed, self.in_proj).to(wide).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = heads.unbind(2)
        k = F.normalize(k, dim=-1)
        keep, strength = F.linear(normed, self.rates).to(wide).sigmoid()[..., None].chunk(2, dim=2)
        state = self._streaming_state
        memory = self._start(len(x)) if state is None else state.memory
        outputs: list[Any] = []
        for t in range(x.shape[1]):
            memory = keep[:, t, :, :, None] * memory
            error = v[:, t] - (memory @ k[:, t, :, :, None])[..., 0]
            memory = memory + (strength[:, t] * error)[..., None] * k[:, t, :, None]
            outputs.append((memory @ q[:, t, :, :, None])[..., 0])
        if state is not None:
            state.memory.copy_(torch.where(state.learns[:, None, None, None], memory, state.memory))
        update = F.linear(torch.stack(outputs, dim=1).flatten(2).to(x.dtype), self.out_proj)
        self.measure_once(lambda: {"effect": update.float().norm() / x.float().norm()})
        return self.streamed(update, x)

    def _start(self, batch_size: int) -> Any:
        width = self.width // self.num_heads
        dtype = torch.promote_types(self.in_proj.dtype, torch.float32)
        return self.in_proj.new_zeros(batch_size, self.num_heads, width, width, dtype=dtype)

    def _init_streaming_state(self, batch_size: int) -> GatedDeltaState:
        return GatedDeltaState(batch_size, self.in_proj.device, memory=self._start(batch_size))


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        text = "heads between attention and MLP, whose matrix learns by a gated delta rule."
        method = Method(f"{__name__}:GatedDelta", text, also_reads=("num_heads",))
        patch.setitem(METHODS, "gated_delta", method)
        yield


@pytest.mark.parametrize("invariant", INVARIANTS, ids=lambda test: test.__name__)
def test_what_must_hold_for_every_method(
    invariant: Callable[..., None], request: pytest.FixtureRequest
) -> None:
    args = TTTArgs(enabled=True, method="gated_delta", start_layer=0, layer_frequency=2)
    wanted = inspect.signature(invariant).parameters
    others: dict[str, Any] = {
        "lengths": lambda: 4,
        "caplog": lambda: request.getfixturevalue("caplog"),
    }
    invariant(args=args, **{name: find() for name, find in others.items() if name in wanted})


OVERRIDES: dict[str, Any] = {
    "ttt.method": "gated_delta",
    "ttt.num_heads": 1,
    "optim.ttt_lr": 0.1,
    "model.attention_context": 10,
    "do_eval": True,
    "eval_freq": 2,
    "ckpt_freq": 2,
}


@pytest.fixture(scope="module")
def run(config: Path, registered: None, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A run with the toy method."""
    return train(config, tmp_path_factory.mktemp("toy") / "run", OVERRIDES)


def test_it_trains_and_is_measured_and_evaluated(run: Trainer) -> None:
    folder = Path(run.args.run_dir)
    effects = logged(folder, "ttt/layer_01/effect")
    assert effects[0] == 0 < effects[-1]
    assert len(logged(folder, "loss", "eval")) == 3
    saved = load_file(checkpoint(folder, 4) / "consolidated/ttt.safetensors")
    names = [f"transformer.layers.{i}.ttt.{n}" for i in (0, 1) for n in ("in_proj", "out_proj")]
    assert all(saved[name].abs().max() > 0 for name in names)


def test_a_resumed_run_is_the_run_that_never_stopped(
    config: Path, run: Trainer, tmp_path: Path
) -> None:
    stop_after(trainer(config, tmp_path, OVERRIDES), 3)
    train(config, tmp_path, {**OVERRIDES, "resume": True})
    assert logged(tmp_path) == logged(Path(run.args.run_dir))
    assert_same_weights(saved_weights(tmp_path, 4), saved_weights(Path(run.args.run_dir), 4))


def test_a_run_says_what_it_does_and_what_options_are_not_for_it(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config, tmp_path, {**OVERRIDES, "max_steps": 1, "do_eval": False})
    out = capsys.readouterr().out
    assert "TTT: gated-delta in layers 0, 1; up to 24 updates a sequence, every 1 frames" in out
    with pytest.raises(UserError, match="is an option of method linear and mlp"):
        load_config(config, {**OVERRIDES, "ttt.mini_batch_size": 4})
    with pytest.raises(UserError, match="in_place or linear or mlp or gated_delta, got 'gated'"):
        load_config(config, {**OVERRIDES, "ttt.method": "gated"})


def test_its_text_stands_where_methods_are_explained() -> None:
    text = " ".join(explain("ttt.method").split())
    assert "`gated_delta`: heads between attention and MLP, whose matrix learns by" in text
    assert all(f"`{name}`: {method.text}" in text for name, method in METHODS.items())
    assert all(re.fullmatch(r"\w.{20,}\.", method.text) for method in METHODS.values())


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (f"{__name__}:GatedDeltaa", f"{__name__} has no TTTLayer called 'GatedDeltaa'"),
        (f"{__name__}:OVERRIDES", f"{__name__} has no TTTLayer called 'OVERRIDES'"),
        (__name__, f"{__name__} has no TTTLayer called ''"),
        ("ttt.layers.gated:GatedDelta", "there is no module ttt.layers.gated"),
        ("tttt.layers.gated:GatedDelta", "there is no module tttt"),
    ],
)
@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_mistake_in_its_line_of_the_registry_is_one_message(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    line: str,
    why: str,
    command: str,
) -> None:
    monkeypatch.setitem(METHODS, "gated_delta", Method(line, "It learns."))
    keys = [f"--run_dir={tmp_path}/run", "--ttt.method=gated_delta"]
    assert call(command, config, *keys) == 1
    said = f"gated_delta cannot be built: its line in ttt/registry.py says {line!r}, and {why};"
    assert f"error: ttt.method: {said}" in capsys.readouterr().err


def test_what_its_module_lacks_is_no_mistake_of_the_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_layer.py").write_text("import flash_gated_delta\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(METHODS, "gated_delta", Method("my_layer:Layer", "It learns."))
    with pytest.raises(ModuleNotFoundError, match="flash_gated_delta"):
        layer_class("gated_delta")


def test_it_is_planned(config: Path) -> None:
    lines = list(plan(load_config(config, OVERRIDES), num_gpus=1, gpu_memory_gb=8))
    assert any("ttt.method gated_delta costs is not known" in line for line in lines)
    assert lines[-1] == "it fits"


def test_without_it_the_model_is_the_plain_one(run: Trainer) -> None:
    model, codes = run.model.eval(), random_batch()
    with torch.no_grad():
        on = model(codes).text_logits
        with without_ttt(model):
            off = model(codes).text_logits
        for layer in model.ttt_layers.values():
            layer.out_proj.zero_()
        plain = model(codes).text_logits
    assert torch.equal(off, plain) and not torch.equal(on, off)


def test_a_report_says_whether_it_helps(run: Trainer, tmp_path: Path) -> None:
    args = run.args
    given: dict[str, Any] = {
        "tasks": ("position",),
        "bin_sec": 0.4,
        "batch_size": 2,
        "device": "cpu",
    }
    given |= {"data": args.data.eval_data, "block_frames": 7, "arms": ("on", "off")}
    given |= {"checkpoint": checkpoint(Path(args.run_dir), 4), "out": tmp_path}
    options = Options.complete()(**given)
    results = evaluate_checkpoint(options)
    losses = [arm["text"]["mean"]["value"] for arm in results["position"]["arms"].values()]
    assert len(losses) == 2 and losses[0] != losses[1]
    assert results["model"]["ttt"] == "TTT: gated-delta in layers 0, 1"
    assert "gated-delta" in (tmp_path / "report.html").read_text()
