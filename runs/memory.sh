#!/usr/bin/env bash
# Resident memory of a training run over 5,000 steps, in MiB; about two minutes on 2 CPU cores.
#
#   bash runs/memory.sh [--dag_depth=0 ...]
set -euo pipefail
cd "$(dirname "$0")/.."

out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
python train.py config/train_default.py --n_layer=2 --n_embd=64 --batch_size=16 --max_iters=5000 \
    --eval_interval=1000 --eval_iters=5 --log_interval=500 --out_dir="$out/run" "$@" >"$out/log" &
while kill -0 $! 2>/dev/null; do
    echo "$(grep -oE '^step [0-9]+/' "$out/log" | tail -1) $(awk '/VmRSS/ {print int($2 / 1024)}' /proc/$!/status) MiB"
    sleep 10
done
wait $!
