"""Configuration files that load, and mistakes in them that are all reported with a remedy."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from moshi_finetune_tools import MOSHI_FINETUNE

from finetune.cli import COMMANDS
from finetune.config import (
    DataArgs,
    TrainArgs,
    load_config,
    pages,
    public_dict,
    save_config,
)
from finetune.config.docs_page import COMMAND
from finetune.errors import UserError
from ttt import TTTArgs

ROOT = Path(__file__).parents[3]
MINIMAL = "run_dir: run\ndata: {train_data: train.jsonl}\nlora: {enable: true}\n"


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., TrainArgs]:
    def load_text(text: str, **overrides: Any) -> TrainArgs:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, {key.replace("__", "."): overrides[key] for key in overrides})

    return load_text


@pytest.fixture
def problems(load: Callable[..., TrainArgs]) -> Callable[..., list[str]]:
    """The reported lines below the heading."""

    def load_wrong(text: str, **overrides: Any) -> list[str]:
        with pytest.raises(UserError) as error:
            load(text, **overrides)
        return [line.removeprefix("  - ") for line in str(error.value).splitlines()[1:]]

    return load_wrong


RUNS = [
    path
    for path in sorted((ROOT / "example").glob("*.yaml"))
    if "sweep_dir:" not in path.read_text()  # sweeps are in test_shipped_sweeps.py
]


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.name)
def test_shipped_files_load(path: Path) -> None:
    args = load_config(path, {})
    assert args.run_dir and args.data.train_data


def test_paths_may_begin_in_the_home_directory(
    load: Callable[..., TrainArgs], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    text = MINIMAL.replace("run_dir: run", "run_dir: ~/runs/a")
    args = load(text, data__cache_dir="~/codes", moshi_paths__moshi_path="~/moshi/x.safetensors")
    assert args.run_dir == "/home/me/runs/a" and args.data.cache_dir == "/home/me/codes"
    assert args.moshi_paths.moshi_path == "/home/me/moshi/x.safetensors"


def test_moshi_finetune_file_loads_with_equal_values(load: Callable[..., TrainArgs]) -> None:
    args = load(MOSHI_FINETUNE)
    assert args.data == DataArgs(train_data="train.jsonl", eval_data="", shuffle=True)
    assert args.moshi_paths.hf_repo_id == "kyutai/moshiko-pytorch-bf16"
    assert (args.lora.enable, args.lora.rank, args.lora.scaling) == (True, 128, 2.0)
    assert (args.lora.ft_embed, args.full_finetuning) == (False, False)
    assert (args.first_codebook_weight_multiplier, args.text_padding_weight) == (100.0, 0.5)
    assert (args.duration_sec, args.batch_size, args.max_steps) == (100.0, 16, 2000)
    assert (args.optim.lr, args.optim.weight_decay, args.optim.pct_start) == (2e-6, 0.1, 0.05)
    assert (args.seed, args.log_freq, args.eval_freq, args.ckpt_freq) == (0, 1, 100, 100)
    assert (args.do_eval, args.do_ckpt, args.save_adapters) == (False, True, True)
    assert (args.gradient_checkpointing, args.overwrite_run_dir) == (True, True)
    assert (args.wandb.project, args.wandb.run_name, args.wandb.key) == (None, None, None)
    assert args.ttt.enabled is False


def test_defaults_are_those_of_moshi_finetune(load: Callable[..., TrainArgs]) -> None:
    args = load(MINIMAL)
    assert (args.lora.rank, args.lora.scaling, args.optim.lr) == (64, 2.0, 1e-4)
    assert (args.optim.weight_decay, args.optim.pct_start) == (0.1, 0.05)
    assert (args.first_codebook_weight_multiplier, args.text_padding_weight) == (1.0, 0.5)
    assert (args.duration_sec, args.batch_size, args.num_microbatches) == (10.0, 1, 1)
    assert (args.max_steps, args.max_norm, args.log_freq, args.seed) == (100, 1.0, 1, 0)
    assert (args.do_ckpt, args.ckpt_freq, args.num_ckpt_keep) == (True, 0, 3)
    assert (args.eval_freq, args.do_eval, args.gradient_checkpointing) == (0, False, True)
    assert (args.save_adapters, args.overwrite_run_dir) == (True, False)
    assert (args.param_dtype, args.data.shuffle) == ("bfloat16", False)


def test_every_problem_is_reported_at_once(problems: Callable[..., list[str]]) -> None:
    found = problems(
        "run_dir: run\n"
        "data: {train_data: train.jsonl}\n"
        "ttt: {enabled: true, chunk_sise: 3}\n"
        "optim: {lr: fast, pct_start: 2}\n"
        "full_finetuning: true\n"
        "lora: {enable: true}\n",
        batch_size=0,
    )
    assert found == [
        "ttt.chunk_sise: unknown key, did you mean ttt.chunk_size?",
        "optim.lr: expected a number, got 'fast'",
        "optim.pct_start: must be less than 1, got 2.0",
        "batch_size: must be 1 or more, got 0 (on the command line)",
        "full_finetuning, lora.enable: both are true, but LoRA is trained instead of the full "
        "weights; set one to false",
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("lr: 1e-4", "lr: unknown key, did you mean optim.lr?"),
        (
            "learning_rate: 1e-4",
            "learning_rate: unknown key, did you mean optim.lr or ttt.learning_rate?",
        ),
        (
            "optim: {learning_rate: 1e-4}",
            "optim.learning_rate: unknown key, did you mean optim.lr?",
        ),
        (
            "tt: {learning_rate: 1}",
            "tt.learning_rate: unknown key, did you mean ttt.learning_rate?",
        ),
        ("ttt: {lr: 1e-4}", "ttt.lr: unknown key, did you mean optim.ttt_lr?"),
        ("tt: {enabled: true}", "tt.enabled: unknown key, did you mean ttt.enabled?"),
        ("xyz: 1", "xyz: unknown key; remove it"),
        (
            "tracker: {seed: 1, run_name: a}",
            "tracker: there is no such section; remove it with all that is in it",
        ),
        ("batch_size: 1.5", "batch_size: expected a whole number, got '1.5'"),
        ("batch_size: true", "batch_size: expected a whole number, got 'true'"),
        ("max_norm: .nan", "max_norm: expected a number, got '.nan'"),
        ("max_norm: inf", "max_norm: expected a number, got 'inf'"),
        ("seed: null", "seed: expected a whole number, got nothing"),
        ("do_ckpt: 1", "do_ckpt: expected true or false, got '1'"),
        ("device: gpu", "device: expected auto or cpu or cuda, got 'gpu'"),
        ("resume: maybe", "resume: expected true or false or auto, got 'maybe'"),
        ("num_ckpt_keep: all", "num_ckpt_keep: expected a whole number or null, got 'all'"),
        ("max_steps: [1, 2]", "max_steps: expected a whole number, got a list"),
        ("optim: 3", "optim: is a section: expected keys of its own below it"),
        ("batch_size: {train: 1}", "batch_size.train: unknown key, did you mean batch_size?"),
        ("num_microbatches: 0", "num_microbatches: must be 1 or more, got 0"),
        ("num_ckpt_keep: 0", "num_ckpt_keep: must be 1 or more, got 0"),
        ("duration_sec: -1", "duration_sec: must be 0.08 or more, got -1.0"),
        ("ttt: {enabled: true, chunk_size: 0}", "ttt.chunk_size: must be 1 or more, got 0"),
    ],
)
def test_a_wrong_line_is_the_only_problem(
    problems: Callable[..., list[str]], line: str, problem: Any
) -> None:
    assert problems(MINIMAL + line + "\n") == [problem]


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        ({"lora__enable": False}, "full_finetuning, lora.enable, ttt.enabled"),
        ({"run_dir": ""}, "run_dir"),
        ({"data__train_data": ""}, "data.train_data"),
        ({"do_eval": True}, "do_eval, data.eval_data"),
        ({"lora__rank": 0}, "lora.rank"),
        ({"resume": True, "overwrite_run_dir": True}, "resume, overwrite_run_dir"),
        (
            {"moshi_paths__random_init": True, "moshi_paths__moshi_path": "x.safetensors"},
            "moshi_paths.random_init, moshi_paths.moshi_path",
        ),
        (
            {"moshi_paths__hf_repo_id": None, "moshi_paths__mimi_path": "x.safetensors"},
            "moshi_paths.hf_repo_id, moshi_paths.moshi_path, moshi_paths.tokenizer_path",
        ),
    ],
)
def test_contradictions(problems: Callable[..., list[str]], overrides: Any, keys: Any) -> None:
    (found,) = problems(MINIMAL, **overrides)
    assert found.split(": ")[0] == keys
    assert "secret" not in found


def test_harmless_combinations_load(load: Callable[..., TrainArgs]) -> None:
    load(MINIMAL, eval_freq=100, do_eval=False)
    load(MINIMAL, lora__enable=False, full_finetuning=True, save_adapters=True)
    load(MINIMAL, lora__enable=False, ttt__enabled=True, lora__rank=0)
    load(MINIMAL, moshi_paths__hf_repo_id=None, moshi_paths__random_init=True)


def test_a_rejected_value_causes_no_second_complaint(problems: Callable[..., list[str]]) -> None:
    text = "run_dir: run\ndata: {train_data: train.jsonl}\n"
    for lora in ("{enable: si}", "{enabel: true}", "3"):
        assert len(problems(text + f"lora: {lora}\n")) == 1


def test_what_must_be_given(problems: Callable[..., list[str]]) -> None:
    assert problems("lora: {enable: true}") == [
        "run_dir: missing, and it has no default; add it",
        "data.train_data: empty; name a .jsonl file or a folder of them",
    ]


def test_the_type_of_the_key_decides_what_a_value_means(load: Callable[..., TrainArgs]) -> None:
    args = load(
        MINIMAL + "optim: {lr: 1e-3, weight_decay: '0.5'}\nmax_steps: 1e3\nduration_sec: 30\n"
        "do_eval: off\nwandb: {project: on, run_name: 0123}\nresume: auto\n"
    )
    assert (args.optim.lr, args.optim.weight_decay, args.max_steps) == (1e-3, 0.5, 1000)
    assert isinstance(args.max_steps, int) and isinstance(args.duration_sec, float)
    assert (args.wandb.project, args.wandb.run_name) == ("on", "0123")
    assert (args.do_eval, args.resume) == (False, "auto")


def test_null_sections_have_their_defaults(load: Callable[..., TrainArgs]) -> None:
    assert load(MINIMAL + "wandb: null\nttt:\noptim: ~\n") == load(MINIMAL)
    assert load(MINIMAL + "optim: {lr: 1}\n", optim=None) == load(MINIMAL)


def test_overrides_as_fire_passes_them(load: Callable[..., TrainArgs]) -> None:
    overrides: dict[str, Any] = {
        "optim__lr": "1e-4",
        "ttt__chunk_size": 64,
        "ttt__enabled": "true",
        "resume": True,
        "num_ckpt_keep": None,
        "wandb__project": 2024,
        "lora": {"rank": 8},
    }
    args = load(MINIMAL + "optim: {lr: fast}\nttt:\n", **overrides)
    assert (args.optim.lr, args.ttt.chunk_size, args.ttt.enabled) == (1e-4, 64, True)
    assert (args.resume, args.num_ckpt_keep, args.wandb.project) == (True, None, "2024")
    assert (args.lora.enable, args.lora.rank) == (True, 8)


def test_an_unknown_override_is_reported_like_a_key(problems: Callable[..., list[str]]) -> None:
    assert problems(MINIMAL, ttt_chunk_size=64) == [
        "ttt_chunk_size: unknown key, did you mean ttt.chunk_size?"
    ]


def test_a_right_file_is_not_blamed_for_the_command_line(load: Callable[..., TrainArgs]) -> None:
    def heading(text: str, **overrides: Any) -> str:
        with pytest.raises(UserError) as error:
            load(text, **overrides)
        return str(error.value).splitlines()[0]

    wrong = MINIMAL + "max_steps: 0\n"
    assert heading(MINIMAL, batch_size=0) == "the command line has a problem:"
    assert heading(MINIMAL, batch_size=0, max_steps=0) == "the command line has 2 problems:"
    assert heading(wrong, batch_size=0).endswith(".yaml has 2 problems:")
    assert heading(wrong).endswith(".yaml has a problem:")


def test_a_contradiction_names_the_side_that_is_of_the_command_line(
    problems: Callable[..., list[str]],
) -> None:
    (found,) = problems(MINIMAL, full_finetuning=True)
    assert found.startswith("full_finetuning, lora.enable: ")
    assert found.endswith(" (full_finetuning: command line)")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run_dir: run\nrun_dir: other\n", "line 2, column 1.*'run_dir' appears twice"),
        ("optim:\n  lr: 1\n  lr: 2\n", "line 3, column 3.*'lr' appears twice"),
        ("a: 1\n\tb: 2\n", "line 2, column 1: not valid YAML"),
        ("run_dir: [a\n", "line 2, column 1: not valid YAML"),
        ("", "is empty"),
        ("- run_dir\n", "holds no"),
    ],
)
def test_files_that_are_not_a_configuration(
    load: Callable[..., TrainArgs], text: str, expected: Any
) -> None:
    with pytest.raises(UserError, match=f"run.yaml.*{expected}"):
        load(text)


def test_a_missing_file_names_similar_ones(tmp_path: Path) -> None:
    (tmp_path / "moshi_ttt.yaml").touch()
    with pytest.raises(UserError, match=r"moshi_tt\.yaml\. Did you mean .*moshi_ttt\.yaml\?"):
        load_config(tmp_path / "moshi_tt.yaml", {})
    with pytest.raises(
        UserError, match=r"no configuration file demo\.yml\. .* example/demo\.yaml\?"
    ):
        load_config("demo.yml", {})
    with pytest.raises(UserError, match="is a folder, and no YAML file"):
        load_config(tmp_path, {})


def test_files_that_are_no_configuration_are_not_suggested(tmp_path: Path) -> None:
    (tmp_path / ".pre-commit-config.yaml").write_text("repos: []\n")
    (tmp_path / "mkdocs.yml").write_text("site_name: Moshi\n")
    for missing in ("no.yaml", "pre-commit-config.yaml", "moshi.yaml"):
        with pytest.raises(UserError) as raised:
            load_config(tmp_path / missing, {})
        assert "mkdocs" not in str(raised.value) and ".pre-commit" not in str(raised.value)
    (tmp_path / "talk.yml").write_text("# the first\nrun_dir: runs/talk\n")
    with pytest.raises(UserError, match=r"no\.yaml\. \S+ has talk\.yml\.$"):
        load_config(tmp_path / "no.yaml", {})


def test_saved_configuration_loads_and_has_no_secret(
    load: Callable[..., TrainArgs], tmp_path: Path
) -> None:
    text = MINIMAL + "wandb: {project: p, key: hunter2}\noptim: {lr: 1e-7}\nresume: auto\n"
    args = load(text, run_dir="läufe/true")
    save_config(args, tmp_path / "args.yaml")

    assert args.wandb.key == "hunter2"
    for written in ((tmp_path / "args.yaml").read_text(), repr(args), str(public_dict(args))):
        assert "hunter2" not in written
    assert "key" not in public_dict(args)["wandb"]
    assert load_config(tmp_path / "args.yaml", {"wandb.key": "hunter2"}) == args


def test_a_step_size_that_nothing_reads_is_not_said_to_be_too_small() -> None:
    small: dict[str, Any] = {"enabled": True, "learning_rate": 0.001}
    for args in (
        TTTArgs(**small, write="delta"),
        TTTArgs(**small, method="linear"),
        TTTArgs(learning_rate=0.001, write="sum"),
    ):
        assert not any("hundredth" in text for _, text in args.problems())
    assert any("hundredth" in text for _, text in TTTArgs(**small, write="sum").problems())


def test_documentation_is_fresh() -> None:
    for name, text in pages(COMMANDS).items():
        written = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert written == text, f"docs/{name} is out of date; run: {COMMAND}"


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.name)
def test_editors_find_the_schema_of_a_shipped_file(path: Path) -> None:
    first, mark = path.read_text().splitlines()[0], "# yaml-language-server: $schema="
    assert first.startswith(mark)
    schema = json.loads((path.parent / first.removeprefix(mark)).read_text())
    keys = schema["properties"].keys() | schema["$defs"]["TTTArgs"]["properties"].keys()
    assert {"batch_size", "ttt", "chunk_size"} <= keys
    assert schema["properties"]["batch_size"]["minimum"] == 1


@pytest.mark.parametrize("choice", ["ttt.write=delta", "ttt.method=linear", "ttt.method=mlp"])
@pytest.mark.parametrize("name", ["demo", "moshi_ttt"])
def test_another_method_can_be_chosen_on_the_command_line(choice: str, name: str) -> None:
    """What the file sets for its own method is left out; what the command line sets is not."""
    key, value = choice.split("=")
    args = load_config(ROOT / f"example/{name}.yaml", {key: value})
    assert getattr(args.ttt, key.split(".")[1]) == value
    assert args.ttt.learning_rate == TTTArgs.learning_rate
    with pytest.raises(UserError, match=r"ttt\.learning_rate"):
        load_config(
            ROOT / f"example/{name}.yaml",
            {key: value, "ttt.learning_rate": "0.5"},
        )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("batch_size", "1e9"), ("num_microbatches", "1e12"), ("duration_sec", "1e-300"),
        ("duration_sec", "0.01"), ("duration_sec", "1e9"), ("duration_sec", "1e308"),
        ("ttt.chunk_size", "1e18"), ("ttt.conv_kernel_size", "1e9"), ("lora.rank", "1e12"),
        ("seed", str(2**64)), ("optim.lr", "1e300"), ("ttt.gate_init", "1e300"),
        ("text_padding_weight", "1e39"), ("parallel.hang_timeout_sec", "1e300"),
        ("data.num_workers", "100000"), ("max_steps", "9" * 5000), ("run_dir", "x" * 5000),
        ("run_dir", "a\0b"), ("run_dir", "a\ud800"), ("data.cache_dir", "~no_such_user/x"),
        ("data.train_data", "~no_such_user/x"),
    ],
)  # fmt: skip
def test_an_absurd_value_is_one_short_problem(
    problems: Callable[..., list[str]], key: str, value: str
) -> None:
    (found,) = problems(MINIMAL, **{key.replace(".", "__"): value})
    assert found.startswith(f"{key}: ") and len(found) < 200


def test_a_file_nested_beyond_reason_is_one_message(load: Callable[..., TrainArgs]) -> None:
    for text in ("[" * 100_000, "a: &a [1]\n" + "".join(
        f"k{i}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)
    )):  # fmt: skip
        with pytest.raises(UserError, match=r"nested too deeply|more than"):
            load(text)
