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
dag_inputs = "numbers"
dag_values = "literal"
dag_plan = "searched"
dag_fold = "digits"
dag_ops = "add,subtract,multiply,divide,identity"
dag_leaves = 4  # 3,712 plans

learning_rate = 1e-3
max_iters = 2000
schedule = "wsd"
wsd_decay_iters = 500
warmup_iters = 100
min_lr = 5e-5

eval_interval = 500
eval_iters = 20
