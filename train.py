"""Train: `torchrun --nproc-per-node N train.py --config run.yaml [--optim.lr=1e-4 ...]`."""

from finetune.__main__ import begin

if __name__ == "__main__":
    begin("train.py")
