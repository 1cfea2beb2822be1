"""How well samples of a posterior restore images or other examples: errors, and calibration.

Images are in [-1, 1].
"""

import numpy as np
import scipy.ndimage
from jaxtyping import Float

INTERVALS = 0.5, 0.9, 0.95  # probability of the central intervals whose coverage is measured
WINDOW = 7  # side of the window of `ssim` [pixels]
RANGE = 2.0  # of pixel values


def psnr(
    x: Float[np.ndarray, "*#n H W C"], truth: Float[np.ndarray, "*#n H W C"]
) -> np.ndarray:
    """Returns the peak signal-to-noise ratio of each image [dB]: 10 log10(range² / MSE)."""
    squares = np.mean((np.asarray(x, np.float64) - truth) ** 2, axis=(-3, -2, -1))
    return 20 * np.log10(RANGE) - 10 * np.log10(squares)


def ssim(
    x: Float[np.ndarray, "*#n H W C"], truth: Float[np.ndarray, "*#n H W C"]
) -> np.ndarray:
    """Returns the structural similarity of each image, at most 1 (Wang et al. 2004, eq. 13).

    Windows are squares of 7x7 pixels with equal weights, with unbiased covariances, as in
    scikit-image. Only windows inside of the image count. Smaller images have smaller windows.
    """
    x, truth = np.broadcast_arrays(np.asarray(x, np.float64), truth)
    sides = tuple(min(WINDOW, side) for side in x.shape[-3:-1])
    size = (*(1,) * (x.ndim - 3), *sides, 1)

    def mean(values):
        inside = tuple(
            slice(side // 2, n - (side - 1) // 2)
            for side, n in zip(sides, x.shape[-3:-1], strict=True)
        )
        return scipy.ndimage.uniform_filter(values, size)[..., *inside, :]

    unbiased = np.prod(sides) / (np.prod(sides) - 1)
    mean_x, mean_t = mean(x), mean(truth)
    var_x, var_t, covariance = (
        unbiased * (mean(a * b) - mean(a) * mean(b))
        for a, b in ((x, x), (truth, truth), (x, truth))
    )
    c1, c2 = (0.01 * RANGE) ** 2, (0.03 * RANGE) ** 2
    ratio = (2 * mean_x * mean_t + c1) * (2 * covariance + c2)
    ratio /= (mean_x**2 + mean_t**2 + c1) * (var_x + var_t + c2)
    return ratio.mean(axis=(-3, -2, -1))


def coverage(
    samples: Float[np.ndarray, "n k *D"], truth: Float[np.ndarray, "n *D"]
) -> dict[str, float]:
    """Returns the share of pixels whose true value lies in a central interval of the samples.

    The keys are the probabilities `INTERVALS`. For a calibrated posterior, the rank of the true
    value among k samples is uniform. It counts as far as its share of [0, 1], from
    rank / (k + 1) to (rank + 1) / (k + 1), lies in the interval, so that the expected coverage
    is the probability for any k. A tie counts as half a rank.
    """
    k = samples.shape[1]
    below = np.sum(samples < truth[:, None], axis=1)
    rank = below + np.sum(samples == truth[:, None], axis=1) / 2

    def share(p):
        first = np.maximum(rank, (1 - p) / 2 * (k + 1))
        last = np.minimum(rank + 1, (1 + p) / 2 * (k + 1))
        return float(np.mean(np.maximum(last - first, 0)))

    return {f"{p:g}": share(p) for p in INTERVALS}


def report(
    samples: Float[np.ndarray, "n k *D"], truth: Float[np.ndarray, "n *D"]
) -> dict[str, object]:
    """Returns PSNR and SSIM of the samples and of their mean, and the coverage.

    Of examples that are not images, it returns root mean square errors instead of PSNR and
    SSIM.
    """
    mean = samples.mean(axis=1)
    if truth.ndim != 4:
        errors = mean - truth, samples - truth[:, None]
        of_mean, of_samples = (float(np.sqrt(np.mean(np.square(e)))) for e in errors)
        return {
            "rmse_of_mean": of_mean,
            "rmse_of_samples": of_samples,
            "coverage": coverage(samples, truth),
        }
    return {
        "psnr_of_mean": float(np.mean(psnr(mean, truth))),
        "psnr_of_samples": float(np.mean(psnr(samples, truth[:, None]))),
        "ssim_of_mean": float(np.mean(ssim(mean, truth))),
        "ssim_of_samples": float(np.mean(ssim(samples, truth[:, None]))),
        "coverage": coverage(samples, truth),
    }
