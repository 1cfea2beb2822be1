"""Bounds of a model's log Z by annealed importance sampling, and log-likelihoods of data.

`sampling.annealing` defines the intermediate distributions and the annealing itself; this
module runs it on a `Model`, in segments that can be saved and continued.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Num

from drl_jax import config as config_lib
from drl_jax import diffusion, noise
from drl_jax.diffusion import NoiseSchedule
from drl_jax.mcmc import hmc
from drl_jax.model import Model, as_images
from drl_jax.sampling import annealing as annealing_lib
from drl_jax.sampling import ladder
from drl_jax.sampling.annealing import Partition
from drl_jax.sampling.ladder import Sampler

SEGMENTS = 100  # per pass; work can be saved or interrupted between two segments
WARM_UP_CHAINS = 16


class Budget(NamedTuple):
    """Cost of bounding log Z: the fields of `config.likelihood`.

    Attributes:
      chains: number of chains annealed in each direction.
      distributions: approximate number of intermediate distributions
        (`annealing.annealing_path`).
      transitions: HMC transitions at each intermediate distribution.
      leapfrog: leapfrog steps per transition; 1 is MALA, the Metropolis-adjusted Langevin
        algorithm.
      burn_in: number of moves on level 0, of `transitions` each, that turn data into
        approximate samples of level 0.
      target_acceptance: acceptance probability that the warm-up aims for.
      warmup_steps: steps of the warm-up at each level.
      max_gap: largest usable gap between the bounds [bits per dimension].
    """

    chains: int
    distributions: int
    transitions: int
    leapfrog: int
    burn_in: int
    target_acceptance: float
    warmup_steps: int
    max_gap: float


DEFAULT = Budget(**config_lib.default().likelihood)


class Pass(NamedTuple):
    """State of n chains annealed in one direction, after r moves.

    Attributes:
      x: positions of the chains.
      log_weights: what each move added to each chain's log w [nats].
      acceptance: acceptance probability of each move's transitions, mean over the chains.
    """

    x: Float[np.ndarray, "n *D"]
    log_weights: Float[np.ndarray, "n r"]
    acceptance: Float[np.ndarray, "r"]


class Annealing(NamedTuple):
    """State of both passes, and the step sizes of their transitions.

    Attributes:
      step_size: step size at each level, adapted on chains that were discarded.
      down: pass from white noise to level 0.
      up: pass from level 0, started from data, to white noise.
    """

    step_size: Float[np.ndarray, "T"]
    down: Pass
    up: Pass

    @property
    def moves_done(self) -> int:
        """Number of moves made so far, in both passes together."""
        return len(self.down.acceptance) + len(self.up.acceptance)

    @property
    def partition(self) -> Partition:
        """Bounds of log Z; valid once both passes are complete."""
        return annealing_lib.partition(self.down.log_weights, self.up.log_weights)


def to_arrays(annealing: Annealing) -> dict[str, np.ndarray]:
    """Returns the state as named arrays, for saving; `from_arrays` is the inverse."""
    passes = {"down": annealing.down, "up": annealing.up}
    arrays = {
        f"{name}_{field}": array
        for name, state in passes.items()
        for field, array in state._asdict().items()
    }
    return arrays | {"step_size": annealing.step_size}


def from_arrays(arrays: dict[str, np.ndarray]) -> Annealing:
    """Returns the state that `to_arrays` saved."""
    down, up = (
        Pass(*(arrays[f"{name}_{field}"] for field in Pass._fields)) for name in ("down", "up")
    )
    return Annealing(arrays["step_size"], down, up)


def begin(
    model: Model, key: Key[Array, ""], x: Float[np.ndarray, "N *D"], budget: Budget
) -> Annealing:
    """Adapts the step sizes and initialises the chains of both passes.

    Args:
      model: model whose level 0 is to be normalised.
      key: random key, to be passed to `annealed` too.
      x: data that the upward pass starts from, repeated if there are fewer than the chains.
      budget: its fields chains, leapfrog, target_acceptance and warmup_steps are used.
    """
    method, n = model.method, budget.chains
    schedule, shape = method.schedule, method.energy.shape
    warm_key, start_key, _, _ = jax.random.split(key, 4)

    # Every device runs the same chains, as in `Model.adapt`.
    @jax.jit
    def warm_up(params, key):
        return annealing_lib.warm_up(
            keys=noise.example_keys(key, jnp.arange(WARM_UP_CHAINS)),
            F=method.F(params),
            shape=shape,
            schedule=schedule,
            sampler=Sampler(
                init=hmc.init,
                kernel=hmc.kernel,
                tuning={"leapfrog": jnp.full(schedule.T, budget.leapfrog)},
                K=1,
            ),
            num_steps=budget.warmup_steps,
            target=budget.target_acceptance,
        )

    step_size, _ = warm_up(model.params, warm_key)
    keys = noise.example_keys(start_key, jnp.arange(n))
    data = jnp.asarray(x[np.arange(n) % len(x)], jnp.float32)
    x_0 = diffusion.diffuse(noise.fold(keys, 0), data, jnp.zeros(n, jnp.int32), schedule)
    x_T = ladder.white_noise(noise.fold(keys, 1), shape, schedule)
    down, up = (
        Pass(np.asarray(start), np.zeros((n, 0), np.float32), np.zeros((0,), np.float32))
        for start in (x_T, x_0)
    )
    return Annealing(np.asarray(step_size), down, up)


def annealed(
    model: Model, key: Key[Array, ""], annealing: Annealing, budget: Budget
) -> Iterator[Annealing]:
    """Continues both passes to their ends, and yields the state after every segment.

    An annealing that is interrupted after a segment and continued later gives the same
    result to the bit.

    Args:
      model: the model passed to `begin`.
      key: the key passed to `begin`.
      annealing: state to continue from.
      budget: the budget passed to `begin`.
    """
    schedule = model.method.schedule
    path = annealing_lib.annealing_path(schedule, budget.distributions)
    step_size = annealing_lib.interpolate_step_sizes(jnp.asarray(annealing.step_size), path)
    tuning = {"step_size": step_size, "leapfrog": jnp.full(step_size.shape, budget.leapfrog)}

    def program(keys, conditionals, x, move, start, end, path, tuning):
        return annealing_lib.anneal(
            keys=keys,
            F=conditionals.F,
            x=x,
            move=move,
            start=start,
            end=end,
            path=path,
            schedule=schedule,
            sampler=Sampler(hmc.init, hmc.kernel, tuning, budget.transitions),
        )

    compiled = model.compile(program)
    _, _, *keys = jax.random.split(key, 4)
    for name, pass_key in zip(("down", "up"), keys, strict=True):
        indices = path_indices(name, schedule, budget)
        total = len(indices) - 1
        size = -(-total // SEGMENTS)
        done = getattr(annealing, name).log_weights.shape[1]
        for first in range(done, total, size):
            move = np.arange(first, first + size)
            before: Pass = getattr(annealing, name)
            # The last segment is padded with moves from the end to itself, which are dropped,
            # so that all segments run the same compiled program.
            segments = model.run(
                compiled,
                pass_key,
                np.arange(len(before.x)),
                before.x,
                move=move,
                start=indices[np.minimum(move, total)],
                end=indices[np.minimum(move + 1, total)],
                path=path,
                tuning=tuning,
            )
            x, log_weights, acceptance = map(np.concatenate, zip(*segments, strict=True))
            made = min(size, total - first)
            after = Pass(
                x=x,
                log_weights=np.concatenate([before.log_weights, log_weights[:, :made]], axis=1),
                acceptance=np.append(before.acceptance, acceptance[:, :made].mean(axis=0)),
            )
            if name == "down":
                annealing = annealing._replace(down=after)
            else:
                annealing = annealing._replace(up=after)
            yield annealing


def path_indices(name: str, schedule: NoiseSchedule, budget: Budget) -> Int[np.ndarray, "V"]:
    """Returns the V indices on the annealing path that a pass of V - 1 moves visits, in order.

    Args:
      name: 'down' or 'up'; the upward pass starts with the burn-in at level 0.
      schedule: the noise levels.
      budget: its fields distributions and burn_in are used.
    """
    indices = np.arange(len(annealing_lib.annealing_path(schedule, budget.distributions).level))
    if name == "down":
        return indices
    return np.concatenate([np.full(budget.burn_in, indices[-1]), indices[::-1]])


def moves(schedule: NoiseSchedule, budget: Budget) -> int:
    """Returns the number of moves of both passes together, burn-in included."""
    return sum(len(path_indices(name, schedule, budget)) - 1 for name in ("down", "up"))


def log_partition(
    model: Model,
    key: Key[Array, ""],
    x: Float[np.ndarray, "N *D"],
    budget: Budget = DEFAULT,
) -> Partition:
    """Returns stochastic bounds of log Z of level 0 (`annealing.Partition`).

    Args:
      model: the model.
      key: random key.
      x: data that the upward pass starts from.
      budget: cost of the bounds.
    """
    annealing = begin(model, key, x, budget)
    for state in annealed(model, key, annealing, budget):
        annealing = state
    return annealing.partition


class History(NamedTuple):
    """Course of the annealing, from white noise to level 0, as pairs (down, up).

    Attributes:
      sigma_bar: noise of each intermediate distribution.
      log_Z: estimate of log Z of each intermediate distribution. Down: log mean w of the
        downward pass there. Up: the upward pass's estimate for level 0 plus its log mean w
        there [nats].
      effective_sample_size: effective sample size of the weights w there, divided by the
        number of chains.
      acceptance: acceptance probability of the transitions there.
    """

    sigma_bar: Float[np.ndarray, "R"]
    log_Z: tuple[Float[np.ndarray, "R"], Float[np.ndarray, "R"]]
    effective_sample_size: tuple[Float[np.ndarray, "R"], Float[np.ndarray, "R"]]
    acceptance: tuple[Float[np.ndarray, "R"], Float[np.ndarray, "R"]]


def history(annealing: Annealing, schedule: NoiseSchedule, budget: Budget) -> History:
    """Returns the course of a complete annealing."""
    path = annealing_lib.annealing_path(schedule, budget.distributions)
    log_sigma_bar = np.log(np.asarray(schedule.sigma_bar, np.float64))
    level = np.asarray(path.level - path.beta)
    num_moves = len(level) - 1  # per pass, without the burn-in
    down, up = (
        [annealing_lib.bound(log_w) for log_w in np.cumsum(np.float64(terms), axis=1).T]
        for terms in (annealing.down.log_weights, annealing.up.log_weights[:, -num_moves:])
    )
    # The upward pass ends at white noise, whose log Z is 0.
    data_log_Z = -up[-1].log_Z
    return History(
        sigma_bar=np.exp(np.interp(level, np.arange(len(log_sigma_bar)), log_sigma_bar)),
        log_Z=(
            np.array([0.0, *(b.log_Z for b in down)]),
            np.array([data_log_Z, *(data_log_Z + b.log_Z for b in up)])[::-1],
        ),
        effective_sample_size=(
            np.array([1.0, *(b.effective_sample_size / b.chains for b in down)]),
            np.array([1.0, *(b.effective_sample_size / b.chains for b in up)])[::-1],
        ),
        acceptance=(
            np.append(np.nan, annealing.down.acceptance),
            np.append(np.nan, annealing.up.acceptance[-num_moves:])[::-1],
        ),
    )


def log_likelihood(
    model: Model,
    key: Key[Array, ""],
    x: Num[np.ndarray, "n *D"],
    values: int | None = None,
    dequantised: bool = False,
) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"] | None]:
    """Returns log p(x_0) + log Z, and for discrete data log P(x) + log Z, per example [nats].

    x_0 is the example x with the noise of level 0 (`annealing.noisy_log_density`). P(x) is the
    probability of x among its possible discrete values, of which the result is a lower bound
    in expectation over the noise (`annealing.log_volume`).

    Args:
      model: the model.
      key: random key of the noise.
      x: data; if they are discrete, images in [-1, 1].
      values: number of possible values per pixel; None for continuous data, for which the
        second result is None.
      dequantised: whether the model was trained on data with uniform noise added.

    Raises:
      UserError: if the data are discrete, and not floating-point images of the model's shape
        in [-1, 1].
    """
    schedule = model.method.schedule
    if values:
        x = as_images(x, model.shape)
        x = np.rint((x + 1) / 2 * (values - 1)) / (values - 1) * 2 - 1
    bin_width = 2 / (values - 1) if values and dequantised else 0.0

    def program(keys, conditionals, x):
        log_q, x_0 = annealing_lib.noisy_log_density(
            keys, conditionals.F, x, bin_width, schedule
        )
        if not values:
            return log_q, log_q
        return log_q, log_q + annealing_lib.log_volume(x_0, values, dequantised, schedule)

    batches = model.run(model.compile(program), key, np.arange(len(x)), np.float32(x))
    log_q, log_P = map(np.concatenate, zip(*batches, strict=True))
    return log_q, log_P if values else None
