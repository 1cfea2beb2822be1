# Sourced by the other scripts: a virtual environment with the project and an extra of it.
# PYTHON names the interpreter that makes it (default: python3), EXTRA what is installed
# besides (default: test).
# shellcheck shell=bash
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
extra=${EXTRA:-test}
if [ ! -x .venv/bin/python ]; then
  echo "making .venv" >&2
  run "${PYTHON:-python3}" -m venv .venv
fi
# Installing again is needed only when pyproject.toml has changed since.
if ! cmp -s pyproject.toml ".venv/installed.$extra.toml"; then
  echo "installing (a minute or so)" >&2
  run .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$extra]"
  run cp pyproject.toml ".venv/installed.$extra.toml"
fi
