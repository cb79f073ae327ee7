"""`moshi-ttt config KEY` and `moshi-ttt completion SHELL`."""

import shutil
import subprocess
from typing import Any

import pytest
from recordings_tools import call

from finetune.cli import COMMANDS
from finetune.config import TrainArgs, completion_script, explain
from finetune.config.fields import all_fields
from finetune.errors import UserError


def test_a_key_is_explained_with_bounds_default_method_and_resume() -> None:
    text = explain("ttt.write_strength")
    assert text.startswith("ttt.write_strength: number\n")
    for part in ("more than 0 and at most 1000", "default:   10.0", "ttt.method in_place"):
        assert part in text
    assert "the initial β" in text
    assert "may be another: no result changes" in explain("data.num_workers")
    assert "may be another: no result changes" in explain("ttt.scan_checkpoint_group_size")
    assert "may be another: no weight changes" in explain("do_eval")
    assert "may be another: it says how the run is started" in explain("resume")
    assert "must be the same" in explain("ttt.method")
    assert "bounds" not in explain("run_dir")


@pytest.mark.parametrize("field", list(all_fields(TrainArgs)), ids=lambda field: field.key)
def test_every_key_has_an_explanation(field: Any) -> None:
    text = explain(field.key)
    assert " ".join(field.doc.split()[:3]) in " ".join(text.split())


def test_all_keys_are_listed_by_section() -> None:
    assert "  batch_size " in explain(None) and "  ttt: " in explain(None)
    assert "ttt.chunk_size" not in explain(None) and "ttt.chunk_size " in explain("ttt")


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("chunk_sise", "Did you mean ttt.chunk_size?"),
        ("chunk_size", "Did you mean ttt.chunk_size?"),
        ("lora.enabled", "Did you mean lora.enable?"),
        ("perfetto", "These have to do with it: profile_steps."),
        ("qqqqq", "moshi-ttt config lists all keys."),
    ],
)
def test_an_unknown_key_has_a_hint(key: str, hint: str) -> None:
    with pytest.raises(UserError, match=f"unknown key: {key}") as raised:
        explain(key)
    assert str(raised.value).endswith(hint)


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("config", "optim.lr") == 0
    assert capsys.readouterr().out == explain("optim.lr") + "\n"


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        (["moshi-ttt", "ev"], ["evaluate"]),
        (["moshi-ttt", "data", "an"], ["annotate"]),
        (["moshi-ttt", "data", "index", "--pa"], ["--pair="]),
        (["moshi-ttt", "train", "x.yaml", "--ttt.chunk_s"], ["--ttt.chunk_size="]),
        (["moshi-ttt", "plot", "--ttt.chunk_s"], []),
    ],
)
def test_a_shell_completes_what_is_typed(typed: list[str], completed: Any) -> None:
    words = " ".join(f"'{word}'" for word in typed)
    script = completion_script(COMMANDS, "bash") + (
        f"COMP_WORDS=({words}); COMP_CWORD={len(typed) - 1}; _moshi_ttt; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == completed
    assert not done.stderr
