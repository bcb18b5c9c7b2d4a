# A DAG-GPT worth a rented GPU: nine operations, 26 M parameters. Not yet measured on a GPU.
#
#   python lambda_service.py train config/train_daggpt_lambda.py --instance gpu_1x_a10,gpu_1x_a100_sxm4
#   python lambda_service.py train config/train_daggpt_lambda.py --min-gpu-memory 24      the cheapest that is free
#   torchrun --standalone --nproc_per_node=8 train.py config/train_daggpt_lambda.py
#
# bf16 and torch.compile are on by themselves on CUDA; W&B is, where its key is in the environment.

import os

dataset = "allops"
batch_size = 64
gradient_accumulation_steps = 8  # over 1, 2, 4 or 8 GPUs
block_size = 128

n_layer = 8
n_head = 8
n_embd = 512

dag_depth = 4
dag_ops = "all"

learning_rate = 6e-4
max_iters = 10000
schedule = "wsd"
wsd_decay_iters = 2000
warmup_iters = 500
min_lr = 3e-5

eval_interval = 1000
eval_iters = 20

wandb_log = bool(os.environ.get("WANDB_API_KEY"))
wandb_project = "dag-gpt"
