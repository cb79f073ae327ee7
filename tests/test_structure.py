"""Who may import whom, so that a part can be read alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def imports(path):
    """The modules that a file imports anywhere, by absolute name."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*start, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def files(*places):
    for place in places:
        path = ROOT / place
        yield from sorted(path.rglob("*.py")) if path.is_dir() else [path]


SIBLINGS = {
    "finetune/data": "finetune.data",
    "finetune/step/loss.py": "finetune.step.loss",
    "finetune/step/optim.py": "finetune.step.optim",
    "finetune/monitoring/metrics.py": "finetune.monitoring.metrics",
}
RULES = [
    ("ttt", ["finetune"]),
    ("ttt/ops", ["ttt.layers", "ttt.model", "ttt.state", "ttt.config", "moshi"]),
    ("ttt/layers", ["ttt.model", "ttt.state"]),
    *[(place, [m for p, m in SIBLINGS.items() if p != place]) for place in SIBLINGS],
    *[(place, ["finetune.trainer", "finetune.cli", "finetune.model.build"]) for place in SIBLINGS],
]


@pytest.mark.parametrize(("place", "forbidden"), RULES)
def test_directions(place, forbidden):
    for path in files(place):
        for module in imports(path):
            for name in forbidden:
                assert not f"{module}.".startswith(f"{name}."), f"{path} imports {module}"


def test_only_the_command_line_prints():
    speaking = {"cli.py", "docs_page.py", "train_mimi.py", "train_tokenizer.py"}
    for path in files("ttt", "finetune", "train.py"):
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        names = {call.func.id for call in calls if isinstance(call.func, ast.Name)}
        assert "print" not in names or path.name in speaking, path


def test_what_a_run_may_not_need_is_not_imported_with_the_trainer():
    code = (
        "import sys, finetune.trainer, finetune.cli, finetune.evaluation.run; "
        "print([m for m in ('wandb', 'tensorboard', 'matplotlib', 'espeakng_loader') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
