# Sourced by the launch scripts.
# shellcheck shell=bash
exec 3>&1 # dry runs print to this copy of stdout, also where stdout itself is captured

# Prints an error message and exits with status 1.
die() {
  echo "error: $*" >&2
  exit 1
}

# Prints the comment at the top of a script, and exits.
usage() {
  awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$1"
  exit 0
}

# Runs a command; if dry_run is set, only prints it, quoted for the shell.
run() {
  if [ -z "${dry_run:-}" ]; then
    "$@"
    return
  fi
  local line
  line=$(printf ' %q' "$@")
  echo "${line# }" >&3
}
