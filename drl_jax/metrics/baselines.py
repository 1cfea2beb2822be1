"""Simple densities fitted to vectors or signals, whose log-likelihood a model should exceed."""

import warnings
from typing import Any

import numpy as np
from jaxtyping import Float

from drl_jax.metrics.distances import squared_distances

COMPONENTS = (1, 2, 4, 8, 16)  # of the mixture, from which cross-validation selects
COVARIANCES = ("full", "tied")  # of the mixture: one per component, or one for all
BANDWIDTHS = tuple(
    np.geomspace(0.05, 2, 12).tolist()
)  # likewise, in units of the features' std
FOLDS = 5  # of the cross-validation of the mixture
REGULARISATION = 1e-6  # added to the variances of standardised features
MAX_EXAMPLES = 5000  # training examples that are used; the cost of the bandwidth is quadratic


def log_densities(
    train: Float[np.ndarray, "n *D"], x: Float[np.ndarray, "m *D"]
) -> dict[str, dict[str, Any]]:
    """Returns the mean log-densities of examples under densities fitted to others.

    Features are standardised first, for the regularisation and the bandwidth; the results are
    those of the original features. Settings are selected by the log-likelihood of training
    examples that the fit did not use: those of one of five folds for the mixture, and each
    example in turn for the bandwidth.

    Args:
      train: examples to fit to.
      x: other examples.

    Returns:
      JSON values, by the name of the density, each with log_density and std_error, the mean and
      its standard error over the examples x [nats], and the selected settings:
        gaussian: a Gaussian with full covariance, of maximum likelihood. Without at least as
          many examples as features, its covariance is singular but for `REGULARISATION`.
        mixture: a mixture of Gaussians, fitted by EM, with components (of `COMPONENTS`, at most
          4/5 of n) and covariance (of `COVARIANCES`).
        kernel: a kernel density estimate with Gaussian kernels, with bandwidth (of
          `BANDWIDTHS`), in standard deviations of the features.
    """
    train, x = (
        np.asarray(values, np.float64).reshape(len(values), -1) for values in (train, x)
    )
    mean, std = train.mean(axis=0), train.std(axis=0)
    std = np.where(std > 0, std, 1.0)
    train, x = (train - mean) / std, (x - mean) / std
    log_volume = float(np.sum(np.log(std)))

    def result(log_density: Float[np.ndarray, "m"], **settings: Any) -> dict[str, Any]:
        error = float(np.std(log_density)) / np.sqrt(len(log_density))
        value = float(np.mean(log_density)) - log_volume
        return {"log_density": value, "std_error": float(error)} | settings

    K, covariance = _best_mixture(train)
    bandwidth = best_bandwidth(train)
    return {
        "gaussian": result(_mixture(train, 1, "full").score_samples(x)),
        "mixture": result(
            _mixture(train, K, covariance).score_samples(x), components=K, covariance=covariance
        ),
        "kernel": result(kernel_log_density(train, x, bandwidth), bandwidth=bandwidth),
    }


def _mixture(x: Float[np.ndarray, "n D"], K: int, covariance: str) -> Any:
    """Returns a mixture of K Gaussians that EM fits to vectors, as scikit-learn's object."""
    from sklearn.exceptions import ConvergenceWarning  # slow to import
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(
        K, covariance_type=covariance, reg_covar=REGULARISATION, random_state=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return mixture.fit(x)


def _best_mixture(x: Float[np.ndarray, "n D"]) -> tuple[int, str]:
    """Returns the number of components and the covariance that cross-validation selects."""
    fold = np.random.default_rng(0).permutation(len(x)) % FOLDS
    candidates = [
        (K, covariance)
        for K in COMPONENTS
        for covariance in COVARIANCES
        if np.sum(fold > 0) >= K and (K > 1 or covariance == "full")
    ]

    def score(K: int, covariance: str) -> float:
        held_out = [
            _mixture(x[fold != i], K, covariance).score_samples(x[fold == i])
            for i in range(FOLDS)
        ]
        return float(np.mean(np.concatenate(held_out)))

    return max(candidates, key=lambda candidate: score(*candidate))


def best_bandwidth(x: Float[np.ndarray, "n D"]) -> float:
    """Returns the bandwidth with the highest log-likelihood of each vector given the others."""
    scores = [np.mean(values) for values in _kernel_log_densities(x, x, BANDWIDTHS, True)]
    return BANDWIDTHS[int(np.argmax(scores))]


def kernel_log_density(
    centres: Float[np.ndarray, "n D"], x: Float[np.ndarray, "m D"], bandwidth: float
) -> Float[np.ndarray, "m"]:
    """Returns the log-density of vectors under a kernel density estimate [nats].

        log mean_i N(x; centre_i, bandwidth² I)

    Args:
      centres: vectors on which the kernels are centred.
      x: vectors.
      bandwidth: standard deviation of the kernels.
    """
    (values,) = _kernel_log_densities(centres, x, (bandwidth,))
    return values


def _kernel_log_densities(
    centres: Float[np.ndarray, "n D"],
    x: Float[np.ndarray, "m D"],
    bandwidths: tuple[float, ...],
    leave_one_out: bool = False,
) -> Float[np.ndarray, "H m"]:
    """Returns `kernel_log_density` for several bandwidths.

    Args:
      centres: vectors on which the kernels are centred.
      x: vectors.
      bandwidths: standard deviations of the kernels.
      leave_one_out: whether x_i gets no kernel of its own; x must be the centres.
    """
    found, start = [], 0
    for squares in squared_distances(x, centres):
        if leave_one_out:
            rows = np.arange(len(squares))
            squares[rows, start + rows] = np.inf
            start += len(squares)
        nearest = squares.min(axis=1, keepdims=True)
        sums = [np.exp((nearest - squares) / (2 * h**2)).sum(axis=1) for h in bandwidths]
        found.append(np.log(sums) - nearest[:, 0] / (2 * np.square(bandwidths)[:, None]))
    h = np.array(bandwidths)[:, None]
    count = len(centres) - leave_one_out
    normaliser = x.shape[1] * (np.log(2 * np.pi) / 2 + np.log(h)) + np.log(count)
    return np.concatenate(found, axis=1) - normaliser
