"""Who may import whom, so that a part can be read alone."""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
from forked import Program

ROOT = Path(__file__).parent.parent
DOORS = {"__init__", "__main__", "cli", "command_line", "trainer", "inference", "encode"} | {
    "errors",
    "interrupt",
    "generate",
}
"""The modules at the root of `finetune`, which put its folders together; all else is in one."""
FOLDERS = sorted(path.parent.name for path in (ROOT / "finetune").glob("*/__init__.py"))


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@pytest.fixture(scope="module", autouse=True)
def _forget_what_was_parsed() -> Iterator[None]:
    """A million objects, which every collection of garbage in the tests after these would visit."""
    yield
    parsed.cache_clear()


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports anywhere."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(*places: Any) -> Iterator[Any]:
    for place in places:
        path = ROOT / place
        yield from sorted(path.rglob("*.py")) if path.is_dir() else [path]


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def part_of(name: str) -> str:
    """The folder or door of `finetune` that a module belongs to; nothing for other modules."""
    parts = name.split(".")
    return parts[1] if parts[0] == "finetune" and is_module(".".join(parts[:2])) else ""


def exported(folder: str) -> set[Any]:
    """The names in a folder's `__all__`."""
    for node in parsed(ROOT / "finetune" / folder / "__init__.py").body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


RULES = [
    ("ttt", ["finetune"]),
    ("ttt/config.py", ["torch", "moshi", "ttt.ops", "ttt.layers", "ttt.model", "ttt.state"]),
    ("ttt/registry.py", ["torch", "moshi", "ttt.ops", "ttt.layers", "ttt.model", "ttt.state"]),
    ("ttt/ops", ["ttt.layers", "ttt.model", "ttt.state", "ttt.streaming", "ttt.config", "moshi"]),
    ("ttt/layers", ["ttt.model", "ttt.build", "ttt.state", "ttt.streaming"]),
    ("ttt/model.py", ["ttt.build", "ttt.state"]),
    *[(f"finetune/{name}", ["finetune.cli"]) for name in FOLDERS],
    *[(f"finetune/{name}", ["finetune.trainer"]) for name in FOLDERS if name != "demo"],
]


@pytest.mark.parametrize(("place", "forbidden"), RULES)
def test_directions(place: Any, forbidden: Any) -> None:
    for path in files(place):
        for module in imports(path):
            for name in forbidden:
                assert not f"{module}.".startswith(f"{name}."), f"{path} imports {module}"


def test_modules_are_imported_by_their_whole_names() -> None:
    for path in files("ttt", "finetune", "benchmarks", "research", "tests", "train.py"):
        for node in ast.walk(parsed(path)):
            relative = isinstance(node, ast.ImportFrom) and node.level
            assert not relative, f"{path}:{getattr(node, 'lineno', 0)}: a relative import"


def test_only_doors_stand_outside_the_folders() -> None:
    assert {path.stem for path in (ROOT / "finetune").glob("*.py")} == DOORS


@pytest.mark.parametrize("path", files("finetune"), ids=lambda p: str(p.relative_to(ROOT)))
def test_folders_are_imported_by_their_faces(path: Path) -> None:
    """A folder's `__init__` exports what others use of it."""
    own = path.relative_to(ROOT / "finetune").parts[0]
    for module in imports(path):
        if part_of(module) in {*FOLDERS} - {own}:
            names = module.split(".")[2:]
            assert len(names) < 2, f"{path} imports {module}, past the folder's face"
            assert {*names} <= exported(part_of(module)), f"{path} imports {module}"


def test_no_part_of_the_framework_imports_itself_in_a_circle() -> None:
    graph: dict[str, Any] = {}
    for path in files("finetune"):
        own = path.relative_to(ROOT / "finetune").parts[0].removesuffix(".py")
        graph.setdefault(own, set()).update({part_of(module) for module in imports(path)} - {own})
    del graph["__init__"], graph["__main__"]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def modules_used(path: Path) -> Iterator[str]:
    """The modules that a file imports anywhere, also for its types alone: a folder counts as its
    `__init__`, and only where no module in it is meant."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if is_module(name) else str(node.module) for name in names)


@pytest.mark.parametrize("place", ["ttt", "finetune"])
def test_no_module_imports_itself_in_a_circle(place: str) -> None:
    """Not even inside a function or for a type: what two modules need is in a third one."""
    graph = {}
    for path in files(place):
        own = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[own] = {*modules_used(path)} - {own}
    assert len(graph) > 30
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def test_every_file_has_fewer_than_400_lines() -> None:
    places = ["finetune", "ttt", "benchmarks", "research", "tests"]
    command = ["git", "ls-files", "-z", "--", *[f"{place}/*.py" for place in places]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    paths = done.stdout.split("\0")[:-1]
    assert {path.split("/")[0] for path in paths} == {*places}
    lengths = {path: len((ROOT / path).read_text().splitlines()) for path in paths}
    assert {path: length for path, length in lengths.items() if length >= 400} == {}


def test_every_function_of_the_framework_fits_a_screen() -> None:
    """What follows its docstring has at most 68 lines, so that it reads as steps with names."""
    long = {}
    for path in files("finetune"):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[ast.get_docstring(node) is not None :] or node.body
                num_lines = (node.end_lineno or 0) - first[0].lineno + 1
                if num_lines > 68:
                    long[f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"] = num_lines
    assert long == {}


def test_no_benchmark_imports_from_the_tests() -> None:
    tests = {path.stem for path in files("tests")}
    for path in files("benchmarks"):
        assert not {module.split(".")[0] for module in imports(path)} & (tests | {"tests"}), path


def test_only_the_command_line_prints() -> None:
    speaking = {"cli.py", "command_line.py", "docs_page.py"}
    for path in files("ttt", "finetune", "train.py"):
        calls = [n for n in ast.walk(parsed(path)) if isinstance(n, ast.Call)]
        names = {call.func.id for call in calls if isinstance(call.func, ast.Name)}
        assert "print" not in names or path.name in speaking, path


IN_PLACE = {
    "checkpoint": "a folder that is named when it is whole, and the record of a run's files",
    "kept": "does it for the others, and appends",
    "monitoring/appended.py": "appends",
    "sweep/run.py": "appends",
    "data/store.py": "appends to a file of its own",
    "recordings/ledger.py": "appends",
    "serve/export.py": "a folder that is named when it is whole",
    "demo/dialogues.py": "a folder that is named when it is whole",
    "evaluation/codes.py": "a file that is there for a while",
    "plan/starter.py": "a file that is there for a while",
    "cli.py": "the project's own pages",
    "report/figures.py": "into memory",
    "serve/lines.py": "into memory",
    "safety/outlet.py": "the terminal",
}
"""Who need not write with `finetune.kept`, whose files are there whole or not at all, and why."""
WRITING = {"write_text", "write_bytes", "savefig", "save_file", "tofile", "copyfile"}


def writes(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    if name.split(".")[-1] in {"open", "fdopen", "SoundFile"}:
        given = [node for each in (*call.args, *call.keywords) for node in ast.walk(each)]
        modes = [str(node.value) for node in given if isinstance(node, ast.Constant)]
        return any(re.fullmatch("[wax]b?[+]?b?", mode) for mode in modes)
    return name.split(".")[-1] in WRITING or name == "soundfile.write"


def test_files_are_written_whole_or_it_is_said_why_not() -> None:
    found = set()
    for path in files("finetune"):
        if any(writes(node) for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)):
            name = str(path.relative_to(ROOT / "finetune"))
            found.add(name if name in IN_PLACE else name.split("/")[0])
            assert found <= IN_PLACE.keys(), f"{path}: write with finetune.kept, or say why not"
    assert found == IN_PLACE.keys()


def imported(modules: Any, *, of: list[Any]) -> Any:
    """Which modules of `of` are imported together with `modules`, in a process of its own."""
    code = f"import sys, {modules}; print([m for m in {of!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ast.literal_eval(done.stdout)


def test_what_a_run_may_not_need_is_not_imported_with_the_trainer() -> None:
    """The process from which programs are forked imports these alone, first."""
    unneeded = {"wandb", "tensorboard", "matplotlib", "espeakng_loader"}
    code = "print(FIRST); print([*with_first])"
    first, found = Program(code).communicate(timeout=100)[0].splitlines()
    assert {*ast.literal_eval(first)} == {
        "finetune.trainer",
        "finetune.cli",
        "finetune.evaluation",
    }
    modules = {*ast.literal_eval(found)}
    assert modules >= {"torch", "finetune.trainer"} and not modules & unneeded


def test_a_model_is_built_and_served_without_the_compiler() -> None:
    """It takes two seconds to import, and moshi does not."""
    compiler = ["torch._dynamo", "torch._inductor", "sympy", "triton"]
    assert imported("ttt.model, finetune.trainer, finetune.serve.server", of=compiler) == []


def test_a_configuration_is_read_without_what_is_heavy() -> None:
    assert imported("finetune.config, finetune.cli", of=["torch", "moshi", "numpy", "triton"]) == []


HEARD = "example/demo/dialogues/eval_000.wav"
LISTED = "example/demo/dialogues/train.jsonl"
LIGHT: list[list[str]] = [
    ["--help"],
    ["train", "--config", "example/demo.yaml", "--batch_sise=3"],
    ["train", "--config", "example/nowhere.yaml"],
    *[[name, "--config", "example/demo.yaml", "--sed=1"] for name in ("plan", "encode")],
    ["generate", "--checkpoint=x", "--audio=x", "--ttt=perhaps"],
    ["serve", "--checkpoint=x", "--max_users=0"],
    ["evaluate", "--checkpoint=x", "--arms=of"],
    ["recall", "--arms=delta_rule"],
    ["recall-audio", "x", "--num_talks=0"],
    ["recall-score", "--answer=x"],
    ["sweep", "example/curriculum.yaml", "--table=perhaps"],
    ["demo-data", "x", "--min_sec=1"],
    ["data", "--help"],
    ["data", "index", "x", "--pairs=x"],
    ["data", "annotate", "x", "--engine=whisperer"],
    *[["data", name, "x", "--workers=0"] for name in ("check", "stats")],
    ["data", "show", "x", "--index=-1"],
    ["data", "encode"],
    ["config", "ttt.chunk_sise"],
    ["init", "--goal=win"],
    ["completion", "fish"],
    # What is named is not there.
    *[
        ["generate", "--checkpoint=example/memory", option]
        for option in ("--audio=no.wav", "--input_dir=nowhere")
    ],
    ["generate", "--checkpoint=nowhere", "--audio=README.md"],
    ["serve", "--checkpoint=nowhere"],
    ["export", "--checkpoint=nowhere", "--out=x"],
    ["evaluate", "--checkpoint=nowhere"],
    *[
        ["evaluate", "--checkpoint=example/memory", option]
        for option in ("--data=README.md,no.jsonl:2", "--pairs=no.jsonl", "--baseline=nowhere")
    ],
    ["evaluate", "--checkpoint=example/memory", "--data", LISTED, "--baseline=example"],
    *[["data", name, "nowhere"] for name in ("index", "annotate", "check", "show", "stats")],
    *[["data", name, "no.yaml"] for name in ("annotate", "check", "stats")],
    *[["data", name, "README.md", "--tokenizer=no.model"] for name in ("check", "stats")],
    ["data", "show", "README.md", "--config=no.yaml"],
    *[[name, "--config=no.yaml"] for name in ("plan", "encode")],
    ["init", "--data=no.jsonl", "--goal=adapt", "--gpu_memory=80"],
    # What is named is something else.
    *[["data", name, HEARD] for name in ("annotate", "check", "show", "stats")],
    *[[name, "--config", LISTED] for name in ("train", "plan", "encode")],
    ["train", "--config"],
    # What would be written is there already, or cannot be.
    *[
        ["generate", "--checkpoint=example/memory", "--audio=example", "--out=README.md"],
        ["generate", "--checkpoint=example/memory", f"--audio={HEARD}", "--out=x.mp3"],
        ["generate", "--checkpoint=example/memory", f"--audio={HEARD}", f"--out={HEARD}"],
        ["generate", "--checkpoint=example/memory", f"--audio={HEARD}", "--session=README.md"],
        ["generate", "--checkpoint=example/memory", f"--audio={HEARD}", "--session=README.md/x"],
        ["export", "--checkpoint=example/memory", "--out=example"],
        ["init", "README.md", "--data=README.md", "--goal=adapt", "--gpu_memory=80"],
        ["data", "index", "example", "--out=x.json"],
        ["data", "show", LISTED, "--out=x.wav"],
        ["data", "index", "example", f"--out={LISTED}"],
        *[
            [*words, "README.md/x"]
            for words in (
                ["evaluate", "example/memory", "--data", LISTED, "--out"],
                ["export", "example/memory", "--out"],
                ["generate", "example/memory", "--audio", HEARD, "--report"],
                ["init", "--data", LISTED, "--goal=adapt", "--gpu_memory=80", "--out"],
                ["data", "check", LISTED, "--json"],
                ["data", "check", LISTED, "--html"],
                ["data", "stats", LISTED, "--out"],
                ["plot", "example", "--out"],
                ["recall", "--out"],
                ["recall-audio"],
                ["recall-score", "example", "--out"],
                ["demo", "--out"],
                ["demo-data"],
                ["sweep", "example/curriculum.yaml", "--sweep_dir"],
            )
        ],
        ["data", "index", "example", "--out=README.md/x.jsonl"],
        ["data", "show", LISTED, "--out=README.md/x.png"],
        ["serve", "--checkpoint=example/memory", "--host=0.0.0.0"],
        ["serve", "--checkpoint=example/memory", "--host=203.0.113.1", "--token=long-enough"],
    ],
    ["plot", "nowhere"],
    ["sweep", "no.yaml"],
    ["sweep", "example/curriculum.yaml", "--only=c11", "--table"],
    ["sweep", "example/curriculum.yaml", "--optim.lrr=1", "--table"],
    ["recall-score", "nowhere"],
]
"""Commands that end before anything heavy is imported."""


@pytest.fixture(scope="module")
def ended() -> dict[str, tuple[list[str], int]]:
    """Heavy modules that each of `LIGHT` was the first to import, and its status.

    All run in one process, one after the other.
    """
    heavy = ["torch", "moshi", "triton", "numpy", "matplotlib", "huggingface_hub", "soundfile"]
    code = (
        f"import sys\nfrom finetune.__main__ import main\nfor words in {LIGHT!r}:\n"
        "    before, sys.argv = {*sys.modules}, ['moshi-ttt', *words]\n"
        "    try: main()\n    except SystemExit as left: status = left.code\n"
        f"    new = [m for m in {heavy!r} if m in {{*sys.modules}} - before]\n"
        "    print('ended:', repr((' '.join(words), new, status)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("ended: ")]
    found = [ast.literal_eval(line.removeprefix("ended: ")) for line in lines]
    assert len(found) == len(LIGHT), done.stderr
    return {words: (new, status) for words, new, status in found}


@pytest.mark.parametrize("words", LIGHT, ids=" ".join)
def test_help_and_mistakes_come_before_anything_heavy(
    words: list[str], ended: dict[str, tuple[list[str], int]]
) -> None:
    assert ended[" ".join(words)] == ([], 0 if "--help" in words else 1)
