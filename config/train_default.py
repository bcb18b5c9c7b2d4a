# A small GPT with a DAG on it learns arithmetic from plain text.
#
#   python train.py config/train_default.py --dag_depth=4
#   python train.py config/train_default.py --dag_depth=0        the plain GPT, the baseline
#
# Needs nothing: the text is generated on the spot. Time: see the table of results in README.md.

dataset = "arithmetic"
batch_size = 32
block_size = 128

n_layer = 4
n_head = 4
n_embd = 128

dag_depth = 4
dag_inputs = "token"
dag_values = "learned"
dag_plan = "straight_through"
dag_fold = "value"

learning_rate = 1e-3
max_iters = 2000
warmup_iters = 100
min_lr = 1e-4

eval_interval = 250
eval_iters = 20
