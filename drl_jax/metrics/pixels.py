"""Fréchet distance between sets of images as vectors of pixels, without a feature network."""

from typing import Any

import numpy as np
from jaxtyping import Float

from drl_jax.metrics import frechet

FAR = 1.5  # a pixel beyond ±FAR is far outside [-1, 1]


def pixel_metrics(
    samples: Float[np.ndarray, "n H W C"], data: Float[np.ndarray, "m H W C"]
) -> dict[str, Any]:
    """Returns the Fréchet distance between samples and data, with values to compare it with.

    Args:
      samples: images drawn from a model.
      data: images in [-1, 1].

    Returns:
      JSON values:
        pixel_frechet: squared Fréchet distance between samples and data.
        pixel_frechet_of_data_halves: the same between two random halves of the data. A perfect
          model has about this distance if both sets have half as many images as the data.
        pixel_min, pixel_max: range of the samples' pixels.
        num_outside: number of samples with a pixel below -`FAR` or above `FAR`.
        num_samples, num_data: numbers of images.
    """
    samples_flat, data_flat = samples.reshape(len(samples), -1), data.reshape(len(data), -1)
    return {
        "pixel_frechet": frechet.frechet_distance(
            frechet.fit(samples_flat), frechet.fit(data_flat)
        ),
        "pixel_frechet_of_data_halves": frechet.split_half_distance(data_flat),
        "pixel_min": float(samples.min()),
        "pixel_max": float(samples.max()),
        "num_outside": int(np.sum(np.abs(samples_flat).max(axis=1) > FAR)),
        "num_samples": len(samples),
        "num_data": len(data),
    }
