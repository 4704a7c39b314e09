#!/usr/bin/env bash
# A run on a TPU VM or a pod slice: makes or reuses it, brings the code, runs, shows the log, starts
# again after a preemption.
#
#   launch/tpu_vm.sh [--dry_run] run --config=configs/imagenet256.py --workdir=/mnt/shared/run
#   launch/tpu_vm.sh [--dry_run] logs     shows the log of a run that goes on
#   launch/tpu_vm.sh [--dry_run] delete   deletes the TPU
#
# The variables of tpu_common.sh, and TPU_SPOT=1 for one that may be preempted.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/tpu_common.sh

READY=READY
COMING="CREATING STARTING RESTARTING REPAIRING REIMAGING"
GONE="PREEMPTED TERMINATED"

state() {
  look gcloud compute tpus tpu-vm describe "$TPU_NAME" --zone="$TPU_ZONE" --format='value(state)'
}
create() {
  run gcloud compute tpus tpu-vm create "$TPU_NAME" --zone="$TPU_ZONE" \
    --accelerator-type="$TPU_TYPE" --version="$TPU_VERSION" ${TPU_SPOT:+--spot}
}
delete() {
  run gcloud compute tpus tpu-vm delete "$TPU_NAME" --zone="$TPU_ZONE" --quiet
}

main "$@"
