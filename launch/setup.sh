# Sourced by the other scripts: a virtual environment with the project and its tests' tools.
# PYTHON names the interpreter that makes it (default: python3).
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
if [ ! -x .venv/bin/python ]; then
  echo "making .venv"
  "${PYTHON:-python3}" -m venv .venv
fi
# Installing again is needed only when pyproject.toml has changed since.
if ! cmp -s pyproject.toml .venv/installed.toml; then
  echo "installing (a minute or so)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
  cp pyproject.toml .venv/installed.toml
fi
