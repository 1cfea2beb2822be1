"""How a trained model's chains are annealed, and what its log Z makes of data."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from drl_jax import config as config_lib
from drl_jax import diffusion, images, likelihood, noise, sampling
from drl_jax.diffusion import NoiseSchedule
from drl_jax.likelihood import Partition
from drl_jax.mcmc import hmc
from drl_jax.model import Model
from drl_jax.sampling import Sampler

STRETCHES = 100  # in which a pass is made, so that it can be watched and interrupted
WARM_UP_CHAINS = 16


class Budget(NamedTuple):
    """What the bounds of log Z may cost: `config.likelihood`.

    Attributes:
      chains: annealed in each direction.
      rungs: of `likelihood.ladder`.
      transitions: of HMC at each rung.
      leapfrog: steps of a transition; 1 is MALA, the Metropolis-adjusted Langevin algorithm.
      burn_in: moves on level 0, of `transitions` each, that make samples of it out of data.
      target_acceptance: of the warm-up.
      warmup_steps: of it, a level.
      max_gap: between the bounds, beyond which they are not to be used [bits a dimension].
    """

    chains: int
    rungs: int
    transitions: int
    leapfrog: int
    burn_in: int
    target_acceptance: float
    warmup_steps: int
    max_gap: float


DEFAULT = Budget(**config_lib.default().likelihood)


class Direction(NamedTuple):
    """One pass, as far as it has come.

    Attributes:
      x: where the chains are.
      gains: of each move made, to log w.
      acceptance: mean over the chains of each.
    """

    x: Float[np.ndarray, "n *D"]
    gains: Float[np.ndarray, "n r"]
    acceptance: Float[np.ndarray, "r"]


class Annealing(NamedTuple):
    """Both passes, and the steps of their transitions.

    Attributes:
      step_size: of every level, adapted on chains thrown away.
      down: from white noise.
      up: from data.
    """

    step_size: Float[np.ndarray, "T"]
    down: Direction
    up: Direction

    @property
    def made(self) -> int:
        """How many moves are made, in both directions."""
        return len(self.down.acceptance) + len(self.up.acceptance)

    @property
    def partition(self) -> Partition:
        """The bounds of log Z that both passes come to."""
        return likelihood.partition(self.down.gains, self.up.gains)


def to_arrays(annealing: Annealing) -> dict[str, np.ndarray]:
    """Returns the arrays by name, to be kept; `from_arrays` is its inverse."""
    directions = {"down": annealing.down, "up": annealing.up}
    arrays = {
        f"{name}_{field}": array
        for name, direction in directions.items()
        for field, array in direction._asdict().items()
    }
    return arrays | {"step_size": annealing.step_size}


def from_arrays(arrays: dict[str, np.ndarray]) -> Annealing:
    """Returns what was kept."""
    down, up = (
        Direction(*(arrays[f"{name}_{field}"] for field in Direction._fields))
        for name in ("down", "up")
    )
    return Annealing(arrays["step_size"], down, up)


def begin(
    model: Model, key: Key[Array, ""], x: Float[np.ndarray, "N *D"], budget: Budget
) -> Annealing:
    """Adapts the steps and places the chains.

    Args:
      model: whose level 0 is to be normalised.
      key: of all noise, the same as for `annealed`.
      x: data, to start the way up from; taken again from the first where there are fewer
        than chains.
      budget: uses chains, leapfrog, target_acceptance, warmup_steps.
    """
    method, n = model.method, budget.chains
    schedule, shape = method.schedule, method.energy.shape
    warm_key, start_key, _, _ = jax.random.split(key, 4)

    # Every device makes the same chains, as for `Model.adapt`.
    @jax.jit
    def warm_up(params, key):
        keys = noise.example_keys(key, jnp.arange(WARM_UP_CHAINS))
        tuning = {"leapfrog": jnp.full(schedule.T, budget.leapfrog)}
        sampler = Sampler(hmc.init, hmc.kernel, tuning, K=1)
        return likelihood.warm_up(
            *(keys, method.F(params), shape, schedule, sampler),
            *(budget.warmup_steps, budget.target_acceptance),
        )

    step_size, _ = warm_up(model.params, warm_key)
    keys = noise.example_keys(start_key, jnp.arange(n))
    data = jnp.asarray(x[np.arange(n) % len(x)], jnp.float32)
    x_0 = diffusion.diffuse(noise.fold(keys, 0), data, jnp.zeros(n, jnp.int32), schedule)
    x_T = sampling.white_noise(noise.fold(keys, 1), shape, schedule)
    nothing = np.zeros((n, 0), np.float32), np.zeros((0,), np.float32)
    down, up = (Direction(np.asarray(start), *nothing) for start in (x_T, x_0))
    return Annealing(np.asarray(step_size), down, up)


def annealed(
    model: Model, key: Key[Array, ""], annealing: Annealing, budget: Budget
) -> Iterator[Annealing]:
    """Goes on with both passes, and yields them after every stretch, to the last.

    Stopped and gone on with, it makes the same numbers to the bit.
    """
    schedule = model.method.schedule
    ladder = likelihood.ladder(schedule, budget.rungs)
    step_size = likelihood.tune(jnp.asarray(annealing.step_size), ladder)
    tuning = {
        "step_size": step_size,
        "leapfrog": jnp.full(step_size.shape, budget.leapfrog),
    }

    def program(keys, F, _, x, place, start, end, ladder, tuning):
        sampler = Sampler(hmc.init, hmc.kernel, tuning, budget.transitions)
        return likelihood.anneal(keys, F, x, place, start, end, ladder, schedule, sampler)

    compiled = model.compile(program)
    _, _, *keys = jax.random.split(key, 4)
    for name, pass_key in zip(("down", "up"), keys, strict=True):
        rungs = visited(name, schedule, budget)
        moves = len(rungs) - 1
        size = -(-moves // STRETCHES)
        made = getattr(annealing, name).gains.shape[1]
        for first in range(made, moves, size):
            place = np.arange(first, first + size)
            # The last stretch is filled up with stays, so that it is no other program.
            start, end = rungs[np.minimum(place, moves)], rungs[np.minimum(place + 1, moves)]
            before = getattr(annealing, name)
            settings: dict[str, Any] = {"place": place, "start": start, "end": end}
            settings |= {"ladder": ladder, "tuning": tuning}
            batches = model.batches(
                compiled, pass_key, np.arange(len(before.x)), before.x, **settings
            )
            parts = [jax.tree.map(np.asarray, batch) for batch in batches]
            x, gains, acceptance = (np.concatenate(part) for part in zip(*parts, strict=True))
            kept = min(size, moves - first)
            after = Direction(
                x,
                np.concatenate([before.gains, gains[:, :kept]], axis=1),
                np.append(before.acceptance, acceptance[:, :kept].mean(axis=0)),
            )
            if name == "down":
                annealing = annealing._replace(down=after)
            else:
                annealing = annealing._replace(up=after)
            yield annealing


def visited(name: str, schedule: NoiseSchedule, budget: Budget) -> Int[np.ndarray, "moves+1"]:
    """Returns the rungs of a pass: 'down', or the burn-in and 'up'."""
    rungs = np.arange(len(likelihood.ladder(schedule, budget.rungs).level))
    if name == "down":
        return rungs
    return np.concatenate([np.full(budget.burn_in, rungs[-1]), rungs[::-1]])


def moves(schedule: NoiseSchedule, budget: Budget) -> int:
    """Returns how many moves both passes take."""
    return sum(len(visited(name, schedule, budget)) - 1 for name in ("down", "up"))


def log_partition(
    model: Model,
    key: Key[Array, ""],
    x: Float[np.ndarray, "N *D"],
    budget: Budget = DEFAULT,
) -> Partition:
    """Returns bounds of level 0's log Z (`likelihood`), up from the data x."""
    annealing = begin(model, key, x, budget)
    for later in annealed(model, key, annealing, budget):
        annealing = later
    return annealing.partition


class History(NamedTuple):
    """How annealing went, a number a rung from white noise to data, (down, up) each.

    Attributes:
      sigma_bar: noise of the rung.
      log_Z: of the rung, as bounded by the pass down to it, and by the one up to it less what
        is above.
      effective_sample_size: of the weights there, of one chain: 1 is the best.
      acceptance: of its transitions.
    """

    sigma_bar: Float[np.ndarray, "R"]
    log_Z: tuple[Float[np.ndarray, "R"], Float[np.ndarray, "R"]]
    effective_sample_size: tuple[Float[np.ndarray, "R"], Float[np.ndarray, "R"]]
    acceptance: tuple[Float[np.ndarray, "R"], Float[np.ndarray, "R"]]


def history(annealing: Annealing, schedule: NoiseSchedule, budget: Budget) -> History:
    """Returns how both passes went, from the gains of each move."""
    ladder = likelihood.ladder(schedule, budget.rungs)
    log_sigma_bar = np.log(np.asarray(schedule.sigma_bar, np.float64))
    level = np.asarray(ladder.level - ladder.beta)
    R = len(level) - 1  # moves from end to end
    down, up = (
        [likelihood.bound(log_w) for log_w in np.cumsum(np.float64(gains), axis=1).T]
        for gains in (annealing.down.gains, annealing.up.gains[:, -R:])
    )
    data_log_Z = -up[-1].log_Z  # of the last rung; the way up leads to log Z = 0
    return History(
        np.exp(np.interp(level, np.arange(len(log_sigma_bar)), log_sigma_bar)),
        (
            np.array([0.0, *(b.log_Z for b in down)]),
            np.array([data_log_Z, *(data_log_Z + b.log_Z for b in up)])[::-1],
        ),
        (
            np.array([1.0, *(b.effective_sample_size / b.chains for b in down)]),
            np.array([1.0, *(b.effective_sample_size / b.chains for b in up)])[::-1],
        ),
        (
            np.append(np.nan, annealing.down.acceptance),
            np.append(np.nan, annealing.up.acceptance[-R:])[::-1],
        ),
    )


def log_likelihood(
    model: Model,
    key: Key[Array, ""],
    x: Float[np.ndarray, "n *D"],
    values: int | None = None,
    dequantised: bool = False,
) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"] | None]:
    """Returns log p(x_0) + log Z, and log P(x) + log Z of discrete data, an example each.

    x_0 is x with the noise of level 0, and P(x) the probability of x rounded to its possible
    values, which this bounds from below [nats] (`likelihood.noisy_log_density`, `log_volume`).

    Args:
      model: that gives the density.
      key: of the noise.
      x: data; if they are discrete, images in [-1, 1].
      values: that a pixel can have; None for data that are not discrete, which have no P.
      dequantised: whether the model learned from data with uniform noise.

    Raises:
      UserError: if discrete data are no floating-point images of the model's shape and range.
    """
    schedule = model.method.schedule
    if values:
        x = images.as_images(x, model.method.energy.shape)
        x = np.rint((x + 1) / 2 * (values - 1)) / (values - 1) * 2 - 1
    bin_width = 2 / (values - 1) if values and dequantised else 0.0

    def program(keys, F, _, x):
        log_q, x_0 = likelihood.noisy_log_density(keys, F, x, bin_width, schedule)
        if not values:
            return log_q, log_q
        return log_q, log_q + likelihood.log_volume(x_0, values, dequantised, schedule)

    batches = model.batches(model.compile(program), key, np.arange(len(x)), np.float32(x))
    log_q, log_P = (np.concatenate(part) for part in zip(*batches, strict=True))
    return log_q, log_P if values else None
