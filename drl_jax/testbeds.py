"""Data whose every noise level is known: mixtures of Gaussians, and shapes made of them.

Blurred, scaled or conditioned on a noisy copy, a mixture of Gaussians is one again. So every
level's marginal, conditional and score has a closed form, and the exact energy F, being a
normalised log-density, has log Z = 0. A shape in the plane (rings, moons, ...) is a chain of
components closer together than they are wide: its outline is smooth, and just as exact.
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


class Mixture(NamedTuple):
    """The density Σ_k w_k N(m_k, U_k diag(v_k) U_kᵀ).

    Every array but `axes` may have a leading axis of examples: a density an example.

    Attributes:
      log_weights: log w_k; exp of them sums to one.
      means: m_k.
      variances: v_k, along the axes.
      axes: U_k, the principal axes as columns, orthonormal.
    """

    log_weights: Float[Array, "*B K"]
    means: Float[Array, "*B K D"]
    variances: Float[Array, "*B K D"]
    axes: Float[Array, "K D D"]

    def sample(self, keys: Key[Array, "B"]) -> Float[Array, "B D"]:
        """Draws one point a key."""
        own = 0 if self.means.ndim == 3 else None  # a density an example, or one for all
        pick = jax.vmap(lambda values, k: values[k], (own, 0))
        k = jax.vmap(jax.random.categorical, (0, own))(noise.fold(keys, 0), self.log_weights)
        z = noise.normal(noise.fold(keys, 1), self.means.shape[-1:])
        z = jnp.sqrt(pick(self.variances, k)) * z
        return pick(self.means, k) + jnp.einsum("bij,bj->bi", self.axes[k], z)

    def log_density(self, x: Float[Array, "B D"]) -> Float[Array, "B"]:
        """Returns log p(x) [nats]."""
        return jax.nn.logsumexp(self._log_joint(x), axis=1)

    def score(self, x: Float[Array, "B D"]) -> Float[Array, "B D"]:
        """Returns grad log p(x) = Σ_k p(k | x) C_k^-1 (m_k - x)."""
        pull = -self._along_axes(x) / self.variances
        responsibilities = jax.nn.softmax(self._log_joint(x), axis=1)
        return jnp.einsum("bk,kij,bkj->bi", responsibilities, self.axes, pull)

    def blurred(
        self, a: Float[Array, "*B"] | float, sigma: Float[Array, "*B"] | float
    ) -> "Mixture":
        """Returns the density of a x + sigma eps; of many a and sigma, one for each."""
        a, sigma = jnp.asarray(a)[..., None, None], jnp.asarray(sigma)[..., None, None]
        variances = a**2 * self.variances + sigma**2
        log_weights = jnp.broadcast_to(self.log_weights, variances.shape[:-1])
        return Mixture(log_weights, a * self.means, variances, self.axes)

    def given(
        self, x_tilde: Float[Array, "B D"], sigma: Float[Array, "B"] | float
    ) -> "Mixture":
        """Returns the density of y given x_tilde = y + sigma eps, one for each x_tilde.

        Component k has precision 1 / v_k + 1 / sigma² along each axis, and weighs as much as
        it explains x_tilde. Of an infinite sigma nothing is learned.
        """
        pull = jnp.broadcast_to(1 / jnp.asarray(sigma) ** 2, len(x_tilde))[:, None, None]
        shrink = 1 / (1 + self.variances * pull)
        along = self._along_axes(x_tilde)
        # log N(x_tilde; m_k, v_k + sigma²), but for what all k share.
        explained = jnp.sum(jnp.log(shrink) - along**2 * pull * shrink, axis=-1) / 2
        variances = self.variances * shrink
        shift = jnp.einsum("kij,bkj->bki", self.axes, variances * pull * along)
        log_weights = jax.nn.log_softmax(self.log_weights + explained, axis=1)
        return Mixture(log_weights, self.means + shift, variances, self.axes)

    def mean_and_covariance(self) -> tuple[Float[Array, "D"], Float[Array, "D D"]]:
        """Returns the mean and the covariance of the whole density."""
        w = jnp.exp(self.log_weights)
        mean = w @ self.means
        apart = self.means - mean
        within = jnp.einsum("k,kij,kj,klj->il", w, self.axes, self.variances, self.axes)
        return mean, within + jnp.einsum("k,ki,kj->ij", w, apart, apart)

    def _along_axes(self, x: Float[Array, "B D"]) -> Float[Array, "B K D"]:
        """Returns U_kᵀ (x - m_k)."""
        return jnp.einsum("kij,bki->bkj", self.axes, x[:, None, :] - self.means)

    def _log_joint(self, x: Float[Array, "B D"]) -> Float[Array, "B K"]:
        """Returns log p(x, k)."""
        squares = jnp.square(self._along_axes(x)) / self.variances
        log_normaliser = jnp.sum(jnp.log(2 * jnp.pi * self.variances), axis=-1) / 2
        return self.log_weights - jnp.sum(squares, axis=-1) / 2 - log_normaliser


def marginal(data: Mixture, t: Int[Array, "*B"] | int, schedule: NoiseSchedule) -> Mixture:
    """Returns q(x_t), t in 0..T."""
    return data.blurred(schedule.a_bar[t], schedule.sigma_bar[t])


def energy_marginal(
    data: Mixture, t: Int[Array, "*B"] | int, schedule: NoiseSchedule
) -> Mixture:
    """Returns the density of y_t = a_{t+1} x_t, which F(·, t) is to be, t in 0..T-1."""
    a = schedule.a_y(jnp.asarray(t))
    return data.blurred(a * schedule.a_bar[t], a * schedule.sigma_bar[t])


def conditional(
    data: Mixture,
    x_tilde: Float[Array, "B D"],
    t: Int[Array, "*B"] | int,
    schedule: NoiseSchedule,
) -> Mixture:
    """Returns q(y_t | x_{t+1} = x_tilde), t in 0..T-1; at the top the marginal of y."""
    t = jnp.asarray(t)
    sigma = jnp.where(t == schedule.T - 1, jnp.inf, schedule.sigma[t + 1])
    return energy_marginal(data, t, schedule).given(x_tilde, sigma)


def exact_F(data: Mixture, schedule: NoiseSchedule) -> LevelFn:
    """Returns F(y, t) = log q(y_t = y), the energy to be learned; its log Z is 0."""
    return lambda y, t: energy_marginal(data, t, schedule).log_density(y)


def isotropic(
    means: Float[np.ndarray, "K D"], std: float, weights: Float[np.ndarray, "K"] | None = None
) -> Mixture:
    """Returns a mixture of round components of one width, by default of equal weights."""
    K, D = np.shape(means)
    weights = np.full(K, 1 / K) if weights is None else weights
    return mixture(weights, means, np.broadcast_to(std**2 * np.eye(D), (K, D, D)))


def gaussian(mean: Float[np.ndarray, "D"], covariance: Float[np.ndarray, "D D"]) -> Mixture:
    """Returns one Gaussian."""
    return mixture(np.ones(1), np.asarray(mean)[None], np.asarray(covariance)[None])


def mixture(
    weights: Float[np.ndarray, "K"],
    means: Float[np.ndarray, "K D"],
    covariances: Float[np.ndarray, "K D D"],
) -> Mixture:
    """Returns Σ_k w_k N(m_k, C_k)."""
    variances, axes = np.linalg.eigh(covariances)
    return Mixture(*(jnp.asarray(v) for v in (np.log(weights), means, variances, axes)))


def _ellipse() -> Mixture:
    return gaussian(np.array([0.2, -0.1]), np.array([[0.2, 0.12], [0.12, 0.1]]))


def _blobs() -> Mixture:
    """Eight on a circle."""
    return isotropic(0.75 * _circle(8), std=0.12)


def _rings() -> Mixture:
    """Two, one in the other; points on each in proportion to its length."""
    return isotropic(np.concatenate([0.4 * _circle(60), 0.85 * _circle(128)]), std=0.05)


def _moons() -> Mixture:
    """Two half circles, each reaching into the other."""
    angles = np.linspace(0, np.pi, 64)
    upper = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    moons = np.concatenate([upper, np.array([1.0, 0.5]) - upper])
    return isotropic(0.6 * (moons - [0.5, 0.25]), std=0.06)


def _checkerboard() -> Mixture:
    """Eight of the sixteen squares of a 4 x 4 board, their edges a little soft."""
    side, n, std = 0.45, 7, 0.05
    centres = [(i - 1.5, j - 1.5) for i in range(4) for j in range(4) if (i + j) % 2]
    grid = (np.arange(n) - (n - 1) / 2) / n  # of nodes, in squares
    nodes = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2)
    points = np.array(centres)[:, None] + nodes
    return isotropic(side * points.reshape(-1, 2), std)


def _spirals() -> Mixture:
    """Two arms, the one the other's mirror image in the origin."""
    angles = np.sqrt(np.linspace(0.06, 1, 120)) * 3 * np.pi
    arm = angles[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1) / (3 * np.pi)
    return isotropic(0.95 * np.concatenate([arm, -arm]), std=0.04)


def _circle(n: int) -> Float[np.ndarray, "n 2"]:
    angles = 2 * np.pi * np.arange(n) / n
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


# Data in the plane, by name; about as large as images, [-1, 1].
PLANE: dict[str, Callable[[], Mixture]] = {
    "ellipse": _ellipse,
    "blobs": _blobs,
    "rings": _rings,
    "moons": _moons,
    "checkerboard": _checkerboard,
    "spirals": _spirals,
}
