"""What a model card says of local files works in stock `moshi` where nothing can be downloaded."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Program
from training_tools import LORA, checkpoint, random_batch

from finetune.config import load_run_config
from finetune.inference import load_for_inference
from finetune.serve import ExportOptions, export_checkpoint
from finetune.serve.card import model_card
from ttt import without_ttt

SERVER = """
import os, runpy, sys
os.chdir({folder!r})
from moshi.models import loaders

def found(info, device):
    files = info.moshi_weights, info.mimi_weights, info.tokenizer, info.lora_weights
    print("found", [str(file) for file in files if file is not None])
    assert all(file is None or file.is_file() for file in files)
    assert info.lm_config["dim"] == {dim}
    sys.exit(0)

loaders.CheckpointInfo.get_mimi = found
sys.argv = {words!r}
runpy.run_module("moshi.server", run_name="__main__")
"""
"""The server, up to where it has found all files, but for Mimi, whose shape it cannot be told."""


def exported(
    config: Path, finished_run: Callable[..., Any], folder: Path, form: Any
) -> tuple[Path, Path]:
    finished_run(folder / "run", {"param_dtype": "float32", **LORA})
    last = checkpoint(folder / "run", 4)
    out = folder / "model"
    export_checkpoint(ExportOptions(last, out, form=form, device="cpu"))
    base = config.parent / "model"
    (out / "BASE").symlink_to(base)
    return last, out


@pytest.mark.parametrize("form", ["merged", "adapters"])
def test_the_card_loads_it_from_local_files(
    config: Path,
    finished_run: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
) -> None:
    last, out = exported(config, finished_run, tmp_path, form)
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("moshi.models.loaders.hf_hub_download", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.chdir(out)
    loaded: dict[str, Any] = {}
    code = code.replace('get_moshi("cuda")', 'get_moshi("cpu", dtype=torch.float32)')
    exec(code.replace('"cuda"', '"cpu"'), {"torch": torch}, loaded)
    assert loaded["tokenizer"].vocab_size() > 0 and loaded["mimi"].sample_rate == 24000
    ours, _ = load_for_inference(last, "cpu")
    codes = random_batch()
    with torch.no_grad(), without_ttt(ours):
        expected, found = ours(codes), loaded["moshi"](codes)
    mask = expected.text_mask
    torch.testing.assert_close(
        found.text_logits[mask], expected.text_logits[mask], atol=1e-5, rtol=0
    )

    # With Moshi's own Mimi, whose shape needs no file, the server takes the files as well.
    settings = json.loads((out / "config.json").read_text())
    del settings["mimi_config_name"]
    (out / "config.json").write_text(json.dumps(settings))
    options = ExportOptions(last, out, form=form)  # type: ignore[arg-type]
    card = model_card(load_run_config(last / "args.yaml"), options, settings)
    (command,) = re.findall("python -m (moshi.server --static none .*)\n", card)
    code = SERVER.format(folder=str(out), dim=settings["dim"], words=shlex.split(command))
    server = Program(code, environment={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")})
    said, _ = server.communicate(timeout=100)
    assert server.returncode == 0 and "found [" in said, said
