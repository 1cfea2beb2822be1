"""Standardisation of examples: each feature minus its mean, divided by its standard deviation.

The noise levels suit data with mean 0 and standard deviation 1. The mean and the deviation are
estimated from the training examples (`fit`) and kept among the parameters of the networks,
under `NAME`, so every checkpoint has them. Models without them use the data as they are.

A standardised density is that of other units: log p(x) = log p(z) - Σ log std for
z = (x - mean) / std, with one term per value of an example (`log_volume`).
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Num

from drl_jax.errors import UserError

NAME = "standardisation"  # among the parameters; training does not change it


class Standardisation(NamedTuple):
    """An affine map of the last axis of examples: features, or channels of a signal or volume.

    Attributes:
      mean: mean of each feature, or 0 for all.
      std: standard deviation of each feature, or 1 for all.
    """

    mean: Float[Array | np.ndarray, "*C"]
    std: Float[Array | np.ndarray, "*C"]

    def apply(self, x: Any) -> Any:
        """Returns z = (x - mean) / std."""
        return x if self.is_identity else (x - self.mean) / self.std

    def invert(self, z: Any) -> Any:
        """Returns x = mean + std z."""
        return z if self.is_identity else self.mean + self.std * z

    @property
    def is_identity(self) -> bool:
        """Whether examples are used as they are."""
        return not self.std.shape

    def log_volume(self, shape: tuple[int, ...]) -> float:
        """Returns Σ log std over the values of an example of this shape [nats]."""
        if self.is_identity:
            return 0.0
        return math.prod(shape[:-1]) * float(np.sum(np.log(np.asarray(self.std, np.float64))))


IDENTITY = Standardisation(np.zeros((), np.float32), np.ones((), np.float32))


def unfitted(C: int) -> Standardisation:
    """Returns the standardisation of C features before `fit`: mean 0, standard deviation 1."""
    return Standardisation(np.zeros(C, np.float32), np.ones(C, np.float32))


def of(params: Mapping[str, Any]) -> Standardisation:
    """Returns the standardisation among parameters, in host memory; without one, `IDENTITY`."""
    if NAME not in params:
        return IDENTITY
    return Standardisation(
        **{
            field: value if isinstance(value, jax.core.Tracer) else np.asarray(value)
            for field, value in params[NAME].items()
        }
    )


def with_standardisation(
    params: Mapping[str, Any], standardisation: Standardisation
) -> dict[str, Any]:
    """Returns the parameters with another standardisation."""
    return {**params, NAME: standardisation._asdict()}


def fit(batches: Iterable[Num[np.ndarray, "_ *D"]]) -> Standardisation:
    """Estimates mean and standard deviation of each feature, in one pass over the examples.

    Args:
      batches: examples, of which one batch is in memory at a time.

    Raises:
      UserError: if a feature is constant.
    """
    n, origin, total, squares = 0, None, np.float64(0), np.float64(0)
    for batch in batches:
        rows = np.asarray(batch, np.float64).reshape(-1, batch.shape[-1])
        origin = rows[0] if origin is None else origin  # so that a large mean loses no digits
        n, shifted = n + len(rows), rows - origin
        total, squares = total + shifted.sum(axis=0), squares + np.square(shifted).sum(axis=0)
    assert origin is not None, "there are no examples"
    mean = total / n
    std = np.sqrt(np.maximum(squares / n - np.square(mean), 0))
    constant = np.flatnonzero(std == 0)
    if constant.size:
        index = int(constant[0])
        raise UserError(
            f"feature {index} of the training examples is constant ({origin[index]:g}), and a "
            "constant cannot be standardised: remove it"
        )
    return Standardisation((origin + mean).astype(np.float32), std.astype(np.float32))
