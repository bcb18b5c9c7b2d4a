# GPT-2 124M on OpenWebText, with a DAG on it (--dag_depth=0 without).
#
#   python data/openwebtext/prepare.py                 needs a network, `datasets`, 18 GB of disk
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
#   python train.py config/train_gpt2.py               one GPU: the same batch, eight times as long
#
# nanoGPT reaches a loss of about 2.85 with this recipe in about 4 days on 8 A100 40GB (its README); this
# configuration has not been run to its end here.

dataset = "openwebtext"
# 12 rows x 1024 tokens x 40 micro-batches = 0.5 M tokens a step, however many GPUs share them
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

n_layer = 12
n_head = 12
n_embd = 768

dag_depth = 4

learning_rate = 6e-4
max_iters = 600_000
lr_decay_iters = 600_000
warmup_iters = 2000
min_lr = 6e-5
weight_decay = 0.1
beta2 = 0.95

eval_interval = 1000
eval_iters = 200
