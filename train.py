"""Train: `torchrun --nproc-per-node N train.py --config run.yaml [--optim.lr=1e-4 ...]`."""

import sys

import fire

from finetune.cli import run, train

if __name__ == "__main__":
    sys.exit(run(lambda: fire.Fire(train)))
