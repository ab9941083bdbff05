#!/usr/bin/env bash
# Train with torchrun's elastic rendezvous: the same line on every host, by hand, from Slurm or in a pod.
#
#   launch/torchrun.sh [--dry-run] RECIPE [key=value ...]
#
# A rank that fails or is preempted alone comes back from the newest checkpoint, as often as `restarts` allows; hosts may
# leave and join between the least and the most of `nodes`. Exit codes: 0 the run has reached its end, 130 and 143 this
# host was interrupted, 2 your mistake, others ours.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# ---- edit here ------------------------------------------------------------------------------------------------------
python=${PYTHON:-.venv/bin/python}            # the same path on every host, as this folder
nodes=${NNODES:-1}                            # hosts: N, or LEAST:MOST
per_node=${NPROC_PER_NODE:-gpu}               # ranks on this host; gpu: one for each
endpoint=${RDZV_ENDPOINT:-localhost:29400}    # NAME:PORT of one host, the same everywhere
job=${RDZV_ID:-ummim}                         # the same everywhere, another for each job
restarts=${MAX_RESTARTS:-3}
save_seconds=${SAVE_SECONDS:-300}             # to write a checkpoint when interrupted
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
# export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0
# ---------------------------------------------------------------------------------------------------------------------

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1   # else a restart meets the keys of the start before it, and hangs
dry_run=
if [[ ${1:-} == --dry-run ]]; then dry_run=1; shift; fi
local_address=()
if [[ $nodes != 1 ]]; then                    # else the others are given this host's full name, and may not know it
  address=THIS_HOSTS_ADDRESS
  [[ $dry_run ]] || address=$("$python" -m ummim.cluster.address "${endpoint%:*}")
  local_address=(--local-addr "$address")
fi
command=(
  "$python" -m torch.distributed.run
  --nnodes "$nodes" --nproc-per-node "$per_node" --max-restarts "$restarts"
  --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "$job" "${local_address[@]}"
  --signals-to-handle SIGHUP                  # the others go to the ranks, which save
  train.py "$@"
)
if [[ $dry_run ]]; then
  printf '%q ' OMP_NUM_THREADS="$OMP_NUM_THREADS" TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 "${command[@]}"; echo
  exit
fi
exec "$python" -m ummim.cluster.supervise "$save_seconds" "$@" -- "${command[@]}"
