#!/usr/bin/env bash
# Runs drl_jax on the GPUs of a Slurm cluster.
#
#   sbatch launch/slurm_gpu.sh --config=configs/cifar10.py --workdir=/shared/cifar10
#   sbatch --nodes=4 --ntasks-per-node=4 --gpus-per-node=4 launch/slurm_gpu.sh ...
#
# Submit it from the root of the project, which must be in a folder that all nodes share. Run with
# bash and --dry-run, it prints the commands instead of running them. All other options are those
# of drl_jax.main. Two minutes before the time limit, or when the job is preempted, the run saves
# a checkpoint; the job is then queued again under the same number, and resumes.

# One task per GPU: JAX assigns each Slurm task the GPU with the number SLURM_LOCALID.
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
# Slurm runs a copy of this file in another folder.
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
if [ ! -f launch/common.sh ]; then
  echo "error: $PWD is not the root of the project: submit the job from there" >&2
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
[ -n "$workdir" ] || die "no --workdir: give a folder that all nodes share, or a bucket"
[ -n "$dry_run" ] || [ -n "${SLURM_JOB_ID:-}" ] ||
  die "not in a Slurm job: submit it with sbatch launch/slurm_gpu.sh ..."
tasks=${SLURM_NTASKS_PER_NODE:-8}
gpus=${SLURM_GPUS_PER_NODE:-8} # may include the type, as in a100:8
[ "$tasks" = "${gpus##*:}" ] ||
  die "--ntasks-per-node=$tasks and --gpus-per-node=$gpus: give the same number"

export EXTRA=cuda
. launch/setup.sh
# --gpu-bind=none, because every task must see all GPUs of its node, from which JAX selects one.
# --kill-on-bad-exit=0, because a task may still be saving when another one has ended; Slurm need
# not end the others, since JAX's runtime does that if a task is lost.
status=0
run srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-8}" --gpu-bind=none --kill-on-bad-exit=0 \
  .venv/bin/python -m drl_jax.main "${flags[@]}" || status=$?
# 143 (SIGTERM): the run was stopped and saved before the time limit, so it is queued again here.
# Slurm itself queues preempted jobs again.
[ "$status" != 143 ] || run scontrol requeue "$SLURM_JOB_ID"
exit "$status"
