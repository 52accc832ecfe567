#!/usr/bin/env bash
# A Ray cluster inside of one Slurm job: a head and workers on its nodes, a training on them, and an end.
#
#   sbatch cluster/slurm.sh python cluster/demo.py --workers 2 --gpu
#
# What follows the script's name is the command; it finds the cluster by RAY_ADDRESS, and its storage by STORAGE_PATH,
# which all nodes have to reach: runs/ where it was submitted, unless it is set. To change: the lines with #SBATCH, and
# how the environment is activated, which has to be the same on all nodes: pip install "delve_ray[train,tune]".
#SBATCH --job-name=delve_ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --time=02:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --output=%x-%j.log
set -euo pipefail

# source ~/delve/bin/activate

: "${SLURM_JOB_ID:?submit this script with sbatch}" "${SLURM_JOB_NODELIST:?}" "${SLURM_JOB_NUM_NODES:?}"
(($# > 0)) || { echo "Usage: sbatch ${0##*/} COMMAND [ARGUMENT …]" >&2; exit 2; }

export STORAGE_PATH=${STORAGE_PATH:-${SLURM_SUBMIT_DIR:-$PWD}/runs}
# Others on these machines can reach Ray's ports. Without the token they can do nothing there.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token
# Nodes are ended when nothing runs on them any more, so they need not wait for anything.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
# All addresses of the head; the first that is IPv4 and not its own loopback. HEAD_IP=… chooses another network.
HEAD_IP=${HEAD_IP:-$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --all-ip-addresses |
    awk '{ for (i = 1; i <= NF; i++) if ($i ~ /^[0-9.]+$/) { print $i; exit } }')}
# Ports that no other job on the same node takes; Ray chooses all the rest.
port=$((20000 + SLURM_JOB_ID % 3000 * 4))
address=$HEAD_IP:$port
temporary=/tmp/ray-$SLURM_JOB_ID

# srun takes the job's GPUs by itself; its CPUs have to be said again.
step=(srun --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1)
start=(ray start --block --num-cpus="${SLURM_CPUS_PER_TASK:-1}" --num-gpus="${SLURM_GPUS_ON_NODE:-0}"
    --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0 --disable-usage-stats)
running=()
training=

# shellcheck disable=SC2329 # called by the trap
finish() {
    local status=$? pid
    trap - EXIT
    trap '' INT TERM
    if [[ -n $training ]] && kill -TERM "$training" 2>/dev/null; then
        wait "$training" || true # its tracker closes, and its run with it
    fi
    # Workers first, and then the head, which they would miss.
    for ((i = ${#running[@]} - 1; i >= 0; i--)); do
        pid=${running[i]}
        kill -TERM "$pid" 2>/dev/null || true
        wait "$pid" || true
    done
    if ((status == 0)); then
        srun --ntasks-per-node=1 rm -rf "$temporary" || true
    else
        echo "Ended with status $status. Ray's logs: $temporary on $head" >&2
    fi
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

echo "Ray's head: $head, $address; nodes: $SLURM_JOB_NUM_NODES"
"${step[@]}" --nodes=1 --ntasks=1 --nodelist="$head" \
    "${start[@]}" --head --node-ip-address="$HEAD_IP" --port="$port" --dashboard-port="$((port + 1))" \
    --ray-client-server-port="$((port + 2))" --temp-dir="$temporary" &
running+=("$!")
others=$((SLURM_JOB_NUM_NODES - 1))

# wait_for COUNT, in the background: waits for the head and until so many nodes have joined, five minutes at most.
wait_for() {
    exec python - "$address" "$1" <<'PYTHON'
import sys
import time

import ray

address, wanted = sys.argv[1], int(sys.argv[2])
deadline = time.monotonic() + 300
while True:
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        break
    except Exception as error:
        if time.monotonic() > deadline:
            sys.exit(f"No head at {address} after five minutes: {error}")
        time.sleep(1)
while (alive := sum(node["Alive"] for node in ray.nodes())) < wanted:
    if time.monotonic() > deadline:
        sys.exit(f"Only {alive} of {wanted} nodes have joined after five minutes.")
    time.sleep(1)
PYTHON
}

# until_ready COUNT: the same, but gives up when one of Ray's steps ends.
until_ready() {
    local waiting
    wait_for "$1" &
    waiting=$!
    if wait -n "$waiting" "${running[@]}" && ! kill -0 "$waiting" 2>/dev/null; then
        return 0
    fi
    kill "$waiting" 2>/dev/null || true
    return 1
}

until_ready 1 || { echo "Ray's head did not start." >&2; exit 1; }
if ((others > 0)); then
    "${step[@]}" --nodes="$others" --ntasks="$others" --exclude="$head" "${start[@]}" --address="$address" &
    running+=("$!")
    until_ready "$SLURM_JOB_NUM_NODES" || { echo "Not all nodes have joined." >&2; exit 1; }
fi

RAY_ADDRESS=$address "$@" &
training=$!
status=0
wait "$training" || status=$?
training=
exit "$status"
