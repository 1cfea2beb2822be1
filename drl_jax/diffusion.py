"""The forward diffusion: T + 1 noise levels from data to white noise.

    x_{t+1} = a_{t+1} x_t + sigma_{t+1} eps,   a² + sigma² = 1,   eps ~ N(0, I)

(Gao et al. 2021, eq. 4.) Level t is recovered from level t + 1, so T energies stand
between T + 1 levels.
"""

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from drl_jax import noise
from drl_jax.errors import UserError

# The linear schedule of Ho et al. 2020, on which the levels are laid, and the level of
# pure white noise after its end.
BETAS = np.append(np.linspace(1e-4, 0.02, 1000), 1.0)


@flax.struct.dataclass
class NoiseSchedule:
    """The noise levels 0..T.

    Attributes:
      a: signal kept from level t - 1 to level t (level 0: from the data).
      sigma: noise added in that step; a² + sigma² = 1.
      a_bar: signal kept from the data to level t, the product of a up to t.
      sigma_bar: standard deviation of all noise in level t, sqrt(1 - a_bar²).
    """

    a: Float[Array, "T+1"]
    sigma: Float[Array, "T+1"]
    a_bar: Float[Array, "T+1"]
    sigma_bar: Float[Array, "T+1"]

    @property
    def T(self) -> int:
        """Number of energies; levels are 0..T."""
        return self.a.shape[0] - 1

    def is_marginal(self, t: Int[Array, "B"]) -> Float[Array, "B"]:
        """1 at the top energy T - 1, learned as a marginal, and 0 below.

        Level T is white noise already: nothing in it says which x_{T-1} it came from.
        """
        return (t == self.T - 1).astype(self.a.dtype)

    def a_y(self, t: Int[Array, "B"]) -> Float[Array, "B"]:
        """The factor in y_t = a_{t+1} x_t; 1 at the top, where y is not scaled."""
        return jnp.where(t == self.T - 1, 1.0, self.a[t + 1])


def schedule(T: int) -> NoiseSchedule:
    """Returns the schedule of T energies.

    Every level is a run of the 1000 betas. T = 1000 gives each level one beta (the
    paper's T1k); fewer levels are spaced evenly over the first half and the last one
    takes the rest (T = 6: the paper's T6).

    Raises:
      UserError: if T levels cannot be laid on 1000 betas.
    """
    if T == 1000:
        ends = np.arange(1001)
    elif 1 <= T <= 501:
        stride = 1000 // (2 * (T - 1)) if T > 1 else 0
        ends = np.append(stride * np.arange(T), 999)
    else:
        raise UserError(f"T = {T} noise levels: the schedule allows 1 to 501, or 1000")
    log_a_bar = np.cumsum(0.5 * np.log1p(-BETAS[:-1]))
    a_bar = np.exp(np.append(log_a_bar, -np.inf))[ends]
    a = a_bar / np.append(1.0, a_bar[:-1])
    return NoiseSchedule(
        *(jnp.asarray(v) for v in (a, np.sqrt(1 - a**2), a_bar, np.sqrt(1 - a_bar**2)))
    )


def diffuse(
    keys: Key[Array, "B"],
    x: Float[Array, "B *D"],
    t: Int[Array, "B"],
    schedule: NoiseSchedule,
) -> Float[Array, "B *D"]:
    """Draws x_t ~ q(x_t | x) = N(a_bar_t x, sigma_bar_t² I) for data x."""
    return _blur(keys, x, schedule.a_bar[t], schedule.sigma_bar[t])


def step(
    keys: Key[Array, "B"],
    x_t: Float[Array, "B *D"],
    t: Int[Array, "B"],
    schedule: NoiseSchedule,
) -> Float[Array, "B *D"]:
    """Draws x_{t+1} ~ q(x_{t+1} | x_t) = N(a_{t+1} x_t, sigma_{t+1}² I), t in 0..T-1."""
    return _blur(keys, x_t, schedule.a[t + 1], schedule.sigma[t + 1])


def diffuse_pair(
    keys: Key[Array, "B"],
    x: Float[Array, "B *D"],
    t: Int[Array, "B"],
    schedule: NoiseSchedule,
) -> tuple[Float[Array, "B *D"], Float[Array, "B *D"]]:
    """Draws (x_t, x_{t+1}) jointly from q for data x, levels t in 0..T-1."""
    x_t = diffuse(noise.fold(keys, 0), x, t, schedule)
    return x_t, step(noise.fold(keys, 1), x_t, t, schedule)


def posterior(
    x: Float[Array, "B *D"],
    x_next: Float[Array, "B *D"],
    t: Int[Array, "B"],
    schedule: NoiseSchedule,
) -> tuple[Float[Array, "B *D"], Float[Array, "B"]]:
    """Returns mean and standard deviation of q(x_t | x_{t+1}, x) for data x, t in 0..T-1.

        mean = (a_{t+1} sigma_bar_t² x_{t+1} + a_bar_t sigma_{t+1}² x) / sigma_bar_{t+1}²
        std = sigma_{t+1} sigma_bar_t / sigma_bar_{t+1}

    (Ho et al. 2020, eqs. 6 and 7.)
    """
    sigma, sigma_bar = schedule.sigma, schedule.sigma_bar
    of_next = schedule.a[t + 1] * (sigma_bar[t] / sigma_bar[t + 1]) ** 2
    of_data = schedule.a_bar[t] * (sigma[t + 1] / sigma_bar[t + 1]) ** 2
    mean = noise.per_example(of_next, x) * x_next + noise.per_example(of_data, x) * x
    return mean, sigma[t + 1] * sigma_bar[t] / sigma_bar[t + 1]


def _blur(keys, x, a, sigma):
    """Draws N(a x, sigma² I), a and sigma a number an example."""
    eps = noise.normal(keys, x.shape[1:])
    return noise.per_example(a, x) * x + noise.per_example(sigma, x) * eps
