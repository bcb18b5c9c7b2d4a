#!/usr/bin/env bash
# One training run on a rented machine. launch/remote.py uploads this file with the code and calls it over ssh.
#
#   bash launch/remote_run.sh setup 2.6 auto                  an environment with torch >= 2.6; describes it
#   bash launch/remote_run.sh start 8 config/x.py --seed=1    trains on 8 GPUs, detached; only ever once
#   bash launch/remote_run.sh poll 0                          state, exit code, size of the log; the log
#   bash launch/remote_run.sh stop 120                        it saves and ends, or is killed after 120 s
#   bash launch/remote_run.sh snapshot                        the folder to fetch the run from
#
# In the folder above code/: venv/, secrets/, setup.log; of the training log, pid, exit_code and out/, its run
# folder. Whether it runs is told by `lock`: the kernel lets go of it when the last of its processes is gone.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(cd .. && pwd)
python=$folder/venv/bin/python
chunk=1048576 # bytes of the log in one answer

fail() {
    echo "error: $*" >&2
    exit 1
}

# ------------------------------------------------------------------------------------------------ setup

setup() { # TORCH_MINIMUM DEVICE
    local log=$folder/setup.log
    exec 8>>"$folder/setup.lock"
    flock 8 # a setup whose connection was lost may still be at work
    export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore

    need_space 2
    [ "$2" = cpu ] || nvidia-smi >>"$log" 2>&1 || fail "no GPU answers: $(last_line "$log")"
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' >>"$log" 2>&1 ||
        fail "python3 is missing or older than 3.10"
    if ! "$python" -m pip --version >>"$log" 2>&1; then
        # the image's own PyTorch fits its driver, so the environment sees what the system has
        python3 -m venv --clear --system-site-packages "$folder/venv" >>"$log" 2>&1 ||
            fail "python3 -m venv: $(last_line "$log")"
    fi
    has_torch "$@" || install_torch "$@"
    local computes # says what is there
    computes=$(check_torch "$2") || exit 1

    # what the tests want stands at the end of the file
    sed '/^# tests/,$d; /^torch\b/d' requirements-dev.txt >"$folder/requirements.txt"
    install -r "$folder/requirements.txt" || fail "pip: $(last_line "$log")"
    echo "$computes; $(uname -m), $(nproc) cores, $(($(free_mib) / 1024)) GiB free"
}

free_mib() {
    df -Pk "$folder" | awk 'NR == 2 {print int($4 / 1024)}'
}

need_space() { # GIB
    [ "$(free_mib)" -ge $(($1 * 1024)) ] ||
        fail "the machine's disk is full: $(free_mib) MiB free, $1 GiB are needed"
}

last_line() { # FILE
    grep -v '^[[:space:]]*$' "$1" | tail -n 1
}

install() { # what pip takes
    "$python" -m pip install "$@" >>"$folder/setup.log" 2>&1
}

has_torch() { # MINIMUM DEVICE
    "$python" - "$@" >>"$folder/setup.log" 2>&1 <<'END'
import re, sys
import torch

def numbers(version):
    return [int(number) for number in re.findall(r"\d+", version)[:2]]

print("found torch", torch.__version__, "with CUDA", torch.version.cuda)
old = numbers(torch.__version__) < numbers(sys.argv[1])
sys.exit(old or sys.argv[2] != "cpu" and not torch.version.cuda)
END
}

install_torch() { # MINIMUM DEVICE
    local build=cpu driver
    need_space 12
    if [ "$2" != cpu ]; then # the newest build that the driver takes
        driver=$(nvidia-smi | sed -n 's/.*CUDA[A-Za-z ]*Version: *\([0-9]*\.[0-9]*\).*/\1/p' | head -n 1)
        case $driver in
            1[3-9].*) build=cu130 ;;
            12.[89] | 12.1?) build=cu128 ;;
            12.*) build=cu126 ;;
            *) fail "the NVIDIA driver is too old: it knows CUDA ${driver:-?}, and 12 is needed" ;;
        esac
    fi
    install --ignore-installed "torch>=$1" --index-url "https://download.pytorch.org/whl/$build" ||
        fail "no torch>=$1 ($build) for $(uname -m): $(last_line "$folder/setup.log")"
}

check_torch() { # DEVICE; a matrix product on every GPU, as a healthy nvidia-smi proves nothing
    local log=$folder/setup.log
    "$python" - "$1" 2>>"$log" <<'END' || fail "PyTorch does not compute: $(last_line "$log")"
import platform, sys
import torch

def describe():
    if sys.argv[1] == "cpu":
        return "CPU"
    torch.cuda.init()
    left = torch.randn(512, 512)
    for index in range(torch.cuda.device_count()):
        there = left.to(f"cuda:{index}")
        if not torch.allclose((there @ there).cpu(), left @ left, atol=0.01):
            raise RuntimeError(f"GPU {index} multiplies wrongly")
    gpu = torch.cuda.get_device_properties(0)
    return f"{torch.cuda.device_count()} x {gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)"

try:
    cuda = f" with CUDA {torch.version.cuda}" if torch.version.cuda else ""
    print(f"{describe()}; torch {torch.__version__}{cuda}, Python {platform.python_version()}")
except (RuntimeError, AssertionError) as error:
    sys.exit(" ".join(str(error).split()))
END
}

# ------------------------------------------------------------------------------------------------ training

start() { # GPUS ARGUMENT...
    local file
    exec 9>>"$folder/lock"
    if flock --wait 2 9 && [ ! -e "$folder/pid" ]; then # `alive` takes the lock for a moment, too
        for file in "$folder"/secrets/*; do
            [ ! -f "$file" ] || export "${file##*/}=$(cat "$file")"
        done
        setsid bash "$0" run "$@" </dev/null >>"$folder/log" 2>&1 & # with the lock
    fi
    rm -rf "$folder/secrets"
}

run() { # GPUS ARGUMENT...
    local gpus=$1 code=0 trainer=("$python")
    shift
    [ "$gpus" -le 1 ] || trainer+=(-m torch.distributed.run --standalone --nproc_per_node="$gpus")
    export PYTHONUNBUFFERED=1
    mkdir -p "$folder/out"
    head -c "$chunk" /dev/zero >"$folder/reserve" # on a full disk the end must find some room
    trap : TERM INT HUP                           # a signal to all of us ends the training, not this
    (
        echo "$BASHPID $gpus" >"$folder/pid.part"
        mv "$folder/pid.part" "$folder/pid"
        exec "${trainer[@]}" train.py "$@" --out_dir="$folder/out"
    ) || code=$?
    rm -f "$folder/reserve"
    [ "$(free_mib)" -gt 2 ] || echo "error: the machine's disk is full"
    echo "$code" >"$folder/exit_code.part"
    mv "$folder/exit_code.part" "$folder/exit_code"
}

alive() {
    [ ! -e "$folder/exit_code" ] && [ -e "$folder/lock" ] && ! flock --nonblock "$folder/lock" true
}

poll() { # OFFSET
    local state=ended code=- size=0
    ! alive || state=running
    if [ -e "$folder/exit_code" ]; then # after `alive`: what has ended by now has left its code
        state=ended
        code=$(cat "$folder/exit_code")
    fi
    [ ! -e "$folder/log" ] || size=$(stat -c %s "$folder/log")
    echo "poll $state $code $size"
    if [ "$size" -gt "$1" ]; then
        dd if="$folder/log" bs=64K iflag=skip_bytes,count_bytes skip="$1" count="$chunk" status=none
    fi
}

stop() { # GRACE
    while alive && [ ! -e "$folder/pid" ]; do sleep 0.1; done
    if alive && mkdir "$folder/stopping" 2>/dev/null; then # a second TERM would cut off the saving
        tell TERM
        setsid bash "$0" kill_after "$1" </dev/null >>"$folder/log" 2>&1 &
    fi
}

kill_after() { # SECONDS
    sleep "$1"
    ! alive || tell KILL
}

tell() { # SIGNAL
    local pid gpus workers=
    read -r pid gpus <"$folder/pid"
    if [ "$gpus" -gt 1 ]; then # told itself, torchrun kills them after 30 s and calls that a failure
        workers=$(cat "/proc/$pid/task/"*/children || true)
    fi
    # shellcheck disable=SC2086
    kill -"$1" ${workers:-$pid} || true # it may have ended by itself just now
}

snapshot() {
    # train.py removes old checkpoints while they are fetched; a copy made of links costs no space, and stays
    local source=out
    if alive && rm -rf "$folder/snapshot" && cp -alT "$folder/out" "$folder/snapshot"; then
        source=snapshot
    fi 2>/dev/null # two may fetch at once
    echo "$source"
}

case ${1-} in
    setup | start | run | poll | stop | kill_after | snapshot) "$@" ;;
    *) fail "unknown: ${1-}; setup, start, poll, stop or snapshot" ;;
esac
