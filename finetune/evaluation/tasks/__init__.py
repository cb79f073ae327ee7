"""The tasks of an evaluation: each is a module here, or a folder, with its `TASK`.

To add one, write `NAME.py` with a `Task` (see base.py) and name it below.
"""

from importlib import import_module

from finetune.evaluation.tasks.base import Task

_MODULES = (
    "position",
    "pairs",
    "health",
    "spoken_recall",
)
TASKS: dict[str, Task] = {name: import_module(f"{__name__}.{name}").TASK for name in _MODULES}
"""By name, in the order in which they run and are reported."""
