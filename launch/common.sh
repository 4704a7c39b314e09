# shellcheck shell=bash
# Sourced by the launchers. Every command goes through `run`, which prints it; with --dry_run it
# does no more than that.

DRY_RUN=
# shellcheck disable=SC2034 # read by others
readonly RESUME=75 # exit code of a run that saved and wants to be started again

# Takes --dry_run out of the launcher's arguments, wherever it stands; the others are ARGUMENTS.
ARGUMENTS=()
take_dry_run() {
  local argument
  for argument in "$@"; do
    if [[ $argument == --dry_run ]]; then DRY_RUN=1; else ARGUMENTS+=("$argument"); fi
  done
}

show() {
  local words
  printf -v words ' %q' "$@"
  echo "+$words" >&2
}

run() {
  show "$@"
  [[ $DRY_RUN ]] || "$@"
}

fail() {
  echo "error: $1" >&2
  exit 2
}

# Fails where the flags of a run name no workdir, or a config that is not here: before a machine is
# made for it.
check_job() {
  local flag workdir=
  for flag in "$@"; do
    case $flag in
      --workdir | --workdir=?*) workdir=1 ;;
      --config=*)
        flag=${flag#*=}
        [[ -f ${flag%%:*} ]] || fail "--config=$flag does not exist"
        ;;
    esac
  done
  [[ $workdir ]] || fail "--workdir is missing; name a folder that every host sees"
}

# Fails where one of the named environment variables is empty.
need() {
  local name
  for name in "$@"; do
    [[ ${!name:-} ]] || fail "set $name (see launch/README.md)"
  done
}
