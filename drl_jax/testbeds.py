"""Data whose every noise level is known: mixtures of Gaussians, and shapes made of them.

Blurred, scaled or conditioned on a noisy copy, a mixture of Gaussians is one again. So every
level's marginal, conditional and score has a closed form, and the exact energy F, being a
normalised log-density, has log Z = 0. A shape in the plane (rings, moons, ...) is a chain of
components closer together than they are wide: its outline is smooth, and just as exact.
"""

import math
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
        D = self.means.shape[-1]
        k = jax.vmap(jax.random.categorical, (0, None))(noise.fold(keys, 0), self.log_weights)
        z = jnp.sqrt(self.variances[k]) * noise.normal(noise.fold(keys, 1), (D,))
        return self.means[k] + jnp.einsum("bij,bj->bi", self.axes[k], z)

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

        Component k keeps precision 1 / v_k + 1 / sigma² along each axis, and weighs as much as
        it explains x_tilde.
        """
        explained = self.blurred(1.0, sigma)._log_joint(x_tilde)
        noise_variance = jnp.reshape(jnp.asarray(sigma) ** 2, (-1, 1, 1))
        gain = self.variances / (self.variances + noise_variance)
        shift = jnp.einsum("kij,bkj->bki", self.axes, gain * self._along_axes(x_tilde))
        return Mixture(
            jax.nn.log_softmax(explained, axis=1),
            self.means + shift,
            gain * noise_variance,
            self.axes,
        )

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
    t: Int[Array, ""] | int,
    schedule: NoiseSchedule,
) -> Mixture:
    """Returns q(y_t | x_{t+1} = x_tilde), t in 0..T-1; at the top the marginal of y."""
    if t == schedule.T - 1:
        return energy_marginal(data, jnp.full(len(x_tilde), t), schedule)
    return energy_marginal(data, t, schedule).given(x_tilde, schedule.sigma[t + 1])


def exact_F(data: Mixture, schedule: NoiseSchedule) -> LevelFn:
    """Returns F(y, t) = log q(y_t = y), the energy to be learned; its log Z is 0."""
    return lambda y, t: energy_marginal(data, t, schedule).log_density(y)


def isotropic(means: Float[np.ndarray, "K D"], std: float) -> Mixture:
    """Returns a mixture of round components of one width and equal weights."""
    K, D = means.shape
    axes = jnp.broadcast_to(jnp.eye(D), (K, D, D))
    variances = jnp.full((K, D), std**2)
    return Mixture(jnp.full(K, -math.log(K)), jnp.asarray(means), variances, axes)


def gaussian(mean: Float[np.ndarray, "D"], covariance: Float[np.ndarray, "D D"]) -> Mixture:
    """Returns one Gaussian."""
    variances, axes = np.linalg.eigh(covariance)
    return Mixture(
        jnp.zeros(1),
        jnp.asarray(mean)[None],
        jnp.asarray(variances)[None],
        jnp.asarray(axes)[None],
    )


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
