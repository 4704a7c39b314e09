# shellcheck shell=bash
# Sourced by tpu_vm.sh and tpu_queued.sh, which say how a TPU comes and goes: `state`, `create` and
# `delete`, and which states are which (READY, COMING, and GONE: taken away).
#
# TPU_NAME     of the TPU, as you like
# TPU_ZONE     such as us-central2-b
# TPU_TYPE     such as v5litepod-16; `gcloud compute tpus accelerator-types list --zone=ZONE`
# TPU_VERSION  of its software, such as v2-alpha-tpuv5-lite
# MAX_RESTARTS 100 by default
# POLL_S       seconds between two looks at a TPU that is being made, 30 by default
# The project and the account are those of gcloud.

source launch/common.sh

export CLOUDSDK_CORE_DISABLE_PROMPTS=1

on_all() { run gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$TPU_ZONE" --worker=all --command="$1"; }
on_first() { run gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$TPU_ZONE" --worker=0 --command="$1"; }

# Runs what describes the TPU, which may not be there yet; fails where it cannot be asked for.
look() {
  local errors code=0
  show "$@"
  [[ $DRY_RUN ]] && return
  errors=$(mktemp)
  "$@" 2> "$errors" || code=$?
  cat "$errors" >&2
  ((code == 0)) || grep -qE 'NOT_FOUND|was not found' "$errors" || code=255
  rm "$errors"
  ((code != 255)) || fail "$TPU_NAME cannot be looked at; see above"
}

# Returns once the TPU is there; one that was preempted is made anew.
ensure() {
  local now
  while :; do
    now=$(state)
    case " $READY $COMING " in
      *" ${now:-none} "*) ;;
      *)
        if [[ $now ]]; then
          [[ " $GONE " == *" $now "* ]] || fail "$TPU_NAME is $now: start or delete it yourself"
          delete
        fi
        create
        now=
        ;;
    esac
    [[ $DRY_RUN || " $READY " == *" ${now:-none} "* ]] && return
    sleep "${POLL_S:-30}"
  done
}

# The files that git does not ignore, as they are here, into ~/dimo_jax on every worker; and what they
# need.
install() {
  local archive
  archive=$(mktemp -d)/dimo_jax.tgz
  run git ls-files -z --cached --others --exclude-standard | run tar --null --files-from=- -czf "$archive"
  run gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:dimo_jax.tgz" --zone="$TPU_ZONE" --worker=all
  rm -rf "$(dirname "$archive")"
  # shellcheck disable=SC2016 # expanded there
  on_all 'set -e
    mkdir -p dimo_jax
    exec 9> dimo_jax/run.lock
    flock -n 9 || exit 0 # a run goes on there, with the code that it has
    tar -xzf dimo_jax.tgz -C dimo_jax && cd dimo_jax
    python=$(command -v python3.12 || command -v python3.11 || true)
    if [ -z "$python" ]; then
      sudo apt-get -qq update && sudo apt-get -qq install -y python3.11-venv && python=python3.11
    fi
    test -x .venv/bin/python || "$python" -m venv .venv
    .venv/bin/pip install -qq -r requirements-tpu.txt'
}

# Starts the run on every worker, apart from this connection; where it is going on, nothing.
start() {
  local flags
  flags=$(printf ' %q' "$@")
  on_all "cd dimo_jax && flock -n run.lock rm -f run.code
    setsid flock -n run.lock bash -c $(printf %q \
    ".venv/bin/python -m dimo_jax.main --distributed$flags > run.log 2>&1; echo \$? > run.code") \
    > /dev/null 2>&1 < /dev/null & sleep 1"
}

# Shows the first worker's log until the run has ended; returns its exit code.
follow() {
  # shellcheck disable=SC2016 # expanded there
  on_first 'cd dimo_jax
    (until test -e run.code; do sleep 1; done) &
    tail --pid=$! -n +1 -F run.log 2> /dev/null
    exit "$(cat run.code)"'
}

# main COMMAND...: what the scripts have in common.
main() {
  take_dry_run "$@"
  set -- "${ARGUMENTS[@]}"
  need TPU_NAME TPU_ZONE
  case ${1:-} in
    logs) follow ;;
    delete) delete ;;
    run)
      shift
      need TPU_TYPE TPU_VERSION
      check_job "$@"
      local restarts=0 code
      while :; do
        ensure
        install
        start "$@"
        follow && code=0 || code=$?
        # 255 is ssh's own: the connection, and perhaps the TPU, is lost.
        ((code == RESUME || code == 255)) || exit "$code"
        ((restarts++ < ${MAX_RESTARTS:-100})) || exit "$code"
        echo "restart $restarts, after exit code $code" >&2
        sleep "${POLL_S:-30}"
      done
      ;;
    *) fail "usage: $0 [--dry_run] run FLAGS...|logs|delete" ;;
  esac
}
