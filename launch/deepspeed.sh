#!/usr/bin/env bash
# Train on the hosts of a hostfile: DeepSpeed's launcher, over pdsh and ssh, started on any machine that reaches them.
#
#   launch/deepspeed.sh [--dry-run] [--skip-preflight] RECIPE [key=value ...]
#
# Exit codes: 0 the run has reached its end, 130 and 143 interrupted and saved, 2 your mistake, others ours.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# ---- edit here ------------------------------------------------------------------------------------------------------
python=${PYTHON:-.venv/bin/python}            # the same path on every host, as this folder
hostfile=${HOSTFILE:-launch/hostfile}         # a line NAME slots=GPUS per host; the first holds rank 0
port=${MASTER_PORT:-29500}                    # free on the first host, open to the others
address=${MASTER_ADDR:-}                      # the first host's, where it has several; empty: found
free_gib=${FREE_GIB:-20}                      # to be free in the output folder
environment=(                                 # what every rank gets; ssh passes nothing on by itself
  PATH="$PATH"
  OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
  ${GLOO_SOCKET_IFNAME:+GLOO_SOCKET_IFNAME="$GLOO_SOCKET_IFNAME"}   # network interface; else the one towards rank 0
  ${NCCL_SOCKET_IFNAME:+NCCL_SOCKET_IFNAME="$NCCL_SOCKET_IFNAME"}
)
# ---------------------------------------------------------------------------------------------------------------------

options=(--hostfile "$hostfile" --port "$port" --free-gib "$free_gib")
[[ -z $address ]] || options+=(--master-addr "$address")
for variable in "${environment[@]}"; do options+=(--env "$variable"); done
exec "$python" -m ummim.cluster.deepspeed_job "${options[@]}" "$@"
