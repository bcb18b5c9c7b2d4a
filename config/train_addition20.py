# Addition, trained on numbers of 1 to 6 digits, asked for up to 20 and for 100.
#
#   python train.py config/train_addition20.py
#   python eval.py --out_dir=out/train_addition20-001 --suite=test
#
# Needs nothing: the text is generated on the spot. Which of the nine operations it is has to be learned.

dataset = "addition"
batch_size = 12
block_size = 320  # two numbers of 100 digits and their sum

dag_depth = 2
dag_ops = "all"
dag_leaves = 2
dag_digits = 120

learning_rate = 1e-3
max_iters = 600
schedule = "wsd"
wsd_decay_iters = 150
min_lr = 5e-5

eval_interval = 200
