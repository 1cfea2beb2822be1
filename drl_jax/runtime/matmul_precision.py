"""The precision of matrix products and convolutions on accelerators."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax

R = TypeVar("R")


def full_precision(program: Callable[..., R]) -> Callable[..., R]:
    """Returns the program with all products of float32 numbers computed in float32.

    By default, TPUs round the factors to bfloat16 (8 bits of precision) and recent GPUs to
    TF32 (11 bits). CPUs always compute in float32 (24 bits).

    Apply it inside `jax.jit`, as `jax.jit(full_precision(program))`: the precision is then set
    whenever the program is traced, and also applies to the gradients that the program computes.
    """

    @functools.wraps(program)
    def traced(*args: Any, **kwargs: Any) -> R:
        with jax.default_matmul_precision("highest"):
            return program(*args, **kwargs)

    return traced
