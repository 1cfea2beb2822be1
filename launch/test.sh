#!/usr/bin/env bash
# Runs the linters, the type checker and the tests.
#
#   bash launch/test.sh [--fast] [PYTEST_OPTION...]
#
# --fast skips the tests that are marked slow or infrastructure (stand-ins for gcloud, Slurm and
# buckets). All other options are passed to pytest.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# In alphabetical order, so that the few long tests of the notebooks do not come last.
options=(--numprocesses=2 --dist=loadfile --no-loadscope-reorder)
for option in "$@"; do
  case $option in
    -h | --help) usage "${BASH_SOURCE[0]}" ;;
    --fast) options+=(-m 'not slow and not infrastructure') ;;
    *) options+=("$option") ;;
  esac
done
export EXTRA=test
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python -m pytest "${options[@]}"
