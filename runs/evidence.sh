#!/usr/bin/env bash
# What the DAG is worth: every arm of the table in README.md, with three seeds each, the same text, the same number of
# steps and the same batch. About two hours on 2 CPU cores; what is done already is not done again.
#
#   bash runs/evidence.sh                      all arms, seeds 1 2 3
#   bash runs/evidence.sh default              one arm
#   SEEDS="1" bash runs/evidence.sh plain soft
set -euo pipefail
cd "$(dirname "$0")/.."

out=${OUT:-out/evidence}
declare -A arms=(
    [default]="config/train_default.py"
    [plain]="config/train_default.py --dag_depth=0"
    [plain_wide]="config/train_default.py --dag_depth=0 --n_embd=136" # the DAG's parameters, spent on width
    [seed000]="config/train_seed000.py"
    [seed001]="config/train_seed001.py"
    [learned]="config/train_default.py --dag_values=learned"
    [soft]="config/train_default.py --dag_plan=soft"
    [straight_through]="config/train_default.py --dag_plan=straight_through"
    [sampled]="config/train_default.py --dag_plan=sampled"
)
[ $# -gt 0 ] || set -- default plain plain_wide seed000 seed001 learned soft straight_through sampled
for seed in ${SEEDS:-1 2 3}; do
    for arm in "$@"; do
        run=$out/$arm-$seed
        if [ ! -f "$run/scores.json" ]; then
            rm -rf "$run"
            # shellcheck disable=SC2086
            python train.py ${arms[$arm]} --seed="$seed" --out_dir="$run"
            python evaluate.py --out_dir="$run" --suite=all --json="$run/scores.json"
        fi
        if [ "$arm" = default ] && [ ! -f "$run/scores_silent.json" ]; then
            python evaluate.py --out_dir="$run" --suite=all --silent=true --json="$run/scores_silent.json"
        fi
    done
done
python runs/evidence_table.py "$out"
