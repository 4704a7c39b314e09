#!/usr/bin/env bash
# As tpu_vm.sh, with a TPU that is queued for: the way to spot capacity and to newer TPUs.
#
#   launch/tpu_queued.sh [--dry_run] run --config=configs/imagenet256.py --workdir=/mnt/shared/run
#   launch/tpu_queued.sh [--dry_run] logs|delete
#
# The variables of tpu_common.sh, and TPU_ON_DEMAND=1 for one that is not spot.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/tpu_common.sh

READY=ACTIVE
COMING="CREATING ACCEPTED PROVISIONING WAITING_FOR_RESOURCES"
GONE="SUSPENDED FAILED"

state() {
  look gcloud compute tpus queued-resources describe "$TPU_NAME" --zone="$TPU_ZONE" \
    --format='value(state.state)'
}
create() {
  local spot=--spot
  [[ ${TPU_ON_DEMAND:-} ]] && spot=
  run gcloud compute tpus queued-resources create "$TPU_NAME" --zone="$TPU_ZONE" \
    --node-id="$TPU_NAME" --accelerator-type="$TPU_TYPE" --runtime-version="$TPU_VERSION" ${spot:+"$spot"}
}
delete() {
  run gcloud compute tpus queued-resources delete "$TPU_NAME" --zone="$TPU_ZONE" --force --quiet
}

main "$@"
