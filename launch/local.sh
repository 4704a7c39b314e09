#!/usr/bin/env bash
# One run as several processes on this machine.
#
#   launch/local.sh [--dry_run] NUM_PROCESSES --config=configs/digits.py --workdir=runs/digits
#
# PYTHON               the interpreter, "python" by default
# DEVICES_PER_PROCESS  GPUs of each process, 1 by default; process i takes the i-th share
# GRACE_S              once a process has failed, seconds for the others to end by themselves, 20
#
# Ctrl-C or SIGTERM: all processes save at the same step and end; exit code 75. Else the code is that
# of the first process that failed, or 0.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

take_dry_run "$@"
set -- "${ARGUMENTS[@]}"
[[ ${1:-} =~ ^[1-9][0-9]*$ ]] || fail "usage: launch/local.sh [--dry_run] NUM_PROCESSES FLAGS..."
num_processes=$1
shift
python=${PYTHON:-python}
devices=${DEVICES_PER_PROCESS:-1}
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')

pids=()
trap '((${#pids[@]})) && kill -TERM "${pids[@]}" 2> /dev/null' INT TERM
for ((i = 0; i < num_processes; i++)); do
  ids=$(seq -s , $((i * devices)) $(((i + 1) * devices - 1)))
  command=(env "JAX_LOCAL_DEVICE_IDS=$ids" "JAX_COORDINATOR_BIND_ADDRESS=127.0.0.1:$port" "$python" -m dimo_jax.main "$@"
    "--coordinator_address=127.0.0.1:$port" "--num_processes=$num_processes" "--process_id=$i")
  show "${command[@]}"
  [[ $DRY_RUN ]] && continue
  "${command[@]}" &
  pids+=($!)
done

code=0 deadline=
while ((${#pids[@]})); do
  for i in "${!pids[@]}"; do
    kill -0 "${pids[i]}" 2> /dev/null && continue
    wait "${pids[i]}" && ended=0 || ended=$?
    ((ended == 0)) || echo "process $i: exit code $ended" >&2
    unset "pids[$i]"
    ((code)) || code=$ended
    ((ended == 0)) || deadline=${deadline:-$((SECONDS + ${GRACE_S:-20}))}
  done
  if [[ $deadline ]] && ((SECONDS >= deadline && ${#pids[@]})); then
    kill -KILL "${pids[@]}" 2> /dev/null || true
  fi
  sleep 0.1 || true
done
exit "$code"
