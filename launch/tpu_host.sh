#!/usr/bin/env bash
# What launch/tpu_pod.sh has done on each host of a TPU: install, start FLAGS...,
# follow, status.
#
# The program outlives the connection that started it. job.log has what it says, job.pid and
# job.status who it is and how it ended.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case ${1:-} in
  install)
    # The hosts come with Python 3.10, older than the project's.
    python3 -m pip install --quiet --user uv
    [ -x .venv/bin/python ] || python3 -m uv venv --quiet --python=3.12 .venv
    python3 -m uv pip install --quiet --python=.venv/bin/python --editable '.[tpu]'
    ;;
  start)
    shift
    # The TPU is for one program at a time. One that is told to end saves first.
    if [ -f job.pid ] && kill -TERM -- "-$(cat job.pid)" 2>/dev/null; then
      tail --follow --pid="$(cat job.pid)" /dev/null
    fi
    rm -f job.status
    : >job.log
    # shellcheck disable=SC2016  # expanded in there
    setsid bash -c '
      trap : TERM # only the program ends by it, and its status is kept
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
      echo 137 # killed, with all that ran here
    fi
    ;;
  *)
    echo "error: give install, start FLAGS..., follow or status" >&2
    exit 1
    ;;
esac
