"""Fréchet distance on raw pixels: needs no feature network."""

from typing import Any

import numpy as np
from jaxtyping import Float

from drl_jax.metrics import frechet


def pixel_metrics(
    samples: Float[np.ndarray, "n H W C"], data: Float[np.ndarray, "m H W C"]
) -> dict[str, Any]:
    """Returns the Fréchet distance on pixels in [-1, 1], with numbers to compare it with.

    These are the distance between two random halves of the data, which is what a perfect model
    would reach with as many samples as half the data, and the range of the samples' pixels.
    """
    samples_flat, data_flat = samples.reshape(len(samples), -1), data.reshape(len(data), -1)
    return {
        "pixel_frechet": frechet.frechet_distance(
            frechet.fit(samples_flat), frechet.fit(data_flat)
        ),
        "pixel_frechet_of_data_halves": frechet.split_half_distance(data_flat),
        "pixel_min": float(samples.min()),
        "pixel_max": float(samples.max()),
        "num_samples": len(samples),
        "num_data": len(data),
    }
