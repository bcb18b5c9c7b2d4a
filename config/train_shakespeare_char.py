# A character model of Shakespeare, the classic first run of nanoGPT: there is little to compute in it.
#
#   python data/shakespeare_char/prepare.py            or --input=FILE where there is no network
#   python train.py config/train_shakespeare_char.py --dag_depth=0
#
# Sized for one GPU. On a laptop: bash runs/shakespeare_cpu.sh, a small model in about a minute.

dataset = "shakespeare_char"
batch_size = 64
block_size = 256  # characters of context

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3
max_iters = 5000
min_lr = 1e-4
beta2 = 0.99  # few tokens a step
warmup_iters = 100

eval_interval = 250  # it overfits, so look often
eval_iters = 200
