#!/usr/bin/env bash
# Trains on the GPUs of a Slurm cluster, from a folder that all nodes see.
#
#   sbatch launch/slurm_gpu.sh --config=configs/cifar10.py --workdir=/shared/cifar10
#   sbatch --nodes=4 --ntasks-per-node=4 --gpus-per-node=4 launch/slurm_gpu.sh ...
#
# To be submitted from the root of the project; --dry-run, without sbatch, prints what would
# run. Every other option is the program's. 2 minutes before the time limit, or when preempted,
# the run saves; the job is queued again under its number, and goes on.

# A task a GPU, since JAX gives a task of Slurm the one GPU whose number is its SLURM_LOCALID.
#SBATCH --job-name=drl_jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=drl_jax-%j.log
set -euo pipefail
# Slurm runs a copy of this file, from elsewhere.
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
if [ ! -f launch/common.sh ]; then
  echo "error: $PWD is not the project: submit from the root of it" >&2
  exit 1
fi
. launch/common.sh
dry_run=
workdir=
flags=()
for flag in "$@"; do
  case $flag in
    -h | --help) usage launch/slurm_gpu.sh ;;
    --dry-run) dry_run=1 ;;
    --workdir=?*) workdir=${flag#*=} flags+=("$flag") ;;
    --*) flags+=("$flag") ;;
    *) die "unexpected argument '$flag': every option is --name=value" ;;
  esac
done
[ -n "$workdir" ] || die "no --workdir: give a folder that all nodes see, or a bucket"
[ -n "$dry_run" ] || [ -n "${SLURM_JOB_ID:-}" ] ||
  die "this is no job of Slurm: sbatch launch/slurm_gpu.sh ..."
tasks=${SLURM_NTASKS_PER_NODE:-8}
gpus=${SLURM_GPUS_PER_NODE:-8} # or as in a100:8
[ "$tasks" = "${gpus##*:}" ] ||
  die "--ntasks-per-node=$tasks and --gpus-per-node=$gpus: give the same number"

export EXTRA=cuda
. launch/setup.sh
# A GPU's number means something only where every task is shown all GPUs of its node. Slurm is
# not to kill the tasks that another one has left: they end by themselves, and may be saving.
status=0
run srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-8}" --gpu-bind=none --kill-on-bad-exit=0 \
  .venv/bin/python -m drl_jax.main "${flags[@]}" || status=$?
# Saved before the time limit. (A job that Slurm preempts it queues again by itself.)
[ "$status" != 143 ] || run scontrol requeue "$SLURM_JOB_ID"
exit "$status"
