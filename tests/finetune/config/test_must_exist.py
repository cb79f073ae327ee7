"""What a command is given must be there, and what it writes need not be."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from recordings_tools import call

from finetune.cli import COMMANDS
from finetune.config import WRITABLE, WRITABLE_FOLDER, load_config, require_there
from finetune.config.fields import all_fields, complete, marks_of
from finetune.config.marks import MustExist
from finetune.config.values import members
from finetune.demo import DemoOptions
from finetune.errors import UserError
from finetune.evaluation import Options as EvaluateOptions
from finetune.serve import GenerateOptions, ServeOptions

ROOT = Path(__file__).parents[3]
MEMORY = ROOT / "example/memory"
MADE = {"out", "joined_dir", "sweep_dir", "report", "json", "html"}
"""Options that name what a command makes: there must be room for it."""
OWN_FOLDERS = {
    *("export out", "demo out", "demo-data out", "recall-audio out", "sweep sweep_dir"),
    *("generate out", "data index joined_dir"),
}
"""Options that name a folder whose files have names of their own: it must be new, or a record in it
or a mark in a file tells that the command has made it, which is looked at where it is written."""
LATER = {"session", "cache", "init run_dir"}
"""Options that name what may be there, or is made by somebody else: looked at where it is used."""


def options_of(name: str) -> Any:
    command: Any = COMMANDS[name]
    return complete(command.options)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_with_a_path_says_whether_it_must_be_there(name: str) -> None:
    for field in all_fields(options_of(name)):
        marks = marks_of(field.kind, MustExist)
        is_later = bool({field.key, f"{name} {field.key}"} & LATER)
        if Path in members(field.kind):
            assert bool(marks) != is_later, f"--{field.key} has no mark, and is not in LATER"
        if marks:
            assert (marks in ([WRITABLE], [WRITABLE_FOLDER])) == (field.key in MADE)
            assert {Path, str} & {*members(field.kind)}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_that_names_what_is_made_replaces_nothing_unasked(name: str) -> None:
    """Either what it names is among the outputs, which are looked at before the command begins, or
    it is known to be looked at elsewhere: see tests/finetune/test_replaces_nothing.py."""
    fields = [field for field in all_fields(options_of(name)) if not field.section]
    for field in fields:
        is_made = bool({WRITABLE, WRITABLE_FOLDER}.intersection(marks_of(field.kind, MustExist)))
        if not is_made or f"{name} {field.key}" in OWN_FOLDERS:
            continue
        given = {each.key: Path("there") for each in fields if each.is_required}
        path = given[field.key] = Path("made.png")
        outputs = options_of(name)(**given).outputs()
        assert any(path in (each.path, *each.path.parents) for each in outputs)


def test_everything_that_is_missing_is_named_at_once(tmp_path: Path) -> None:
    missing: Any = tmp_path / "no.jsonl"
    options = EvaluateOptions.complete()(
        checkpoint=tmp_path, data=f"{__file__},{missing}:0.5", pairs=missing, baseline=missing
    )
    with pytest.raises(UserError) as raised:
        require_there(options)
    assert str(raised.value).splitlines() == [
        "several options:",
        f"  - --checkpoint: {tmp_path} is no checkpoint (it has no folder `consolidated`).",
        f"  - --data: {missing} does not exist. Correct the path.",
        f"  - --baseline: there is no folder {missing}; correct the path.",
        f"  - --pairs: there is no file {missing}; correct the path.",
    ]


def test_what_is_there_and_what_is_not_given_are_not_refused(tmp_path: Path) -> None:
    require_there(ServeOptions(checkpoint=MEMORY))
    for audio in (Path(__file__), tmp_path):
        require_there(GenerateOptions(checkpoint=MEMORY, audio=audio, session=tmp_path / "new"))
    require_there(EvaluateOptions.complete()(checkpoint=MEMORY, data=f"{tmp_path}:2, {__file__}"))
    require_there(DemoOptions(out=tmp_path / "new"))
    # What a layout of one's own reads need be no file, and a repository on the hub is no path.
    for data in ("all.sines:2", "hf://me/talks", "."):
        require_there(EvaluateOptions.complete()(checkpoint=MEMORY, data=data))
    wanted = options_of("init")(data=Path(__file__), repo="kyutai/moshiko-pytorch-bf16")
    require_there(wanted)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data", "stats", "no.jsonl"], "--data: no.jsonl does not exist. Correct the path."),
        (["data", "show", "no.parquet"], "--file: no.parquet does not exist. Correct the path."),
        (
            ["plan", "--config=example"],
            "example is a folder, and no YAML file. example has curriculum.yaml, demo.yaml, "
            "modern_stack.yaml, moshi_ttt.yaml, moshi_ttt_full.yaml.",
        ),
        (["data", "index", "README.md"], "--folder: README.md is a file; name a folder."),
        (["plot", "README.md"], "--run_dir: README.md is a file; name a folder."),
        (
            ["evaluate", "--checkpoint=example/memory", "--pairs=docs"],
            "--pairs: docs is a folder; name a file.",
        ),
        (
            ["generate", "--checkpoint=example/memory", "--audio=docs", "--prompt_sec=1"],
            "--audio: docs is a folder, and --prompt_sec goes on with one recording; name a file.",
        ),
        (
            ["serve", "--checkpoint=example"],
            "--checkpoint: example is no checkpoint (it has no folder `consolidated`).",
        ),
    ],
)
def test_what_is_missing_or_another_thing_is_one_message(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(ROOT)
    assert call(*words) == 1
    assert capsys.readouterr().err == f"\nerror: {message}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", "--table", "no.yaml"], "no.yaml"),
        (["train", "--resume", "no.yaml", "--max_steps=2"], "no.yaml"),
        (["train", "--max_steps", "2", "--data.shuffle", "no.yaml"], "no.yaml"),
        (
            ["generate", "--stereo", "no/c", f"--audio={__file__}"],
            "--checkpoint: there is no folder",
        ),
        (["data", "check", "--fast", "no.jsonl"], "--data: no.jsonl does not exist"),
        # Such a word is what a switch may be, or nobody knows which of the two is meant.
        (["train", "--resume", "auto"], "--config is missing"),
        (["generate", "--stereo", "no/c", "--overwrite", "no/d"], "--checkpoint is missing"),
        # The file is there: the switch has no other excuse.
        (["plan", "no.yaml", "--table", "ture"], "--table: expected true or false, got 'ture'"),
        (["plan", "--config=no.yaml", "--table=ture"], "--table: expected true or false"),
    ],
)
def test_a_switch_takes_no_file_behind_it(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert call(*words) == 1
    said = capsys.readouterr().err
    assert message in said and ("is missing" in message or "is missing" not in said)


def test_a_switch_before_the_file_counts(capsys: pytest.CaptureFixture[str]) -> None:
    tables = []
    for words in (["--table", ROOT / "example/demo.yaml"], [ROOT / "example/demo.yaml", "--table"]):
        assert call("plan", *words) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1] and "141" in tables[0]


def test_a_checkpoint_may_lie_in_the_home_directory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(ROOT))
    assert call("generate", "--checkpoint=~/example/memory", "--audio=~/no.wav") == 1
    message = f"--audio: there is no file {ROOT}/no.wav; correct the path."
    assert capsys.readouterr().err == f"\nerror: {message}\n"


def test_a_folder_that_may_not_be_read_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    closed, exists = tmp_path / "closed/talk.wav", Path.exists

    # Whoever runs the tests as root may read everything.
    def refuse(path: Path) -> bool:
        if path == closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return exists(path)

    monkeypatch.setattr(Path, "exists", refuse)
    assert call("generate", f"--checkpoint={MEMORY}", f"--audio={closed}") == 1
    message = f"--audio: {closed} cannot be read: Permission denied."
    assert capsys.readouterr().err == f"\nerror: {message}\n"


@pytest.mark.parametrize("name", ["hf://kyutai/moshiko", "kyutai/moshiko-pytorch-bf16"])
def test_a_repository_in_the_place_of_a_checkpoint_is_told_from_a_folder(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert call("serve", f"--checkpoint={name}") == 1
    assert "hf download OWNER/NAME --local-dir FOLDER" in capsys.readouterr().err


# --- what a configuration names -------------------------------------------------------------------


@pytest.mark.parametrize("command", [["train"], ["data", "encode", "--config"]])
def test_everything_that_a_configuration_names_and_that_is_missing_is_named_at_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: list[str]
) -> None:
    """And before anything is loaded or fetched: the repository is no folder of this machine."""
    (tmp_path / "there.jsonl").touch()
    config = tmp_path / "own.yaml"
    config.write_text(
        f"""
        run_dir: {tmp_path / "run"}
        data: {{train_data: "{tmp_path}/there.jsonl:2, {tmp_path}/no:0.5, ~/none.jsonl"}}
        full_finetuning: true
        moshi_paths: {{hf_repo_id: nobody/nothing, mimi_path: {tmp_path}/no.safetensors}}
        """
    )
    words = [*command, config, "--do_eval", f"--data.eval_data={tmp_path}/neither.jsonl"]
    assert call(*words) == 1
    assert capsys.readouterr().err.splitlines()[1:] == [
        f"error: {config} has 3 problems:",
        f"  - data.train_data: {tmp_path}/no, {Path.home()}/none.jsonl do not exist. Correct the "
        "paths (commas separate paths, so that none may be in a name).",
        f"  - data.eval_data: {tmp_path}/neither.jsonl does not exist. Correct the path. (on the "
        "command line)",
        f"  - moshi_paths.mimi_path: there is no file {tmp_path}/no.safetensors; correct the path.",
    ]
    assert not (tmp_path / "run").exists()


def test_a_file_of_a_run_may_name_what_that_run_does_not_read(tmp_path: Path) -> None:
    """Evaluation data without evaluation, and what the hub or another layout has."""
    config = tmp_path / "own.yaml"
    config.write_text(
        f"""
        run_dir: {tmp_path / "run"}
        data: {{train_data: "{tmp_path}, hf://me/talks, all.sines:2", eval_data: no.jsonl}}
        moshi_paths: {{hf_repo_id: me/mine, mimi_path: "hf://me/mine/mimi.safetensors"}}
        full_finetuning: true
        """
    )
    load_config(config, inputs_exist=True)
    with pytest.raises(UserError, match=r"no\.jsonl does not exist"):
        load_config(config, {"do_eval": "true"}, inputs_exist=True)
    for repository in (f"{tmp_path}/none", "./none", "a/b/c"):
        with pytest.raises(UserError, match=r"moshi_paths\.hf_repo_id: there is no fold") as raised:
            load_config(config, {"moshi_paths.hf_repo_id": repository}, inputs_exist=True)
        start = f"correct the path. Relative paths start from the current folder, {Path.cwd()}."
        assert (start in str(raised.value)) == (not Path(repository).is_absolute())
    with pytest.raises(UserError, match=r"moshi_paths\.init_from: .* is no checkpoint"):
        load_config(config, {"moshi_paths.init_from": str(tmp_path)}, inputs_exist=True)
