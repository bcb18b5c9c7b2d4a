# The per-token DAG: every token owns an append-only scratch list and sees no other token's.
#
#   python train.py config/train_seed001.py
#
# Slot 0 is the token's own value, D steps append S = D + 1 slots, and
#   mixed_hidden = orig_hidden + LayerNorm(dag_hidden) * dag_scale
# without a gate. Operand choices are (B, T, D, S), operation choices (B, T, D, 4). Needs nothing.

dataset = "arithmetic"
batch_size = 32
block_size = 128

n_layer = 4
n_head = 4
n_embd = 128

dag_depth = 4
dag_inputs = "token"
dag_values = "learned"
dag_plan = "soft"
dag_fold = "value"
dag_ops = "add,identity,multiply,subtract"
dag_context = "linear"
dag_post_block = False
dag_gate = False

learning_rate = 1e-3
max_iters = 2000
warmup_iters = 100
min_lr = 1e-4
