#!/usr/bin/env bash
# Several machines without a scheduler: run the same command on each; HEAD names one of them.
#
#   HEAD=machine-a NODES=2 launch/torchrun.sh configs/wiki.py \
#       --data.train_file /shared/T.jsonl --output_dir /shared/out
#
# The machines must share the folder of output_dir, because checkpoints are read from it. They must
# have the same files under the same names, and the same installation. HEAD must mean the same
# machine on all of them, and each machine's own host name must lead the others to it. If it leads
# to 127.0.0.1 or to the wrong network card, set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the
# right card (e.g. eth0), and give torchrun --local-addr with its address.
#
# If a process dies, all of them are started again, up to RESTARTS times, and continue from the
# newest checkpoint. They cannot continue on fewer machines: an optimizer step would have fewer
# documents, which train.py refuses.
set -euo pipefail

: "${HEAD:?the name or address of one of the machines, e.g. HEAD=machine-a}"
: "${NODES:=2}"     # number of machines
: "${GPUS:=gpu}"    # processes per machine: a number, or gpu for one per GPU
: "${PORT:=29400}"  # a port that is free on HEAD and that the other machines can reach
: "${RESTARTS:=3}"
: "${RUN:=minilora}"  # runs with the same HEAD and PORT need different names

# seconds that torchrun waits for a checkpoint after SIGTERM, before it kills the processes
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"  # CPU cores of a machine, divided by its processes

# without this, restarted processes get the addresses of dead ones (pytorch issue 135712)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --nnodes="$NODES" --nproc_per_node="$GPUS" --rdzv_backend=c10d \
    --rdzv_endpoint="$HEAD:$PORT" --rdzv_id="$RUN" --max-restarts="$RESTARTS" \
    "$(dirname "$0")/../train.py" "$@"
