#!/usr/bin/env bash
# A run on a TPU slice of GKE: fills in gke.yaml, applies it and shows the first host's log.
#
#   launch/gke.sh [--dry_run] run --config=configs/imagenet256.py --workdir=/shared/run
#   launch/gke.sh [--dry_run] logs|delete
#
# JOB_NAME         of the job
# IMAGE            with this repository as its working directory, installed (launch/README.md)
# CLAIM            a ReadWriteMany volume claim, mounted at /shared: put --workdir there
# TPU_ACCELERATOR  such as tpu-v5-lite-podslice
# TPU_TOPOLOGY     such as 4x4
# NUM_HOSTS        of the slice, such as 4
# CHIPS_PER_HOST   such as 4
# MAX_RESTARTS     100 by default
# Cluster, namespace and account are those of kubectl.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

# A YAML list of quoted strings.
quote() {
  local item list=
  for item in "$@"; do
    item=${item//\\/\\\\}
    list+=", \"${item//\"/\\\"}\""
  done
  echo "[${list#, }]"
}

follow() {
  run kubectl logs --follow --pod-running-timeout=24h --ignore-errors \
    --selector="jobset.sigs.k8s.io/jobset-name=$JOB_NAME,batch.kubernetes.io/job-completion-index=0"
}

take_dry_run "$@"
set -- "${ARGUMENTS[@]}"
need JOB_NAME
case ${1:-} in
  logs) follow ;;
  delete) run kubectl delete jobset "$JOB_NAME" ;;
  run)
    shift
    need IMAGE CLAIM TPU_ACCELERATOR TPU_TOPOLOGY NUM_HOSTS CHIPS_PER_HOST
    check_job "$@"
    MAX_RESTARTS=${MAX_RESTARTS:-100}
    # shellcheck disable=SC2034 # read by its name
    FLAGS=$(quote "$@")
    manifest=$(grep -v '^#' launch/gke.yaml)
    for name in JOB_NAME IMAGE CLAIM TPU_ACCELERATOR TPU_TOPOLOGY NUM_HOSTS CHIPS_PER_HOST MAX_RESTARTS FLAGS; do
      manifest=${manifest//"\${$name}"/"${!name}"}
    done
    [[ $DRY_RUN ]] && echo "$manifest"
    run kubectl apply --filename=- <<< "$manifest"
    follow
    ;;
  *) fail "usage: $0 [--dry_run] run FLAGS...|logs|delete" ;;
esac
