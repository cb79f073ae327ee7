"""Train: `torchrun --nproc-per-node N train.py --config run.yaml [--optim.lr=1e-4 ...]`."""

import sys

from finetune.cli import call, train

if __name__ == "__main__":
    sys.exit(call(train, name="train.py"))
