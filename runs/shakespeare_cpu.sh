#!/usr/bin/env bash
# nanoGPT's CPU recipe on tiny Shakespeare: 4 layers, width 128, 2000 steps of 12 x 64 characters, at most 1e-3 as
# learning rate. About 40 s on 2 cores with AVX512-BF16. The schedule is warmup-stable-decay; with nanoGPT's cosine,
# --schedule=cosine, the validation loss ends 0.05 higher. An argument names the text where there is no network:
#
#   bash runs/shakespeare_cpu.sh [input.txt]
set -euo pipefail
cd "$(dirname "$0")/.."

if [ ! -f data/shakespeare_char/meta.json ]; then
    python data/shakespeare_char/prepare.py ${1:+--input="$1"}
fi
time python train.py config/train_shakespeare_char.py --device=cpu --dag_depth=0 \
    --n_layer=4 --n_head=4 --n_embd=128 --block_size=64 --batch_size=12 --dropout=0.0 \
    --max_iters=2000 --schedule=wsd --eval_iters=20 --log_interval=100
