"""What people bring who come from `moshi-finetune`."""

MOSHI_FINETUNE = """
data:
  eval_data: ''
  shuffle: true
  train_data: 'train.jsonl'
moshi_paths:
  hf_repo_id: "kyutai/moshiko-pytorch-bf16"
full_finetuning: false
lora:
  enable: true
  rank: 128
  scaling: 2.
  ft_embed: false
first_codebook_weight_multiplier: 100.
text_padding_weight: .5
duration_sec: 100
batch_size: 16
max_steps: 2000
gradient_checkpointing: true
optim:
  lr: 2e-6
  weight_decay: 0.1
  pct_start: 0.05
seed: 0
log_freq: 1
eval_freq: 100
do_eval: false
do_ckpt: true
ckpt_freq: 100
save_adapters: true
run_dir: "run"
wandb:
  project: ""
  run_name: ""
  key: ""
  offline: False
overwrite_run_dir: true
"""
"""The keys of its example file, with its values and ways of writing numbers."""
