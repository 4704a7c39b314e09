# shellcheck shell=bash
# Sourced by the launchers. Every command goes through `run`, which prints it; with --dry_run it
# does no more than that.

DRY_RUN=
# shellcheck disable=SC2034 # read by others
readonly RESUME=75 # exit code of a run that saved and wants to be started again

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

# Fails where one of the named environment variables is empty.
need() {
  local name
  for name in "$@"; do
    [[ ${!name:-} ]] || fail "set $name (see launch/README.md)"
  done
}
