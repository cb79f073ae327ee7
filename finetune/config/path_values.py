"""The paths of a configuration, checked before anything is made of them."""

from collections.abc import Iterator

from finetune.config.args import TrainArgs
from finetune.safety import path_problem


def path_problems(args: TrainArgs) -> Iterator[tuple[str, str]]:
    """Paths that no system can take: the dotted key, and what is wrong."""
    named = {"run_dir": args.run_dir, "data.cache_dir": args.data.cache_dir}
    named |= {f"moshi_paths.{key}": value for key, value in vars(args.moshi_paths).items()}
    sources = (("data.train_data", args.data.train_data), ("data.eval_data", args.data.eval_data))
    values = [(key, value) for key, value in named.items() if isinstance(value, str)]
    values += [(key, item.strip()) for key, spec in sources for item in (spec or "").split(",")]
    for key, value in values:
        problem = path_problem(value)
        if problem is not None:
            yield key, problem
