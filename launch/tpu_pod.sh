#!/usr/bin/env bash
# Runs drl_jax on a Cloud TPU, with one host or a pod of several, until the program ends.
#
#   bash launch/tpu_pod.sh run --zone=us-west4-a --type=v5litepod-16 --spot -- \
#     --config=configs/cifar10.py --workdir=gs://bucket/cifar10
#   bash launch/tpu_pod.sh logs --zone=us-west4-a    # follow the program's log
#   bash launch/tpu_pod.sh down --zone=us-west4-a    # delete the TPU
#
# run   requests the TPU as a queued resource, or uses the existing one with this name; waits
#       until it is active; installs the project on every host; starts the program on all hosts;
#       and follows the log of the first. If the TPU is preempted, it is requested again, and
#       the program resumes from its newest checkpoint. When the program has ended, the TPU is
#       deleted. Ctrl-C leaves everything running; after that, the same command saves a
#       checkpoint, installs the project again and resumes.
#
# --zone=ZONE        zone of the TPU
# --type=TYPE        accelerator type, such as v5litepod-8, v5p-32, v6e-16 or v4-32
# --name=NAME        name of the queued resource and of its node (default: drl-jax)
# --project=PROJECT  project (default: gcloud's)
# --runtime=VERSION  software version of the hosts (default: depends on the type)
# --spot             use spot capacity: cheaper, but may be preempted
# --keep             do not delete the TPU at the end
# --poll=SECONDS     time between two queries of the TPU's state (default: 30)
# --dry-run          print the commands instead of running them
#
# The options after -- are those of drl_jax.main; --workdir must be in a bucket. The exit status
# is that of the program on the first host. A program that was killed is started again, unless it
# was killed within an hour of its start three times in a row. A program that ended with an error
# is not started again.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Gives up when the program was killed MAX_KILLS times in a row on the same TPU, each time within
# MIN_SECONDS of its start.
MAX_KILLS=3
MIN_SECONDS=3600
HOST=drl_jax/launch/tpu_host.sh

# Prints a message with the time.
say() { echo "$(date +%H:%M:%S) $*" >&2; }

[ $# -gt 0 ] || die "no command: give run, logs or down (see --help)"
verb=$1
shift
case $verb in
  run | logs | down) ;;
  -h | --help) usage "${BASH_SOURCE[0]}" ;;
  *) die "unknown command '$verb': give run, logs or down (see --help)" ;;
esac
name=drl-jax zone='' type='' runtime='' poll=30 spot='' keep='' dry_run=''
where=(--quiet)
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case $1 in
    --zone=?*) zone=${1#*=} ;;
    --type=?*) type=${1#*=} ;;
    --name=?*) name=${1#*=} ;;
    --project=?*) where+=("$1") ;;
    --runtime=?*) runtime=${1#*=} ;;
    --poll=?*) poll=${1#*=} ;;
    --spot) spot=1 ;;
    --keep) keep=1 ;;
    --dry-run) dry_run=1 ;;
    -h | --help) usage "${BASH_SOURCE[0]}" ;;
    *) die "unknown option '$1' of $verb (see --help): options of drl_jax.main go after --" ;;
  esac
  shift
done
[ -n "$zone" ] || die "no --zone: give the zone of the TPU, such as --zone=us-west4-a"
where+=(--zone="$zone")
if [ "$verb" = run ]; then
  [ -n "$type" ] || die "no --type: give the accelerator type, such as --type=v5litepod-8"
  [ -n "$runtime" ] || case $type in
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v[234]-*) runtime=tpu-ubuntu2204-base ;;
    *) die "unknown --type=$type: give --runtime=VERSION, too" ;;
  esac
  workdir=''
  for flag in "$@"; do
    case $flag in --workdir=*) workdir=${flag#*=} ;; esac
  done
  [[ $workdir == gs://?* ]] ||
    die "the --workdir after -- is '$workdir': give a bucket, such as --workdir=gs://BUCKET/RUN"
  shift # the --
  program=$(printf ' %q' "$@")
fi

[ -n "$dry_run" ] || command -v gcloud >/dev/null ||
  die "gcloud not found: install the Google Cloud CLI"

# Runs command $1 on the queued resource, with the options that follow.
queue() { run gcloud compute tpus queued-resources "$1" "$name" "${where[@]}" "${@:2}"; }

# Runs shell command $2 on host $1, which is a number or "all".
on() { run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="$1" --command="$2"; }

# Prints the state of the queued resource, or nothing if it does not exist.
state() {
  for _ in 1 2 3 4 5; do
    if queue describe --format='value(state.state)' 2>"$scratch/stderr"; then return; fi
    if grep -q NOT_FOUND "$scratch/stderr"; then return; fi
    sleep "$poll"
  done
  die "gcloud cannot describe $name: $(tail -n 1 "$scratch/stderr")"
}

# Waits until the TPU is active, after requesting it if necessary.
await_active() {
  local now before='' asked=''
  while true; do
    now=$(state)
    if [ "$now" != "$before" ]; then say "$name: ${now:-does not exist}"; fi
    before=$now
    case $now in
      ACTIVE) return ;;
      '')
        local request=(--node-id="$name" --accelerator-type="$type" --runtime-version="$runtime")
        if [ -n "$spot" ]; then request+=(--spot); fi
        queue create "${request[@]}"
        asked=1 running='' killed=0
        if [ -n "$dry_run" ]; then return; fi
        ;;
      FAILED | SUSPENDED)
        if [ -n "$asked" ] && [ "$now" = FAILED ]; then
          die "the request for $type failed: for the reason, run gcloud compute tpus queued-resources describe $name ${where[*]}"
        fi
        queue delete --force
        ;;
      *) sleep "$poll" ;;
    esac
  done
}

# Installs the project on every host, as it was when this script started, and starts the program.
start() {
  run gcloud compute tpus tpu-vm scp "$scratch/drl_jax.tgz" "$name:" "${where[@]}" --worker=all &&
    on all "mkdir -p drl_jax && tar -xzf drl_jax.tgz -C drl_jax && bash $HOST install" &&
    on all "bash $HOST start$program"
}

# Runs the program to its end, on new TPUs if necessary, and sets `status` to its exit status.
run_to_end() {
  local running='' killed=0
  run tar -czf "$scratch/drl_jax.tgz" --exclude=__pycache__ \
    drl_jax configs launch pyproject.toml README.md LICENSE
  while true; do
    await_active
    if [ -z "$running" ]; then SECONDS=0; fi
    if [ -n "$running" ] || start; then
      running=1
      on 0 "bash $HOST follow" || true # fails if the connection or the TPU is lost
      status=$(on 0 "bash $HOST status") || status=unknown
    else
      status=255
    fi
    if [ -n "$dry_run" ]; then return; fi
    case $status in
      running | unknown) sleep "$poll" ;; # then check whether the TPU still exists
      *)
        if [ "$status" -lt 128 ]; then return; fi
        if [ "$SECONDS" -ge "$MIN_SECONDS" ]; then killed=0; fi
        running='' killed=$((killed + 1))
        say "the program ended with status $status"
        if [ "$killed" -ge "$MAX_KILLS" ] && [ "$(state)" = ACTIVE ]; then return; fi
        ;;
    esac
  done
}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
case $verb in
  run)
    trap 'say "the program keeps running on the TPU: logs follows it, down deletes the TPU"; exit 130' INT
    run_to_end
    if [ -z "$keep" ]; then queue delete --force; fi
    exit "${status:-0}"
    ;;
  logs) on 0 "bash $HOST follow" ;;
  down) queue delete --force ;;
esac
