# All nine operations in one model, said in symbols and in words, written as integers, decimals, roundings, fractions.
#
#   python train.py config/train_allops.py
#   python eval.py --out_dir=out/train_allops-001 --suite=test
#
# Needs nothing: the text is generated on the spot.

dataset = "allops"
batch_size = 32
block_size = 128

dag_depth = 3
dag_ops = "all"
dag_leaves = 3  # 2,112 plans; 149,820 over four numbers

learning_rate = 1e-3
max_iters = 4000
schedule = "wsd"
wsd_decay_iters = 1000
min_lr = 5e-5

eval_interval = 500
