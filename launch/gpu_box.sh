#!/usr/bin/env bash
# Runs drl_jax on all NVIDIA GPUs of this machine.
#
#   bash launch/gpu_box.sh [--dry-run] --config=configs/cifar10.py --workdir=runs/cifar10
#
# Installs the project with JAX for CUDA into .venv if necessary. --dry-run prints the commands
# instead of running them; all other options are those of drl_jax.main. Ctrl-C or SIGTERM saves
# a checkpoint before the program exits, and the same command resumes from it.
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
[ ${#flags[@]} -gt 0 ] || die "nothing to run: give --config=FILE, or --mode=MODE and --workdir=DIR"

run nvidia-smi --list-gpus 2>/dev/null ||
  die "no NVIDIA GPU found (nvidia-smi --list-gpus failed): install its driver, or use launch/demo.sh"
export EXTRA=cuda
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
# JAX uses all GPUs from one process. exec, so that the process receives signals directly.
run exec .venv/bin/python -m drl_jax.main "${flags[@]}"
