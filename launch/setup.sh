# Sourced by the other scripts: creates a virtual environment in .venv and installs the project.
# Environment variables: PYTHON, the interpreter (default: python3); EXTRA, the optional
# dependencies of pyproject.toml to install (default: none).
# shellcheck shell=bash
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
extra=${EXTRA:-}
if [ ! -x .venv/bin/python ]; then
  echo "creating .venv" >&2
  run "${PYTHON:-python3}" -m venv .venv
fi
# Installs again only if pyproject.toml has changed since the last installation.
installed=.venv/installed${extra:+.$extra}.toml
if ! cmp -s pyproject.toml "$installed"; then
  echo "installing (about a minute)" >&2
  run .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extra:+[$extra]}"
  run cp pyproject.toml "$installed"
fi
