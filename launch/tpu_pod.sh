#!/usr/bin/env bash
# Runs the program on a Cloud TPU, of one host or a pod of many, to its end.
#
#   bash launch/tpu_pod.sh run --zone=us-west4-a --type=v5litepod-16 --spot -- \
#     --config=configs/cifar10.py --workdir=gs://bucket/cifar10
#   bash launch/tpu_pod.sh logs --zone=us-west4-a    # follow what runs there
#   bash launch/tpu_pod.sh down --zone=us-west4-a    # delete it
#
# run   asks for the TPU as a queued resource, or takes the one of that name, waits for it,
#       installs this folder on every host, starts the program on all of them, and follows the
#       first one's log. A TPU that was preempted is asked for again and the program, started
#       again, goes on from its newest checkpoint. At the end the TPU is deleted. Ctrl-C leaves
#       everything running; the same command saves, installs again and goes on.
#
# --zone=ZONE        of the TPU
# --type=TYPE        such as v5litepod-8, v5p-32, v6e-16 or v4-32
# --name=NAME        of the queued resource and its node (drl-jax)
# --project=PROJECT  (gcloud's own)
# --runtime=VERSION  of the hosts' software (as the type needs it)
# --spot             cheaper, and may be preempted
# --keep             do not delete the TPU at the end
# --poll=SECONDS     between two looks at the queue (30)
# --dry-run          print the commands, and run none
#
# What follows -- is the program's, and its --workdir a bucket. The exit status is that of the
# program on the first host. One that was killed is started again, unless that happens
# three times within the hour; a user's mistake is not.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

CRASHES=3   # in a row on one TPU, after which it is given up,
LASTED=3600 # if the program ran for less than that [seconds]
HOST=drl_jax/launch/tpu_host.sh

say() { echo "$(date +%H:%M:%S) $*" >&2; }

[ $# -gt 0 ] || die "nothing to do: give run, logs or down (--help has more)"
verb=$1
shift
case $verb in
  run | logs | down) ;;
  -h | --help) usage "${BASH_SOURCE[0]}" ;;
  *) die "'$verb' is none of run, logs, down (--help has more)" ;;
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
    *) die "'$1' is no option of $verb (--help has them; the program's go after --)" ;;
  esac
  shift
done
[ -n "$zone" ] || die "no --zone: give the TPU's, such as --zone=us-west4-a"
where+=(--zone="$zone")
if [ "$verb" = run ]; then
  [ -n "$type" ] || die "no --type: give the TPU's, such as --type=v5litepod-8"
  [ -n "$runtime" ] || case $type in
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v[234]-*) runtime=tpu-ubuntu2204-base ;;
    *) die "--type=$type is not known here: give its --runtime too" ;;
  esac
  workdir=''
  for flag in "$@"; do
    case $flag in --workdir=*) workdir=${flag#*=} ;; esac
  done
  [[ $workdir == gs://?* ]] ||
    die "the --workdir after -- is '$workdir': give a bucket, which outlives the TPU, --workdir=gs://BUCKET/RUN"
  shift # the --
  program=$(printf ' %q' "$@")
fi

[ -n "$dry_run" ] || command -v gcloud >/dev/null ||
  die "there is no gcloud here: install the Google Cloud CLI"

queue() { run gcloud compute tpus queued-resources "$1" "$name" "${where[@]}" "${@:2}"; }

# Runs a command line on the hosts that $1 says: all, or one's number.
on() { run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="$1" --command="$2"; }

# Prints the state of the queued resource; nothing where there is none.
state() {
  for _ in 1 2 3 4 5; do
    if queue describe --format='value(state.state)' 2>"$scratch/said"; then return; fi
    if grep -q NOT_FOUND "$scratch/said"; then return; fi
    sleep "$poll"
  done
  die "gcloud does not say how $name is: $(tail -n 1 "$scratch/said")"
}

# Returns when the TPU is there, having asked for it where that is needed.
await_active() {
  local now before='' asked=''
  while true; do
    now=$(state)
    if [ "$now" != "$before" ]; then say "$name: ${now:-not there}"; fi
    before=$now
    case $now in
      ACTIVE) return ;;
      '')
        local request=(--node-id="$name" --accelerator-type="$type" --runtime-version="$runtime")
        if [ -n "$spot" ]; then request+=(--spot); fi
        queue create "${request[@]}"
        asked=1 running='' crashes=0
        if [ -n "$dry_run" ]; then return; fi
        ;;
      FAILED | SUSPENDED)
        if [ -n "$asked" ] && [ "$now" = FAILED ]; then
          die "the request for $type failed: gcloud compute tpus queued-resources describe $name ${where[*]} says why"
        fi
        queue delete --force
        ;;
      *) sleep "$poll" ;;
    esac
  done
}

# Puts this folder, as it was when the script began, on every host, and the program to work.
start() {
  run gcloud compute tpus tpu-vm scp "$scratch/drl_jax.tgz" "$name:" "${where[@]}" --worker=all &&
    on all "mkdir -p drl_jax && tar -xzf drl_jax.tgz -C drl_jax && bash $HOST install" &&
    on all "bash $HOST start$program"
}

# Sees the program through to its end, on as many TPUs as that takes; sets `status` to its own.
see_through() {
  local running='' crashes=0
  run tar -czf "$scratch/drl_jax.tgz" --exclude=__pycache__ \
    drl_jax configs launch pyproject.toml README.md LICENSE
  while true; do
    await_active
    if [ -z "$running" ]; then SECONDS=0; fi
    if [ -n "$running" ] || start; then
      running=1
      on 0 "bash $HOST follow" || true # or the connection is lost, or the TPU
      status=$(on 0 "bash $HOST status") || status=unknown
    else
      status=255
    fi
    if [ -n "$dry_run" ]; then return; fi
    case $status in
      running | unknown) sleep "$poll" ;; # and see whether the TPU is still there
      *)
        if [ "$status" -lt 128 ]; then return; fi
        if [ "$SECONDS" -ge "$LASTED" ]; then crashes=0; fi
        running='' crashes=$((crashes + 1)) # of a lost TPU they do not count
        say "ended with status $status"
        if [ "$crashes" -ge "$CRASHES" ] && [ "$(state)" = ACTIVE ]; then return; fi
        ;;
    esac
  done
}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
case $verb in
  run)
    trap 'say "the TPU stays, and what runs on it: logs follows it, down deletes it"; exit 130' INT
    see_through
    if [ -z "$keep" ]; then queue delete --force; fi
    exit "${status:-0}"
    ;;
  logs) on 0 "bash $HOST follow" ;;
  down) queue delete --force ;;
esac
