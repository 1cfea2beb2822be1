#!/usr/bin/env bash
# Trains an energy-based model of handwritten digits, draws samples and measures them.
#
#   bash launch/demo.sh [--workdir=DIR] [OPTION...]
#
# The results are in runs/digits, or in DIR. All other options are those of drl_jax.main, such as
# --config.train.num_steps=500.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
workdir=runs/digits
options=()
for option in "$@"; do
  case $option in
    -h | --help) usage "${BASH_SOURCE[0]}" ;;
    --workdir=?*) workdir=${option#*=} ;;
    *) options+=("$option") ;;
  esac
done
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
.venv/bin/python -m drl_jax.main --config=configs/digits.py --workdir="$workdir" "${options[@]}"
workdir=$(printf %q "$workdir") # as it must be typed
cat <<END

Look at $workdir/samples.png, 100 digits that the model has drawn, and at $workdir/metrics.json.
Commands to try next, in $(printf %q "$PWD"):

  source .venv/bin/activate
  python -m drl_jax.main --mode=inpaint --workdir=$workdir      # complete digits
  python -m drl_jax.main --mode=interpolate --workdir=$workdir  # from one digit to another
  tensorboard --logdir=$workdir                                 # curves of the training
END
