"""Runs the command line by `python -m drl_jax`."""

import sys

from drl_jax.main import main

if __name__ == "__main__":
    sys.exit(main())
