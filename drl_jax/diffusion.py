"""The forward diffusion: T + 1 noise levels from data to white noise.

    x_{t+1} = a_{t+1} x_t + sigma_{t+1} eps,   a² + sigma² = 1,   eps ~ N(0, I)

(Gao et al. 2021, eq. 4.) There are T energies: energy t = 0..T-1 recovers level t from level
t + 1. Level 0 is the data with a little noise. Level T is white noise: it contains at most
0.08 times the data, and generation starts from N(0, I).
"""

import itertools

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from drl_jax import noise
from drl_jax.errors import UserError

# The linear schedule of Ho et al. (2020), and a last beta of 1, which only T = 1000 uses: then
# level T is exactly white noise. For smaller T, a_bar_T is about 0.006.
BETAS = np.append(np.linspace(1e-4, 0.02, 1000), 1.0)

# Logarithm of the signal-to-noise ratio, a_bar² / sigma_bar², at levels 0 and T of the cosine
# schedule (Zhu et al. 2024).
LOG_SNR = 9.8, -5.1


@flax.struct.dataclass
class NoiseSchedule:
    """The noise levels 0..T. Every array has the shape [T + 1], one number per level.

    Attributes:
      a: factor on the signal from level t - 1 to level t; at level 0, from the data.
      sigma: standard deviation of the noise added in that step, sqrt(1 - a²).
      a_bar: factor on the signal from the data to level t, the product of a_0..a_t.
      sigma_bar: standard deviation of all noise in level t, sqrt(1 - a_bar²).
    """

    a: Float[Array, "levels"]
    sigma: Float[Array, "levels"]
    a_bar: Float[Array, "levels"]
    sigma_bar: Float[Array, "levels"]

    @property
    def T(self) -> int:
        """Number of energies; the noise levels are 0..T."""
        return self.a.shape[0] - 1

    @property
    def conditioning(self) -> Float[Array, "levels"]:
        """Input for a level to networks other than the paper's, in 0..1000.

        This is the angle arctan(sigma_bar / a_bar), in units of a thousandth of a right angle
        (Zhu et al. 2024). It does not depend on the number of levels.
        """
        return jnp.arctan2(self.sigma_bar, self.a_bar) * (2000 / jnp.pi)

    def is_marginal(self, t: Int[Array, "*B"]) -> Float[Array, "*B"]:
        """Returns 1 where t = T - 1, whose energy is learned as a marginal, and 0 below.

        Level T is treated as white noise that is independent of x_{T-1}; the conditional is
        then the marginal.
        """
        return (t == self.T - 1).astype(self.a.dtype)

    def y_scale(self, t: Int[Array, "*B"]) -> Float[Array, "*B"]:
        """Returns the factor y_t / x_t for t in 0..T-1: a_{t+1}, but 1 at t = T - 1."""
        return jnp.where(t == self.T - 1, 1.0, self.a[t + 1])


def schedule(T: int, name: str = "linear", min_noise: float = 0.0) -> NoiseSchedule:
    """Returns the noise schedule with T energies.

    - 'linear' is the paper's. The step to each level combines one or more consecutive `BETAS`.
      With T = 1000 it is one beta per level (T1k). With T of 501 or less, the levels are spaced
      evenly over the first half of the betas, and the step to level T combines the rest
      (T = 6 is T6).
    - 'cosine' has a_bar_t = cos(θ_t) and sigma_bar_t = sin(θ_t), for angles θ_t that are evenly
      spaced and have the log-SNR 2 log cot(θ) of `LOG_SNR` at both ends (Zhu et al. 2024;
      Hoogeboom et al. 2023). The levels are spaced more evenly than in T6, where half of the
      noise is added in the first step. a_bar_T is 0.08.

    Args:
      T: number of energies.
      name: 'linear' or 'cosine'.
      min_noise: sigma_bar_0 of the cosine schedule, if it is not to be that of `LOG_SNR`.

    Raises:
      UserError: if the name is unknown, or T does not fit the schedule.
    """
    if name not in _SCHEDULES:
        raise UserError(f"the noise schedule {name!r} is unknown; use 'linear' or 'cosine'")
    a_bar = _SCHEDULES[name](T, min_noise)
    a = a_bar / np.append(1.0, a_bar[:-1])
    return NoiseSchedule(
        a=jnp.asarray(a),
        sigma=jnp.asarray(np.sqrt(1 - a**2)),
        a_bar=jnp.asarray(a_bar),
        sigma_bar=jnp.asarray(np.sqrt(1 - a_bar**2)),
    )


def _linear(T: int, min_noise: float) -> Float[np.ndarray, "levels"]:
    """Returns a_bar of the linear schedule, whose noise levels are fixed."""
    del min_noise
    if T == 1000:
        ends = np.arange(1001)
    elif 1 <= T <= 501:
        stride = 1000 // (2 * (T - 1)) if T > 1 else 0
        ends = np.append(stride * np.arange(T), 999)
    else:
        raise UserError(
            f"T = {T} does not fit the linear noise schedule of 1000 steps; use 1 to 501, or "
            "1000, or the schedule 'cosine'"
        )
    log_a_bar = np.cumsum(0.5 * np.log1p(-BETAS[:-1]))
    return np.exp(np.append(log_a_bar, -np.inf))[ends]


def _cosine(T: int, min_noise: float) -> Float[np.ndarray, "levels"]:
    """Returns a_bar of the cosine schedule."""
    if T < 1:
        raise UserError(f"T = {T} is not a number of noise levels; use 1 or more")
    first, last = np.arctan(np.exp(-np.array(LOG_SNR) / 2))
    first = np.arcsin(min_noise) if min_noise else first
    return np.cos(np.linspace(first, last, T + 1))


_SCHEDULES = {"linear": _linear, "cosine": _cosine}


def thinned(schedule: NoiseSchedule, T: int) -> tuple[NoiseSchedule, Int[np.ndarray, "T"]]:
    """Returns the schedule with T of the energies of another, and their levels there.

    They are spaced evenly from level 0 on; the last noise level stays the last one. One step
    then adds the noise of several (Nichol & Dhariwal 2021).

    Raises:
      UserError: if the schedule does not have T energies.
    """
    if not 1 <= T <= schedule.T:
        raise UserError(f"{T} noise levels are not among {schedule.T}: use 1 to {schedule.T}")
    levels = np.rint(np.arange(T) * schedule.T / T).astype(np.int32)
    ends = np.append(levels, schedule.T)
    all_a, all_sigma = (np.asarray(v, np.float64) for v in (schedule.a, schedule.sigma))
    a, sigma = all_a[ends], all_sigma[ends]
    for t, (first, last) in enumerate(itertools.pairwise(ends), start=1):
        left = np.cumprod(all_a[first + 1 : last + 1][::-1])[::-1]  # of the signal, to level t
        a[t] = left[0]
        noise_left = np.append(left[1:], 1.0) * all_sigma[first + 1 : last + 1]
        sigma[t] = np.sqrt(np.sum(noise_left**2))
    return NoiseSchedule(
        a=jnp.asarray(a, schedule.a.dtype),
        sigma=jnp.asarray(sigma, schedule.a.dtype),
        a_bar=schedule.a_bar[ends],
        sigma_bar=schedule.sigma_bar[ends],
    ), levels


def level_groups(T: int) -> list[range]:
    """Returns the groups into which levels 0..T-1 are divided in reports.

    If T <= 10, each level is a group; otherwise there are ten groups of consecutive levels.
    """
    G = T if T <= 10 else 10
    bounds = [-(-T * g // G) for g in range(G + 1)]
    return [range(start, end) for start, end in itertools.pairwise(bounds)]


def diffuse(
    keys: Key[Array, "B"],
    x: Float[Array, "B *D"],
    t: Int[Array, "B"],
    schedule: NoiseSchedule,
) -> Float[Array, "B *D"]:
    """Draws x_t ~ q(x_t | x) = N(a_bar_t x, sigma_bar_t² I) for data x, t in 0..T."""
    return _scale_and_add_noise(keys, x, schedule.a_bar[t], schedule.sigma_bar[t])


def step(
    keys: Key[Array, "B"],
    x_t: Float[Array, "B *D"],
    t: Int[Array, "B"],
    schedule: NoiseSchedule,
) -> Float[Array, "B *D"]:
    """Draws x_{t+1} ~ q(x_{t+1} | x_t) = N(a_{t+1} x_t, sigma_{t+1}² I), t in 0..T-1."""
    return _scale_and_add_noise(keys, x_t, schedule.a[t + 1], schedule.sigma[t + 1])


def diffuse_pair(
    keys: Key[Array, "B"],
    x: Float[Array, "B *D"],
    t: Int[Array, "B"],
    schedule: NoiseSchedule,
) -> tuple[Float[Array, "B *D"], Float[Array, "B *D"]]:
    """Draws (x_t, x_{t+1}) ~ q(x_t, x_{t+1} | x) for data x, t in 0..T-1."""
    x_t = diffuse(noise.fold(keys, 0), x, t, schedule)
    return x_t, step(noise.fold(keys, 1), x_t, t, schedule)


def shared_noise_pair(
    keys: Key[Array, "B"],
    x: Float[Array, "B *D"],
    t: Int[Array, "B"],
    schedule: NoiseSchedule,
) -> tuple[Float[Array, "B *D"], Float[Array, "B *D"]]:
    """Returns (x_t, x_{t+1}) for data x, t in 0..T-1, both with the same noise eps ~ N(0, I).

        x_s = a_bar_s x + sigma_bar_s eps,   s = t, t + 1

    (Zhu et al. 2024.) Each alone is distributed as in `diffuse_pair`. But x_{t+1} - a_{t+1} x_t
    is proportional to eps, and so not independent of x_t.
    """
    eps = noise.normal(keys, x.shape[1:])

    def at(s):
        a_bar, sigma_bar = (
            noise.per_example(v[s], x) for v in (schedule.a_bar, schedule.sigma_bar)
        )
        return a_bar * x + sigma_bar * eps

    return at(t), at(t + 1)


def posterior(
    x: Float[Array, "B *D"],
    x_next: Float[Array, "B *D"],
    t: Int[Array, "B"],
    schedule: NoiseSchedule,
) -> tuple[Float[Array, "B *D"], Float[Array, "B"]]:
    """Returns the mean and standard deviation of q(x_t | x_{t+1}, x) for data x, t in 0..T-1.

        mean = (a_{t+1} sigma_bar_t² x_{t+1} + a_bar_t sigma_{t+1}² x) / sigma_bar_{t+1}²
        std = sigma_{t+1} sigma_bar_t / sigma_bar_{t+1}

    (Ho et al. 2020, eqs. 6 and 7.)
    """
    sigma, sigma_bar = schedule.sigma, schedule.sigma_bar
    weight_next = schedule.a[t + 1] * (sigma_bar[t] / sigma_bar[t + 1]) ** 2
    weight_data = schedule.a_bar[t] * (sigma[t + 1] / sigma_bar[t + 1]) ** 2
    mean = noise.per_example(weight_next, x) * x_next + noise.per_example(weight_data, x) * x
    return mean, posterior_std(t, schedule)


def posterior_std(t: Int[Array, "B"], schedule: NoiseSchedule) -> Float[Array, "B"]:
    """Returns the standard deviation of q(x_t | x_{t+1}, x), which is the same for all x."""
    sigma_bar = schedule.sigma_bar
    return schedule.sigma[t + 1] * sigma_bar[t] / sigma_bar[t + 1]


def _scale_and_add_noise(keys, x, a, sigma):
    """Draws from N(a x, sigma² I), with one a and one sigma per example."""
    eps = noise.normal(keys, x.shape[1:])
    return noise.per_example(a, x) * x + noise.per_example(sigma, x) * eps
