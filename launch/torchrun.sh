#!/usr/bin/env bash
# Several machines, no scheduler: the same command on each of them, with HEAD the name of one of them.
#
#   HEAD=machine-a NODES=2 launch/torchrun.sh configs/wiki.py --data.train_file /shared/T.jsonl --output_dir /shared/out
#
# The machines must share the folder of output_dir (checkpoints are found there again), have the same files under the same
# names and the same installation, and HEAD must lead them all to one machine. Every machine's own host name has to lead the
# others to it: where it leads to 127.0.0.1 or to another network card, set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the
# right card (e.g. eth0), and give torchrun --local-addr with its address.
#
# If a process dies, all are started again, up to RESTARTS times, and continue from the newest checkpoint. Not with fewer
# machines, though: documents per optimizer step would be others, which train.py refuses.
set -euo pipefail

: "${HEAD:?the name or address of one of the machines, e.g. HEAD=machine-a}"
: "${NODES:=2}"     # machines
: "${GPUS:=gpu}"    # processes a machine: gpu is one for each GPU, or a number
: "${PORT:=29400}"  # free on HEAD, and open between the machines
: "${RESTARTS:=3}"
: "${RUN:=minilora}"  # tells several runs on one HEAD and PORT apart

# after SIGTERM to torchrun: how long a checkpoint may take before the processes are killed
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"  # CPU cores of a machine / its processes

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # else a restart meets dead addresses of the first start (pytorch issue 135712)
exec torchrun --nnodes="$NODES" --nproc_per_node="$GPUS" --rdzv_backend=c10d --rdzv_endpoint="$HEAD:$PORT" \
    --rdzv_id="$RUN" --max-restarts="$RESTARTS" "$(dirname "$0")/../train.py" "$@"
