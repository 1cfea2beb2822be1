"""Mixtures of Gaussians, and shapes in the plane made of them: data with known densities.

Adding noise to a Gaussian mixture, scaling it, or conditioning it on a noisy observation
gives another Gaussian mixture. Each noise level's marginal, conditional and score therefore
has a closed form, and so has the exact F, which is a normalised log-density: its log Z is 0.

Shapes in the plane are mixtures, too. The components of curved shapes, such as rings and moons,
overlap so much that their outlines are smooth. `fit` finds a mixture that describes given data.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from drl_jax import noise
from drl_jax.diffusion import NoiseSchedule
from drl_jax.recovery import LevelFn

SMALLEST_VARIANCE = 1e-2  # of a fitted mixture, for pixels in [-1, 1]


class Mixture(NamedTuple):
    """The density Σ_k w_k N(m_k, U_k diag(v_k) U_kᵀ).

    All arrays except `axes` can have a leading batch axis: one density per example.

    Attributes:
      log_weights: log w_k, with Σ_k w_k = 1.
      means: m_k.
      variances: v_k, the variances along the principal axes.
      axes: U_k, orthonormal; its columns are the principal axes.
    """

    log_weights: Float[Array, "*B K"]
    means: Float[Array, "*B K D"]
    variances: Float[Array, "*B K D"]
    axes: Float[Array, "K D D"]

    def sample(self, keys: Key[Array, "B"]) -> Float[Array, "B D"]:
        """Draws one point per key."""
        batch_axis = 0 if self.means.ndim == 3 else None  # None: one density for all keys
        select = jax.vmap(lambda values, k: values[k], (batch_axis, 0))
        categorical = jax.vmap(jax.random.categorical, (0, batch_axis))
        k = categorical(noise.fold(keys, 0), self.log_weights)
        z = noise.normal(noise.fold(keys, 1), self.means.shape[-1:])
        z = jnp.sqrt(select(self.variances, k)) * z
        return select(self.means, k) + jnp.einsum("bij,bj->bi", self.axes[k], z)

    def log_density(self, x: Float[Array, "B D"]) -> Float[Array, "B"]:
        """Returns log p(x) in nats."""
        return jax.nn.logsumexp(self._log_joint(x), axis=1)

    def score(self, x: Float[Array, "B D"]) -> Float[Array, "B D"]:
        """Returns ∇ log p(x) = Σ_k p(k | x) C_k^-1 (m_k - x), C_k the covariances."""
        scores = -self._project(x) / self.variances  # of the components, along their axes
        responsibilities = jax.nn.softmax(self._log_joint(x), axis=1)
        return jnp.einsum("bk,kij,bkj->bi", responsibilities, self.axes, scores)

    def diffused(
        self, a: Float[Array, "*B"] | float, sigma: Float[Array, "*B"] | float
    ) -> "Mixture":
        """Returns the density of a x + sigma eps, eps ~ N(0, I).

        Arrays a and sigma [B] give one density per element.
        """
        a, sigma = jnp.asarray(a)[..., None, None], jnp.asarray(sigma)[..., None, None]
        variances = a**2 * self.variances + sigma**2
        log_weights = jnp.broadcast_to(self.log_weights, variances.shape[:-1])
        return Mixture(
            log_weights=log_weights, means=a * self.means, variances=variances, axes=self.axes
        )

    def posterior(
        self,
        x_tilde: Float[Array, "B D"],
        sigma: Float[Array, "B"] | Float[Array, ""] | float,
    ) -> "Mixture":
        """Returns the density of y given x_tilde = y + sigma eps, one per x_tilde.

        Component k has precision 1 / v_k + 1 / sigma² along each of its axes, and its weight
        is multiplied by the likelihood N(x_tilde; m_k, C_k + sigma² I). For infinite sigma
        the posterior is the prior.
        """
        precision = jnp.broadcast_to(1 / jnp.asarray(sigma) ** 2, len(x_tilde))[:, None, None]
        shrinkage = 1 / (1 + self.variances * precision)
        residual = self._project(x_tilde)
        # log N(x_tilde; m_k, C_k + sigma² I), up to a constant that all components share.
        log_likelihood = (
            jnp.sum(jnp.log(shrinkage) - residual**2 * precision * shrinkage, axis=-1) / 2
        )
        variances = self.variances * shrinkage
        shift = jnp.einsum("kij,bkj->bki", self.axes, variances * precision * residual)
        log_weights = jax.nn.log_softmax(self.log_weights + log_likelihood, axis=1)
        return Mixture(
            log_weights=log_weights,
            means=self.means + shift,
            variances=variances,
            axes=self.axes,
        )

    def mean_and_covariance(self) -> tuple[Float[Array, "D"], Float[Array, "D D"]]:
        """Returns the mean and the covariance matrix of the mixture."""
        w = jnp.exp(self.log_weights)
        mean = w @ self.means
        offsets = self.means - mean
        within = jnp.einsum("k,kij,kj,klj->il", w, self.axes, self.variances, self.axes)
        return mean, within + jnp.einsum("k,ki,kj->ij", w, offsets, offsets)

    def _project(self, x: Float[Array, "B D"]) -> Float[Array, "B K D"]:
        """Returns U_kᵀ (x - m_k)."""
        return jnp.einsum("kij,bki->bkj", self.axes, x[:, None, :] - self.means)

    def _log_joint(self, x: Float[Array, "B D"]) -> Float[Array, "B K"]:
        """Returns log p(x, k)."""
        squares = jnp.square(self._project(x)) / self.variances
        log_normaliser = jnp.sum(jnp.log(2 * jnp.pi * self.variances), axis=-1) / 2
        return self.log_weights - jnp.sum(squares, axis=-1) / 2 - log_normaliser


def marginal(
    data: Mixture, t: Int[Array, "*B"] | int | np.integer, schedule: NoiseSchedule
) -> Mixture:
    """Returns the density q(x_t) of the data at levels t in 0..T, one per element of t."""
    return data.diffused(schedule.a_bar[t], schedule.sigma_bar[t])


def energy_marginal(
    data: Mixture, t: Int[Array, "*B"] | int | np.integer, schedule: NoiseSchedule
) -> Mixture:
    """Returns the density of y_t at t in 0..T-1, whose logarithm F(·, t) learns.

    y_t is a_{t+1} x_t, and x_t at t = T-1 (`NoiseSchedule.y_scale`).
    """
    a = schedule.y_scale(jnp.asarray(t))
    return data.diffused(a * schedule.a_bar[t], a * schedule.sigma_bar[t])


def conditional(
    data: Mixture,
    x_tilde: Float[Array, "B D"],
    t: Int[Array, "*B"] | int | np.integer,
    schedule: NoiseSchedule,
) -> Mixture:
    """Returns q(y_t | x_{t+1} = x_tilde), t in 0..T-1.

    At the highest level, t = T-1, it is the marginal of y_t.
    """
    t = jnp.asarray(t)
    sigma = jnp.where(t == schedule.T - 1, jnp.inf, schedule.sigma[t + 1])
    return energy_marginal(data, t, schedule).posterior(x_tilde, sigma)


def exact_F(data: Mixture, schedule: NoiseSchedule) -> LevelFn:
    """Returns F(y, t) = log q(y_t = y), the exact energy of every level; its log Z is 0."""
    return lambda y, t: energy_marginal(data, t, schedule).log_density(y)


def isotropic(
    means: Float[np.ndarray, "K D"], std: float, weights: Float[np.ndarray, "K"] | None = None
) -> Mixture:
    """Returns Σ_k w_k N(m_k, std² I), by default with equal weights."""
    K, D = np.shape(means)
    weights = np.full(K, 1 / K) if weights is None else weights
    return mixture(weights, means, np.broadcast_to(std**2 * np.eye(D), (K, D, D)))


def gaussian(mean: Float[np.ndarray, "D"], covariance: Float[np.ndarray, "D D"]) -> Mixture:
    """Returns a single Gaussian."""
    return mixture(np.ones(1), np.asarray(mean)[None], np.asarray(covariance)[None])


def mixture(
    weights: Float[np.ndarray, "K"],
    means: Float[np.ndarray, "K D"],
    covariances: Float[np.ndarray, "K D D"],
) -> Mixture:
    """Returns Σ_k w_k N(m_k, C_k)."""
    variances, axes = np.linalg.eigh(covariances)
    return Mixture(
        log_weights=jnp.asarray(np.log(weights)),
        means=jnp.asarray(means),
        variances=jnp.asarray(variances),
        axes=jnp.asarray(axes),
    )


def fit(x: Float[np.ndarray, "N *D"], K: int) -> Mixture:
    """Returns the mixture of K Gaussians that EM fits to data.

    The components share one covariance, so that the mixture fits new data nearly as well, even
    if there are few examples. Those of vectors have covariances of their own, if new data have
    a higher likelihood then, by five-fold cross-validation. `SMALLEST_VARIANCE` is added to
    every variance.

    Args:
      x: data, seen as vectors.
      K: number of components, at most N.
    """
    from sklearn.mixture import GaussianMixture  # slow to import
    from sklearn.model_selection import cross_val_score

    rows = x.reshape(len(x), -1).astype(np.float64)
    shared, own = (
        GaussianMixture(K, covariance_type=kind, reg_covar=SMALLEST_VARIANCE, random_state=0)
        for kind in ("tied", "full")
    )
    found, few = shared, len(rows) < 5 * K
    if x.ndim == 2 and K > 1 and not few:
        scores = [cross_val_score(fitted, rows).mean() for fitted in (shared, own)]
        found = own if scores[1] > scores[0] else shared
    found.fit(rows)
    covariances = np.broadcast_to(found.covariances_, (K, *found.covariances_.shape[-2:]))
    return mixture(found.weights_, found.means_, covariances)


def _ellipse() -> Mixture:
    """Returns one correlated Gaussian."""
    return gaussian(np.array([0.2, -0.1]), np.array([[0.2, 0.12], [0.12, 0.1]]))


def _blobs() -> Mixture:
    """Returns eight isotropic Gaussians on a circle."""
    return isotropic(0.75 * _circle(8), std=0.12)


def _rings() -> Mixture:
    """Returns two concentric rings, each with probability about proportional to its length."""
    return isotropic(np.concatenate([0.4 * _circle(60), 0.85 * _circle(128)]), std=0.05)


def _moons() -> Mixture:
    """Returns two interlocking half circles."""
    angles = np.linspace(0, np.pi, 64)
    upper = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    moons = np.concatenate([upper, np.array([1.0, 0.5]) - upper])
    return isotropic(0.6 * (moons - [0.5, 0.25]), std=0.06)


def _checkerboard() -> Mixture:
    """Returns eight squares of a 4x4 checkerboard, with smooth edges."""
    side, n, std = 0.45, 7, 0.05
    centres = [(i - 1.5, j - 1.5) for i in range(4) for j in range(4) if (i + j) % 2]
    offsets = (np.arange(n) - (n - 1) / 2) / n  # of the components in a square of side 1
    nodes = np.stack(np.meshgrid(offsets, offsets), axis=-1).reshape(-1, 2)
    points = np.array(centres)[:, None] + nodes
    return isotropic(side * points.reshape(-1, 2), std)


def _spirals() -> Mixture:
    """Returns two spiral arms, each the other rotated by 180 degrees."""
    angles = np.sqrt(np.linspace(0.06, 1, 120)) * 3 * np.pi
    arm = angles[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1) / (3 * np.pi)
    return isotropic(0.95 * np.concatenate([arm, -arm]), std=0.04)


def _circle(n: int) -> Float[np.ndarray, "n 2"]:
    """Returns n equally spaced points on the unit circle."""
    angles = 2 * np.pi * np.arange(n) / n
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


# Shapes in the plane, by name. Like images, they are scaled to about [-1, 1].
PLANAR_SHAPES: dict[str, Callable[[], Mixture]] = {
    "ellipse": _ellipse,
    "blobs": _blobs,
    "rings": _rings,
    "moons": _moons,
    "checkerboard": _checkerboard,
    "spirals": _spirals,
}
