"""Training steps of Moshi on several GPUs, against the same steps on one.

    python benchmarks/many_gpus.py --json many_gpus.json
    python benchmarks/many_gpus.py --model tiny --device cpu --gpus 2 --batch 2 --frames 40

Every line is a configuration as `train.py` takes it, with random weights and codes: its model is
built, sharded, compiled and stepped by the framework's own parts. First come `--loss-steps` steps
of `--gpus` times `--batch` sequences. One GPU takes them as micro-batches; its losses are what the
others' are compared with, and where they differ no time is reported, and the exit status is 1.
Then come steps of `--batch` sequences a GPU, on one GPU too, which are timed. So `x one GPU` is
what N GPUs bring when each works as much as the one did.

All weights of Moshi 7B do not train on one GPU. Their first loss is compared with LoRA's, which
has changed nothing yet; further ones between models with fewer layers (`--full-layers`), on one
GPU and on all.

`plan` is the peak of memory that `moshi-ttt plan` foretells. Tokens are counted as in
`train_step.py`. Lines of as many GPUs run in the same processes; where these fail, or give no
result for `--limit` seconds, the line in work is wrong, and new processes go on with the next.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from many_gpus_arms import ARMS, work
from outputs import json_file, print_and_keep, settings
from train_step import TOLERANCE

# The program --------------------------------------------------------------------------------------


def results(options: argparse.Namespace, page: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Return the result of every line, judged; what else the processes say goes to `page`."""
    judge = Judge(options)
    deadline = time.monotonic() + options.total_limit
    for on_all in (False, True):
        remaining = [a.name for a in ARMS if a.name in options.arms and a.on_all == on_all]
        while remaining:
            for result in from_workers(remaining, on_all, deadline, options):
                if "name" not in result:
                    page |= result
                elif result["name"] in remaining:
                    remaining.remove(result["name"])
                    yield judge(result)


def from_workers(
    names: list[str], on_all: bool, deadline: float, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Return what processes for these lines give; if one is missing, what is wrong with it."""
    missing = list(names)
    if time.monotonic() > deadline:
        yield from ({"name": name, "wrong": "not run: out of time"} for name in missing)
        return
    with tempfile.TemporaryDirectory() as folder:
        results_file = Path(folder) / "results"
        results_file.touch()
        log = options.log_dir / f"many_gpus_{'all' if on_all else 'one'}_{len(missing)}.log"
        process = start(missing, on_all, results_file, log, options)
        num_read, heard_at, patience_sec = 0, time.monotonic(), 15.0
        is_explained = False
        try:
            while True:
                # Asked for first: what is written before the end is read after it.
                is_over = process.poll() is not None
                lines = results_file.read_text().split("\n")[:-1]
                for line in lines[num_read:]:
                    heard_at = time.monotonic()
                    result = json.loads(line)
                    missing = [name for name in missing if name != result.get("name")]
                    is_explained = "wrong" in result
                    yield result
                num_read = len(lines)
                if is_over or not missing:
                    break
                if (now := time.monotonic()) > min(heard_at + options.limit, deadline):
                    patience_sec = 0.0
                    what = "the time is up" if now > deadline else "no result in time"
                    yield {"name": missing[0], "wrong": f"{what}; see {log}"}
                    return
                time.sleep(0.2)
            if missing and not is_explained:
                status = f"processes ended with status {process.returncode}"
                yield {"name": missing[0], "wrong": f"{status}; see {log}"}
        finally:
            end(process, patience_sec=patience_sec)


def start(
    names: list[str], on_all: bool, results_file: Path, log: Path, options: argparse.Namespace
) -> "subprocess.Popen[bytes]":
    """Start one process, or one for each GPU, in a process group of their own."""
    launch = [sys.executable]
    if on_all:
        launch += ["-m", "torch.distributed.run", "--standalone"]
        launch += [f"--nproc-per-node={options.gpus}"]
    program = [__file__, *options.given, "--gpus", str(options.gpus)]
    with log.open("w") as output:
        return subprocess.Popen(
            [*launch, *program, "--worker", str(results_file), "--arms", *names],
            env=os.environ | {"PYTHONPATH": f"{_root()}:{os.environ.get('PYTHONPATH', '')}"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def end(process: "subprocess.Popen[bytes]", *, patience_sec: float) -> None:
    """After a while, by force: torchrun ends its own processes when it is asked to."""
    try:
        process.wait(timeout=patience_sec)
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            process.wait(timeout=45)
        except subprocess.TimeoutExpired:
            # With what it has started, which would keep the GPUs' memory.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Judge:
    """Compares a line with that which it must agree with."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.tolerance = options.tolerance
        self.good: dict[str, dict[str, Any]] = {}

    def __call__(self, result: dict[str, Any]) -> dict[str, Any]:
        """`result` with its speed beside one GPU's; without its times if its losses differ."""
        if "wrong" in result:
            return result
        arm = next(arm for arm in ARMS if arm.name == result["name"])
        kept = {key: result[key] for key in ("name", "gpus", "batch", "losses")}
        if not all(map(math.isfinite, result["losses"])):
            return {**kept, "wrong": "losses are not finite"}
        if arm.reference is not None:
            reference = self.good.get(arm.reference)
            if reference is None:
                return {**kept, "wrong": f"not compared: there is no result of {arm.reference!r}"}
            pairs = zip(result["losses"], reference["losses"], strict=True)
            difference = max(abs(a - b) for a, b in list(pairs)[: arm.num_compared])
            result["loss_difference"] = kept["loss_difference"] = difference
            if difference > self.tolerance:
                return {**kept, "wrong": f"losses differ from one GPU's by {difference:.1e}"}
            if arm.num_compared is None:
                result["speedup"] = result["tokens_per_sec"] / reference["tokens_per_sec"]
        self.good[arm.name] = result
        return result


HEADER = (
    f"{'':<30}{'GPUs':>5}{'B each':>7}{'s/step':>8}{'tokens/s':>10}{'x one GPU':>10}"
    f"{'peak GB':>9}{'plan GB':>9}{'first loss':>12}{'differs':>9}"
)


def line(result: dict[str, Any]) -> str:
    text = f"{result['name']:<30}"
    if "wrong" in result:
        return f"{text}  {result['wrong']}"
    text += f"{result['gpus']:>5}{result['batch']:>7}{result['step_sec']:>8.3f}"
    text += f"{result['tokens_per_sec']:>10.0f}"
    text += f"{result['speedup']:>10.2f}" if "speedup" in result else f"{'':>10}"
    text += f"{result.get('peak_gb', 0):>9.1f}{result['plan_gb']:>9.1f}{result['losses'][0]:>12.4f}"
    return text + (f"{result['loss_difference']:>9.1e}" if "loss_difference" in result else "")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="7b", choices=["7b", "tiny"])
    parser.add_argument("--gpus", type=int, help="default: all of this machine")
    parser.add_argument("--batch", type=int, default=16, help="sequences of each GPU")
    parser.add_argument("--frames", type=int, default=1250)
    parser.add_argument("--rank", type=int, default=128, help="of LoRA")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--full-layers", type=int, default=8, help="of 32, where there are fewer")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="lines of the table; default: all")
    parser.add_argument("--loss-steps", type=int, default=4, help="steps that are compared")
    parser.add_argument("--warmup", type=int, default=1, help="further ones that are not timed")
    parser.add_argument("--steps", type=int, default=4, help="steps that are timed")
    parser.add_argument("--limit", type=float, default=180, help="seconds that a line may take")
    parser.add_argument("--total-limit", type=float, default=3600, help="and all of them")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: by device")
    parser.add_argument("--tolerance", type=float, help="of losses, in nats; default: by dtype")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--compile", action="store_true", help="on a CPU too")
    parser.add_argument(
        "--profile", nargs="+", default=[], help="lines whose kernels are listed in a file"
    )
    parser.add_argument("--log-dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=json_file, help="a file to write the results to")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    # What the processes are started with: the last of two wins.
    options.given = arguments
    is_cuda = options.device == "cuda"
    options.log_dir.mkdir(parents=True, exist_ok=True)
    options.gpus = options.gpus or (torch.cuda.device_count() if is_cuda else 2)
    options.dtype = options.dtype or ("bfloat16" if is_cuda else "float32")
    options.compile = options.compile or is_cuda
    if options.tolerance is None:
        options.tolerance = TOLERANCE[getattr(torch, options.dtype)]
    names = [arm.name for arm in ARMS]
    for name in options.arms or []:
        if name not in names:
            parser.error(f"--arms: there is no {name!r}; choose from {', '.join(names)}")
    if options.gpus < 2:
        parser.error("--gpus: there is nothing to compare on fewer than 2")
    chosen = set(options.arms or names)
    if options.worker is None:
        chosen |= {arm.reference for arm in ARMS if arm.name in chosen and arm.reference}
    options.arms = [name for name in names if name in chosen]
    options.schedule_steps = max(20, options.loss_steps + options.warmup + options.steps + 2)
    options.profile_dir = options.log_dir
    return options


def _root() -> Path:
    return Path(__file__).resolve().parent.parent


def main(arguments: list[str]) -> list[dict[str, Any]]:
    options = parse(arguments)
    if options.worker is not None:
        work(options)
        return []
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{options.gpus} x {name}, torch {torch.__version__}, {options.dtype}, ", end="")
    print(f"T {options.frames}, rank {options.rank}\n{HEADER}", flush=True)
    page: dict[str, Any] = dict(settings(name, options, torch.__version__))
    found = print_and_keep(results(options, page), line, page, options.json)
    if "sum_of_a_gb_ms" in page and options.device == "cuda":
        print(f"all-reduce of 1 GB: {page['sum_of_a_gb_ms']:.1f} ms")
    return found


if __name__ == "__main__":
    sys.exit(int(any("wrong" in result for result in main(sys.argv[1:]))))
