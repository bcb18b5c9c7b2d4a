# Expressions of two, three and four signed numbers with + - * / and parentheses; the answers are decimals.
#
#   python train.py config/train_multiop.py
#   python eval.py --out_dir=out/train_multiop-001 --suite=test --rel_tol=1e-4
#
# Needs nothing: the text is generated on the spot. The task is that of OccamLLM (2406.06576): operands within
# +-100, a relative error below 1e-4 counts as solved.

dataset = "multiop"
batch_size = 32
block_size = 128

dag_depth = 4
dag_ops = "add,subtract,multiply,divide,identity"
dag_leaves = 4  # 3,712 plans

learning_rate = 1e-3
max_iters = 3000
schedule = "wsd"
wsd_decay_iters = 750
min_lr = 5e-5

eval_interval = 500
