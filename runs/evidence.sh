#!/usr/bin/env bash
# What the DAG is worth: every arm of the table in README.md, with three seeds each, the same text, the same number
# of steps and the same batch. 2 h 20 min on two cores, a shell for each; what is done already is not done again.
#
#   bash runs/evidence.sh                      all arms, seeds 1 2 3
#   bash runs/evidence.sh default              one arm, all seeds
#   SEEDS=1 OMP_NUM_THREADS=1 bash runs/evidence.sh plain soft
set -euo pipefail
cd "$(dirname "$0")/.."

out=${OUT:-out/evidence}
default="train.py config/train_default.py"
declare -A arms=(
    [default]="$default"
    [plain]="$default --dag_depth=0"
    [plain_wide]="$default --dag_depth=0 --n_embd=136" # 0.91 M parameters; with the DAG it is 0.88 M
    [seed000]="train.py config/train_seed000.py"
    [seed001]="train.py config/train_seed001.py"
    [learned]="$default --dag_values=learned"
    [soft]="$default --dag_plan=soft"
    [straight_through]="$default --dag_plan=straight_through"
    [labelled]="runs/train_labelled.py config/train_default.py" # the generator's own plans: an upper bound
    [sampled]="$default --dag_plan=sampled"                     # a second a step: only where it is asked for
)
[ $# -gt 0 ] || set -- default plain plain_wide seed000 seed001 learned soft straight_through labelled
for seed in ${SEEDS:-1 2 3}; do
    for arm in "$@"; do
        run=$out/$arm-$seed
        if [ ! -f "$run/scores.json" ]; then
            rm -rf "$run"
            # shellcheck disable=SC2086
            python ${arms[$arm]} --seed="$seed" --eval_interval=200 --out_dir="$run"
            python eval.py --out_dir="$run" --suite=all --json="$run/scores.json"
        fi
        if [ "$arm" != labelled ] && [ ! -f "$out/$arm.cost" ]; then # bench.py knows no labels
            python bench.py --out_dir="$run" --steps=40 --decode_tokens=0 --json | tail -n 1 > "$out/$arm.cost.part"
            mv "$out/$arm.cost.part" "$out/$arm.cost"
        fi
        if [ "$arm" = default ] && [ ! -f "$run/scores_silent.json" ]; then
            python eval.py --out_dir="$run" --suite=all --silent=true --json="$run/scores_silent.json"
        fi
    done
done
python runs/evidence_table.py "$out"
