# Sourced by the other scripts: creates a virtual environment in .venv and installs the project.
# Environment variables: PYTHON, the interpreter (default: python3); EXTRA, the optional
# dependencies of pyproject.toml to install (default: test).
# shellcheck shell=bash
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
extra=${EXTRA:-test}
if [ ! -x .venv/bin/python ]; then
  echo "creating .venv" >&2
  run "${PYTHON:-python3}" -m venv .venv
fi
# Installs again only if pyproject.toml has changed since the last installation.
if ! cmp -s pyproject.toml ".venv/installed.$extra.toml"; then
  echo "installing (about a minute)" >&2
  run .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$extra]"
  run cp pyproject.toml ".venv/installed.$extra.toml"
fi
