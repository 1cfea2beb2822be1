#!/usr/bin/env bash
# Runs the program on one machine with NVIDIA GPUs, all of them.
#
#   bash launch/gpu_box.sh [--dry-run] --config=configs/cifar10.py --workdir=runs/cifar10
#
# Makes .venv with CUDA's JAX if there is none. Every other option is the program's. Ctrl-C or
# SIGTERM saves first; the same command goes on from there.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
dry_run=
flags=()
for flag in "$@"; do
  case $flag in
    -h | --help) usage "${BASH_SOURCE[0]}" ;;
    --dry-run) dry_run=1 ;;
    --*) flags+=("$flag") ;;
    *) die "unexpected argument '$flag': every option is --name=value" ;;
  esac
done
[ ${#flags[@]} -gt 0 ] || die "nothing to run: give --config=FILE, or --mode and --workdir"

run nvidia-smi --list-gpus 2>/dev/null ||
  die "no NVIDIA GPU here (nvidia-smi --list-gpus fails): install its driver, or use launch/demo.sh"
export EXTRA=cuda
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
# One process is enough, since JAX sees every GPU; by exec, signals reach it.
run exec .venv/bin/python -m drl_jax.main "${flags[@]}"
