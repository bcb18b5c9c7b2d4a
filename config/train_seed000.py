# The sequence DAG: every position computes with the values of all earlier positions.
#
#   python train.py config/train_seed000.py
#
# Nine operations; a snap block and token attention turn each token into a whole number; operand and
# operation attention choose; a transformer block and a gate bring the last node back. Each choice is a
# weighted mixture, so everything is differentiable. Unlike the system it follows, which pooled over the
# sequence, it is causal at every position. Needs nothing.

dataset = "arithmetic"
batch_size = 32
block_size = 128

n_layer = 4
n_head = 4
n_embd = 128

dag_depth = 4
dag_inputs = "sequence"
dag_values = "learned"
dag_plan = "soft"
dag_fold = "value"
dag_ops = "add,multiply,subtract,divide,identity,power,log,max,min"
dag_context = "attention"
dag_post_block = True
dag_gate = True

learning_rate = 1e-3
max_iters = 2000
warmup_iters = 100
min_lr = 1e-4
