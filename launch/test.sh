#!/usr/bin/env bash
# Lint, types and every test. Options are passed to pytest.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python -m pytest --numprocesses=2 --dist=loadfile "$@"
