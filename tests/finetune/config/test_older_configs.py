"""What runs of earlier versions wrote down is read as it was meant then."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import tiny_model
from test_config import MINIMAL

from finetune.config import (
    DataArgs,
    TrainArgs,
    changed_keys,
    load_config,
    load_run_config,
    save_config,
)
from finetune.errors import UserError
from finetune.inference import checkpoint_args
from ttt import TTTArgs


@pytest.mark.parametrize(
    "options",
    [
        {"method": "in_place", "write": "sum"},
        {"method": "in_place", "write": "delta"},
        {"method": "linear", "write": "sum"},
        {"method": "mlp", "write": "sum"},
        {"method": "in_place", "write": "sum", "enabled": False},
    ],
    ids=str,
)
def test_what_a_run_wrote_before_there_was_lr_scale_means_what_it_meant(
    tmp_path: Path, options: Any
) -> None:
    """It had a learning rate and a write rule whether they were read or not."""
    file = tmp_path / "args.yaml"
    save_config(TrainArgs(DataArgs(train_data="train.jsonl"), "run", full_finetuning=True), file)
    written = yaml.safe_load(file.read_text())
    written["ttt"] |= {"enabled": True, "learning_rate": 0.001, **options}
    del written["ttt"]["lr_scale"]
    file.write_text(yaml.safe_dump(written))
    (tmp_path / "consolidated").mkdir()
    args = checkpoint_args(tmp_path)
    ttt = args.ttt
    assert (ttt.enabled, ttt.method) == (written["ttt"]["enabled"], options["method"])
    if ttt.method == "in_place":
        assert (ttt.write, ttt.lr_scale) == (options["write"], "none")
        assert ttt.inner_learning_rate == 1e-3
    assert not changed_keys(file, args)
    # A file of one's own is read as it stands.
    if options == {"method": "in_place", "write": "sum"}:
        with pytest.raises(UserError, match="a hundredth of the default"):
            load_config(file)


@pytest.mark.parametrize("method", ["linear", "mlp", "in_place"])
@pytest.mark.parametrize("gate_init", [0.1, 0.5])
def test_a_run_from_before_there_were_convolutions_has_none(
    tmp_path: Path, method: str, gate_init: float
) -> None:
    file = tmp_path / "args.yaml"
    save_config(TrainArgs(DataArgs(train_data="train.jsonl"), "run", full_finetuning=True), file)
    written = yaml.safe_load(file.read_text())
    written["ttt"] |= {"enabled": True, "method": method, "start_layer": 0, "gate_init": gate_init}
    del written["ttt"]["qk_conv_kernel_size"], written["ttt"]["num_heads"]
    file.write_text(yaml.safe_dump(written))
    ttt = load_run_config(file).ttt
    if method == "in_place":
        assert ttt == TTTArgs(enabled=True, start_layer=0)
        return
    assert (ttt.qk_conv_kernel_size, ttt.num_heads, ttt.gate_init) == (1, None, gate_init)
    layer = tiny_model(ttt).ttt_layers[0]
    assert layer.in_proj.shape == (3 * 16, 16)
    assert not any("conv" in name for name in layer.ttt_parameters())
    # A file of one's own means today's form.
    file.write_text(f"{MINIMAL}ttt: {{enabled: true, method: {method}}}\n")
    assert load_config(file).ttt.qk_conv_kernel_size == 4


@pytest.mark.parametrize("method", ["in_place", "linear", "mlp"])
@pytest.mark.parametrize("is_written_down", [True, False])
def test_a_run_from_when_text_was_the_target_keeps_it(
    tmp_path: Path, method: str, is_written_down: bool
) -> None:
    file = tmp_path / "args.yaml"
    save_config(TrainArgs(DataArgs(train_data="train.jsonl"), "run", full_finetuning=True), file)
    written = yaml.safe_load(file.read_text())
    written["ttt"] |= {"enabled": True, "method": method, "start_layer": 0, "target": "text"}
    if not is_written_down:
        del written["ttt"]["target"]
    file.write_text(yaml.safe_dump(written))
    for args in (load_run_config(file), load_config(file)):
        assert args.ttt.reads("target") == (method == "in_place")
        assert args.ttt.target == ("text" if method == "in_place" else TTTArgs.target)
    # A file of one's own means today's default.
    file.write_text(f"{MINIMAL}ttt: {{enabled: true, method: {method}}}\n")
    assert load_config(file).ttt.target == "hidden"
