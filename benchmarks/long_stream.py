"""How large the fast weights become in a stream of an hour: the table of docs/mathematics.md.

python benchmarks/long_stream.py [--frames 50000]

The models and the stream are those of tests/test_long_stream.py.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ["NO_TORCH_COMPILE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch
from helpers import tiny_args, tiny_delta_args, tiny_linear_args
from test_long_stream import speech_and_silence, stream

SUM = {"chunk_size": 20, "learning_rate": 1e-3}
METHODS = {
    "sum": tiny_args(**SUM),
    "sum, max_delta_norm 1": tiny_args(**SUM, max_delta_norm=1.0),
    "sum, state_decay 0.99": tiny_args(**SUM, state_decay=0.99),
    "delta": tiny_delta_args(chunk_size=20),
    "delta, state_decay 0.99": tiny_delta_args(chunk_size=20, state_decay=0.99),
    "linear": tiny_linear_args(base_lr=1.0),
    "mlp": tiny_linear_args(method="mlp", base_lr=0.1, use_rope=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=50_000)
    codes = speech_and_silence(parser.parse_args().frames)
    print("| | speech | silence | one segment | speech | speech |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, args in METHODS.items():
        _, sizes, _ = stream(args, torch.float32, codes)
        largest = [f"{fifth.max():.2f}" for fifth in sizes.chunk(5)]
        print(f"| {name} | {' | '.join(largest)} |", flush=True)


if __name__ == "__main__":
    main()
