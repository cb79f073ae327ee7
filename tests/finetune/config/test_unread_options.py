"""Options of `ttt` that the chosen method does not read, written with the values that they have by
default."""

import dataclasses
from pathlib import Path

import pytest
from test_config import MINIMAL

from finetune.config import load_config, load_run_config, save_config
from finetune.errors import UserError
from ttt import TTTArgs


@pytest.mark.parametrize(
    ("method", "key"),
    [
        ("linear", "chunk_size"),
        ("linear", "write"),
        ("linear", "rope_theta"),
        ("in_place", "mini_batch_size"),
        ("sum", "write_strength"),
    ],
)
def test_an_option_that_nothing_reads_is_a_problem_also_with_its_default(
    config: Path, tmp_path: Path, method: str, key: str
) -> None:
    chosen = {"ttt.method": method} if method != "sum" else {"ttt.write": "sum"}
    default = {f.name: f.default for f in dataclasses.fields(TTTArgs)}[key]
    name, value = next(iter(chosen.items()))
    own = tmp_path / "own.yaml"
    own.write_text(f"{MINIMAL}ttt: {{enabled: true, {name[4:]}: {value}, {key}: {default}}}\n")
    with pytest.raises(UserError, match=rf"own.yaml has a problem:\s+- ttt\.{key}: .*remove it"):
        load_config(own)
    # On the command line as well, beside a file that a run has written, which has all options.
    run_file = tmp_path / "args.yaml"
    save_config(load_config(config, {"ttt.enabled": "true", **chosen}), run_file)
    assert f"{key}: {default}" in run_file.read_text()
    assert load_config(run_file).ttt == load_run_config(run_file).ttt
    for load in (load_config, load_run_config):
        with pytest.raises(UserError, match=rf"the command line has a problem:\s+- ttt\.{key}: "):
            load(run_file, {f"ttt.{key}": str(default), "batch_size": "2"})


def test_null_sets_no_option(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(f"{MINIMAL}ttt: {{enabled: true, method: linear, learning_rate: null}}\n")
    assert load_config(path).ttt.learning_rate is None


def test_a_default_of_the_file_for_another_method_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(f"{MINIMAL}ttt: {{enabled: true, chunk_size: {TTTArgs.chunk_size}}}\n")
    assert load_config(path, {"ttt.method": "linear"}).ttt.method == "linear"
    assert "ttt.chunk_size of" in caplog.text and "is left out" in caplog.text
