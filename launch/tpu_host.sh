#!/usr/bin/env bash
# launch/tpu_pod.sh runs this script on each host of a TPU.
#
#   tpu_host.sh install         # install the project for TPUs
#   tpu_host.sh start FLAGS...  # stop a running drl_jax.main, if any, then start a new one
#   tpu_host.sh follow          # print its log until it ends
#   tpu_host.sh status          # print its exit status, or "running"
#
# The program keeps running when the connection that started it closes. Its output goes to
# job.log, its process ID to job.pid and its exit status to job.status.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case ${1:-} in
  install)
    # The hosts have Python 3.10, which is too old for the project.
    python3 -m pip install --quiet --user uv
    [ -x .venv/bin/python ] || python3 -m uv venv --quiet --python=3.12 .venv
    python3 -m uv pip install --quiet --python=.venv/bin/python --editable '.[tpu,tensorflow]'
    ;;
  start)
    shift
    # Only one program at a time can use the TPU. On SIGTERM, a running one saves a checkpoint
    # before it ends.
    if [ -f job.pid ] && kill -TERM -- "-$(cat job.pid)" 2>/dev/null; then
      tail --follow --pid="$(cat job.pid)" /dev/null
    fi
    rm -f job.status
    : >job.log
    # shellcheck disable=SC2016  # expanded by the inner shell
    setsid bash -c '
      trap : TERM # SIGTERM ends the program but not this shell, which writes the status
      .venv/bin/python -m drl_jax.main --distributed "$@" >>job.log 2>&1
      echo "$?" >job.status
    ' job "$@" </dev/null >/dev/null 2>&1 &
    echo "$!" >job.pid
    ;;
  follow) tail --lines=100 --follow --pid="$(cat job.pid)" job.log ;;
  status)
    if [ -f job.status ]; then
      cat job.status
    elif kill -0 "$(cat job.pid)" 2>/dev/null; then
      echo running
    else
      echo 137 # there is no status: everything was killed, for example by a restart of the host
    fi
    ;;
  *)
    echo "error: unknown command '${1:-}': give install, start FLAGS..., follow or status" >&2
    exit 1
    ;;
esac
