#!/usr/bin/env bash
# Checks that the project can be installed on all platforms that it supports.
#
#   bash launch/check_install.sh
#
# Resolves the dependencies in pyproject.toml for every platform and Python version with uv, which
# must be installed (pip install uv), and requires a wheel for all of them except promise, which is
# pure Python. Nothing is installed.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
case ${1:-} in -h | --help) usage "${BASH_SOURCE[0]}" ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
command -v uv >/dev/null || die "uv is not installed: run pip install uv"
failures=0
for platform in x86_64-unknown-linux-gnu aarch64-unknown-linux-gnu aarch64-apple-darwin \
  x86_64-pc-windows-msvc; do
  for python in 3.11 3.12 3.13 3.14; do
    if uv pip compile pyproject.toml --python-platform "$platform" --python-version "$python" \
      --prerelease disallow --only-binary :all: --no-binary promise --quiet >/dev/null; then
      echo "$platform, Python $python: can be installed"
    else
      echo "$platform, Python $python: CANNOT be installed"
      failures=$((failures + 1))
    fi
  done
done
[ "$failures" = 0 ] || die "$failures of 16 combinations cannot be installed"
