# Sourced by the launch scripts.
# shellcheck shell=bash
exec 3>&1 # where a dry run prints, whoever reads stdout

# Says what is wrong, in one line, and ends the script.
die() {
  echo "error: $*" >&2
  exit 1
}

# Prints the comment that a script opens with, and ends it.
usage() {
  awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$1"
  exit 0
}

# Runs a command, or with dry_run set only prints it, as a shell would read it.
run() {
  if [ -z "${dry_run:-}" ]; then
    "$@"
    return
  fi
  local line
  line=$(printf ' %q' "$@")
  echo "${line# }" >&3
}
