#!/usr/bin/env bash
# Trains an energy-based model of handwritten digits, draws samples and evaluates them.
# Passes its options to drl_jax.main, such as --workdir=DIR or --config.train.num_steps=500.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
.venv/bin/python -m drl_jax.main --config=configs/digits.py "$@"
