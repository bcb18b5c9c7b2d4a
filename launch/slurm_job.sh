#!/usr/bin/env bash
# One training run as a SLURM job. `python slurm.py submit` puts a copy into the run folder, RUN/slurm/job.sh, with
# the settings of that job. Whenever it starts it goes on from the newest checkpoint in RUN, if there is one, so
# `sbatch RUN/slurm/job.sh` continues a run that was cancelled or ran into its time limit.
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
# Three minutes before the time limit the training is told to save. Not B:TERM, which tells this shell alone.
#SBATCH --signal=TERM@180
# slurm.py writes the settings of the job here
set -euo pipefail

# by now it has set these
: "${run:?}" "${job:?}" "${python:?}" "${processes:?}" "${data:?}" "${prepare:?}" "${train[*]:?}"

told=143 # exit code of a step that was told to stop
broken=200

fail() {
    echo "error: $*" >&2
    exit 1
}

checkpoints() {
    find "$run" -maxdepth 1 -regextype posix-extended -regex '.*/(last|best)-[0-9]{8,}(\.old)?' | sort
}

on_node() { # COMMAND: torchrun, once on every node
    local code=0 signalled='' torchrun
    if [ -e "$job/wandb_key" ]; then
        WANDB_API_KEY=$(<"$job/wandb_key")
        export WANDB_API_KEY
    fi
    trap 'signalled=yes' TERM
    # SLURM's TERM reaches every process. torchrun must not act on it: it would kill its workers after 30 s and call
    # that a failure. Ignored by torchrun, it is ignored by train.py, too, but for the first one in its loop.
    (
        trap '' TERM
        PET_SIGNALS_TO_HANDLE=SIGINT PET_RDZV_CONF="is_host=$((SLURM_NODEID == 0))" exec "$@"
    ) &
    torchrun=$!
    wait "$torchrun" || code=$? # the signal ends this
    while kill -0 "$torchrun" 2>/dev/null; do
        sleep 2 || true
        pkill -TERM -P "$torchrun" || true # the first may have come before the loop
    done
    [ -z "$signalled" ] || exit "$told"
    # srun passes on the highest of the nodes' codes, and ends the other nodes of a broken one with TERM
    [ "$code" = 0 ] || exit "$broken"
}

# ------------------------------------------------------------------------------------------------ before

echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start $((${SLURM_RESTART_COUNT:-0} + 1)), $(date '+%F %T')"
other=$(sed -n 's/.*"id": "\([0-9]*\)".*/\1/p' "$job/job.json" 2>/dev/null || true)
if [ -n "$other" ] && [ "$other" != "$SLURM_JOB_ID" ]; then # two trainings would write the same checkpoints
    state=$(squeue --noheader --jobs="$other" --states=RUNNING,COMPLETING,SUSPENDED --format=%T 2>/dev/null || true)
    [ -z "$state" ] || fail "job $other is at work on this run: \`scancel $other\`, or let it finish"
    sed -i "s/\"id\": \"$other\"/\"id\": \"$SLURM_JOB_ID\"/" "$job/job.json" # for status, logs and cancel
fi
rm -f "$job/exit_code"
ended=0
trap 'ended=$?; echo "$ended" >"$job/exit_code"; [ "$ended" != 0 ] || rm -f "$job/wandb_key"' EXIT
[ -e "$data/meta.json" ] ||
    fail "no data in $data: run \`$prepare\` where there is a network, then \`sbatch $job/job.sh\`"
[ -e "$job/code/train.py" ] || fail "$job/code is not there: is $run on a file system that all nodes share?"

before=$(checkpoints)
if [ -n "$before" ]; then
    train+=(--init_from=resume)
else
    rm -f "$run/config.json" "$run/metrics.jsonl" # of a start that came to no checkpoint
fi

# ------------------------------------------------------------------------------------------------ training

torchrun=("$python" -m torch.distributed.run --nproc_per_node="$processes")
if [ "$SLURM_NNODES" = 1 ]; then
    torchrun+=(--standalone)
else
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    address=$(scontrol show node "${hosts[0]}" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    torchrun+=(--nnodes="$SLURM_NNODES" --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID")
    torchrun+=(--rdzv_endpoint="$address:$((20000 + SLURM_JOB_ID % 10000))")
fi
cores=$((SLURM_CPUS_PER_TASK / processes))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 0 ? cores : 1))}
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # since SLURM 22.05 srun does not take it from the job
export job told broken
export -f on_node
code=0
srun --export=ALL --kill-on-bad-exit=1 bash -c 'on_node "$@"' on_node "${torchrun[@]}" "${train[@]}" || code=$?

# ------------------------------------------------------------------------------------------------ after

if [ "$code" = "$told" ]; then
    [ "$(checkpoints)" != "$before" ] ||
        fail "told to stop before anything was saved, so it would never end: give it more --time"
    echo "told to stop, and saved: back into the queue (CANCELLED and exit code 143 above mean the same)"
    exec scontrol requeue "$SLURM_JOB_ID"
fi
[ "$code" = 0 ] ||
    fail "the training failed, for the reason above; \`sbatch $job/job.sh\` would go on from its newest checkpoint"
