"""Checks the package's annotations (shapes, dtypes, types) in every call that a test makes."""

import jax
import jaxtyping
import numpy as np
from beartype import BeartypeConf, beartype

# An int is accepted where a float is annotated, as static type checkers do (PEP 484).
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def install():
    """Checks all functions of the package that are imported from now on."""
    # Tests pass numpy arrays where JAX would convert them; their shapes are checked too.
    jaxtyping.Array = jax.Array | np.ndarray
    jaxtyping.install_import_hook("drl_jax", "helpers.typechecking.check")


def check(fn):
    """Returns a function that checks its arguments and its result."""
    # Constructors are not checked: JAX also calls those of dataclasses with leaves that stand
    # for arrays, such as shardings.
    return fn if fn.__qualname__.endswith(".__init__") else _check(fn)
