# Addition of 3-digit numbers from 1,000 lines of text such as 128+367=495.
#
#   python train.py config/train_add3_1k.py
#   python eval.py --out_dir=out/train_add3_1k-001 --suite=test
#
# Needs nothing: the text is generated on the spot. With these 1,000 lines a 10.7 M-parameter nanoGPT reaches 0.4 %
# (Lee et al. 2023, 2307.03381, plain format).

dataset = "addition_1k"
batch_size = 32
block_size = 128

dag_depth = 2
dag_ops = "all"
dag_leaves = 2

learning_rate = 1e-3
max_iters = 400
schedule = "wsd"
wsd_decay_iters = 100
min_lr = 5e-5

eval_interval = 100
