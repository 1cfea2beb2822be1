"""Bounds of a model's log Z by annealed importance sampling, and log-likelihoods of data.

`sampling.annealing` defines the intermediate distributions and the annealing itself; this
module runs it on a `Model`, in segments that can be saved and continued.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, Key, Num

from drl_jax import config as config_lib
from drl_jax import diffusion, noise
from drl_jax.diffusion import NoiseSchedule
from drl_jax.mcmc import hmc
from drl_jax.model import Model, as_images
from drl_jax.runtime.matmul_precision import full_precision
from drl_jax.sampling import annealing as annealing_lib
from drl_jax.sampling import ladder
from drl_jax.sampling.annealing import PASSES, Bound, Partition, Path, Tempering
from drl_jax.sampling.ladder import Sampler

SEGMENTS = 100  # per pass; work can be saved or interrupted between two segments
WARM_UP_CHAINS = 16
TEMPERATURES = 50  # hotter versions of level 0 at which the step size is adapted
PILOT_CHAINS, PILOT_DISTRIBUTIONS = 32, 200  # at most


class Budget(NamedTuple):
    """Cost of bounding log Z: the fields of `config.likelihood`.

    Attributes:
      chains: number of chains in each pass.
      distributions: approximate number of intermediate distributions in each pass
        (`annealing.annealing_path`); exact for tempering (`annealing.tempering`).
      transitions: HMC transitions at each intermediate distribution.
      leapfrog: leapfrog steps per transition; 1 is MALA, the Metropolis-adjusted Langevin
        algorithm.
      burn_in: number of moves on level 0, of `transitions` each, that turn data and the
        model's samples into approximate samples of level 0.
      tempered_std: standard deviation of the Gaussian from which the tempered pass starts.
      target_acceptance: acceptance probability that the warm-up aims for.
      warmup_steps: steps of the warm-up at each level.
      max_gap: largest usable gap between the bounds [bits per dimension].
    """

    chains: int
    distributions: int
    transitions: int
    leapfrog: int
    burn_in: int
    tempered_std: float
    target_acceptance: float
    warmup_steps: int
    max_gap: float


DEFAULT = Budget(**config_lib.default().likelihood)


class Pass(NamedTuple):
    """State of n chains annealed in one direction, after r moves.

    Attributes:
      x: positions of the chains.
      log_weights: what each move added to each chain's log w [nats].
      log_density: log q(x) of each chain before each move, for the distribution q that the
        move started from [nats].
      acceptance: acceptance probability of each move's transitions, mean over the chains.
    """

    x: Float[np.ndarray, "n *D"]
    log_weights: Float[np.ndarray, "n r"]
    log_density: Float[np.ndarray, "n r"]
    acceptance: Float[np.ndarray, "r"]

    @property
    def log_weight(self) -> Float[np.ndarray, "n"]:
        """Sum of each chain's log-weights over its moves, log w [nats]."""
        return np.float64(self.log_weights).sum(axis=1)


class Annealing(NamedTuple):
    """State of all passes, and the step sizes of their transitions.

    Attributes:
      step_size: step size at each level, adapted on chains that were discarded.
      tempered_step_size: step size at each of G hotter versions of level 0, hottest first,
        adapted in the same way.
      passes: state of each pass in `PASSES`, by name. `from_model` has no starting points, and
        its positions are zeros, until the passes `levels` and `tempered` are complete.
    """

    step_size: Float[np.ndarray, "T"]
    tempered_step_size: Float[np.ndarray, "G"]
    passes: dict[str, Pass]

    @property
    def moves_done(self) -> int:
        """Number of moves made so far, in all passes together."""
        return sum(len(state.acceptance) for state in self.passes.values())

    def partition(self, burn_in: int) -> Partition:
        """Returns the bounds of log Z; valid once all passes are complete.

        Args:
          burn_in: number of moves on level 0 at the start of an upward pass.
        """
        log_w = {name: state.log_weight for name, state in self.passes.items()}
        data, own = (self.passes[name].log_density for name in ("from_data", "from_model"))
        return annealing_lib.partition(**log_w, log_density=(data[:, burn_in], own[:, burn_in]))


def to_arrays(annealing: Annealing) -> dict[str, np.ndarray]:
    """Returns the state as named arrays, for saving; `from_arrays` is the inverse."""
    arrays = {
        f"{name}_{field}": array
        for name, state in annealing.passes.items()
        for field, array in state._asdict().items()
    }
    return arrays | {
        "step_size": annealing.step_size,
        "tempered_step_size": annealing.tempered_step_size,
    }


def from_arrays(arrays: dict[str, np.ndarray]) -> Annealing:
    """Returns the state that `to_arrays` saved."""
    passes = {
        name: Pass(*(arrays[f"{name}_{field}"] for field in Pass._fields)) for name in PASSES
    }
    return Annealing(arrays["step_size"], arrays["tempered_step_size"], passes)


def begin(
    model: Model, key: Key[Array, ""], x: Float[np.ndarray, "N *D"], budget: Budget
) -> Annealing:
    """Adapts the step sizes and initialises the chains of all passes.

    Args:
      model: model whose level 0 is to be normalised.
      key: random key, to be passed to `annealed` too.
      x: data that the pass `from_data` starts from, repeated if there are fewer than the
        chains.
      budget: its fields chains, leapfrog, tempered_std, target_acceptance and warmup_steps
        are used.
    """
    method, n = model.method, budget.chains
    schedule, shape = method.schedule, method.energy.shape
    keys = pass_keys(key)

    # Every device runs the same chains, as in `Model.adapt`.
    @jax.jit
    @full_precision
    def warm_up(params, key):
        def sampler(G):
            return Sampler(hmc.init, hmc.kernel, {"leapfrog": jnp.full(G, budget.leapfrog)}, 1)

        settings: dict[str, Any] = {
            "F": method.F(params),
            "shape": shape,
            "schedule": schedule,
            "num_steps": budget.warmup_steps,
            "target": budget.target_acceptance,
        }
        keys = noise.example_keys(key, jnp.arange(WARM_UP_CHAINS))
        step_size, _ = annealing_lib.warm_up(keys, sampler=sampler(schedule.T), **settings)
        tempering = annealing_lib.tempering(TEMPERATURES - 1, budget.tempered_std, schedule)
        tempered_step_size, _ = annealing_lib.warm_up_tempered(
            keys, tempering=tempering, sampler=sampler(TEMPERATURES), **settings
        )
        return step_size, tempered_step_size

    step_size, tempered_step_size = map(np.asarray, warm_up(model.params, keys["warm_up"]))
    start_keys = noise.example_keys(keys["start"], jnp.arange(n))
    data = jnp.asarray(model.standardisation.apply(x[np.arange(n) % len(x)]), jnp.float32)
    x_0 = diffusion.diffuse(noise.fold(start_keys, 0), data, jnp.zeros(n, jnp.int32), schedule)
    x_T = ladder.white_noise(noise.fold(start_keys, 1), shape, schedule)
    wide = budget.tempered_std * ladder.white_noise(noise.fold(start_keys, 2), shape, schedule)
    starts = x_T, wide, x_0, jnp.zeros_like(x_0)
    passes = {name: unmoved(start) for name, start in zip(PASSES, starts, strict=True)}
    return Annealing(step_size, tempered_step_size, passes)


def unmoved(x: Float[ArrayLike, "n *D"]) -> Pass:
    """Returns a pass before its first move."""
    x = np.asarray(x)
    none = np.zeros((len(x), 0), np.float32)
    return Pass(x, none, none, np.zeros((0,), np.float32))


def pass_keys(key: Key[Array, ""]) -> dict[str, Key[Array, ""]]:
    """Returns a random key per purpose: warm-up, starting points, passes, and the pilot."""
    names = ("warm_up", "start", *PASSES, "resample", "pilot")
    return dict(zip(names, jax.random.split(key, len(names)), strict=True))


def pilot(
    model: Model, key: Key[Array, ""], begun: Annealing, budget: Budget
) -> tuple[Bound, Bound]:
    """Bounds log Z at a small part of the cost, to find out early if the bounds contradict.

    Fewer chains and intermediate distributions make the bounds looser, but they hold on the
    same conditions. So do the chains from data, which make as many moves on level 0 as in the
    whole run. If the bounds contradict each other (`annealing.contradiction`), those of the
    whole run do, too.

    Args:
      model: the model passed to `begin`.
      key: the key passed to `begin`.
      begun: the result of `begin`.
      budget: the budget passed to `begin`.

    Returns:
      the lower bound `levels` and the upper bound `from_data` (see `annealing.Partition`).
    """
    small = budget._replace(
        chains=min(budget.chains, PILOT_CHAINS),
        distributions=min(budget.distributions, PILOT_DISTRIBUTIONS),
    )
    passes = {name: unmoved(state.x[: small.chains]) for name, state in begun.passes.items()}
    small_run, names = begun._replace(passes=passes), ("levels", "from_data")
    for state in annealed(model, pass_keys(key)["pilot"], small_run, small, names):
        small_run = state
    lower, upper = (annealing_lib.bound(small_run.passes[name].log_weight) for name in names)
    return lower, upper._replace(log_Z=-upper.log_Z)


def annealed(
    model: Model,
    key: Key[Array, ""],
    annealing: Annealing,
    budget: Budget,
    passes: Sequence[str] = PASSES,
) -> Iterator[Annealing]:
    """Continues passes to their ends, and yields the state after every segment.

    An annealing that is interrupted after a segment and continued later gives the same
    result to the bit.

    Args:
      model: the model passed to `begin`.
      key: the key passed to `begin`.
      annealing: state to continue from.
      budget: the budget passed to `begin`.
      passes: names of the passes to complete, in the order of `PASSES`.
    """
    schedule = model.method.schedule
    keys = pass_keys(key)
    path = annealing_lib.annealing_path(schedule, budget.distributions)
    tempering = annealing_lib.tempering(budget.distributions, budget.tempered_std, schedule)
    at_levels = path.level - path.beta
    at_temperatures = jnp.linspace(0, TEMPERATURES - 1, len(tempering.beta))
    through_levels = compile_pass(model, path, annealing.step_size, at_levels, budget)
    tempered = compile_pass(
        model, tempering, annealing.tempered_step_size, at_temperatures, budget
    )
    for name in passes:
        compiled, settings = tempered if name == "tempered" else through_levels
        indices = path_indices(name, schedule, budget)
        total = len(indices) - 1
        size = -(-total // SEGMENTS)
        done = len(annealing.passes[name].acceptance)
        if name == "from_model" and not done:
            u = float(jax.random.uniform(keys["resample"]))
            annealing = replaced(annealing, name, unmoved(own_samples(annealing, u)))
        for first in range(done, total, size):
            move = np.arange(first, first + size)
            before = annealing.passes[name]
            # The last segment is padded with moves from the end to itself, which are dropped,
            # so that all segments run the same compiled program.
            segments = model.run(
                compiled,
                keys[name],
                np.arange(len(before.x)),
                before.x,
                move=move,
                start=indices[np.minimum(move, total)],
                end=indices[np.minimum(move + 1, total)],
                **settings,
            )
            x, *per_move = map(np.concatenate, zip(*segments, strict=True))
            made = min(size, total - first)
            log_weights, log_density, acceptance = (values[:, :made] for values in per_move)
            after = Pass(
                x=x,
                log_weights=np.concatenate([before.log_weights, log_weights], axis=1),
                log_density=np.concatenate([before.log_density, log_density], axis=1),
                acceptance=np.append(before.acceptance, acceptance.mean(axis=0)),
            )
            annealing = replaced(annealing, name, after)
            yield annealing


def replaced(annealing: Annealing, name: str, state: Pass) -> Annealing:
    """Returns the annealing with another state of one pass."""
    return annealing._replace(passes=annealing.passes | {name: state})


def compile_pass(
    model: Model,
    path: Path | Tempering,
    step_size: Float[np.ndarray, "G"],
    at: Float[Array, "R"],
    budget: Budget,
) -> tuple[Callable, dict[str, Any]]:
    """Returns the compiled program that anneals along a path, and its settings.

    Args:
      model: the model.
      path: R distributions, from a Gaussian to level 0.
      step_size: adapted step sizes, G in number.
      at: where each distribution lies among them, between 0 and G - 1
        (`annealing.interpolate_step_sizes`).
      budget: its fields transitions and leapfrog are used.
    """
    schedule = model.method.schedule

    def program(keys, conditionals, x, move, start, end, path, tuning):
        def log_q(x, i):
            return path.log_density(conditionals.F, x, i, schedule)

        sampler = Sampler(hmc.init, hmc.kernel, tuning, budget.transitions)
        return annealing_lib.anneal(keys, log_q, x, move, start, end, sampler)

    tuning = {
        "step_size": annealing_lib.interpolate_step_sizes(jnp.asarray(step_size), at),
        "leapfrog": jnp.full(at.shape, budget.leapfrog),
    }
    return model.compile(program), {"path": path, "tuning": tuning}


def own_samples(annealing: Annealing, u: float) -> Float[np.ndarray, "n *D"]:
    """Returns the ends of the chains of `levels` and `tempered`, resampled by their weights.

    All weights have the expectation Z, so the chains of both passes can be pooled into one
    weighted sample. If only one of the passes reaches a region, the region still has at least
    half of the probability in this sample that level 0 gives it.

    Args:
      annealing: the annealing, with both passes complete.
      u: random number in [0, 1).
    """
    passes = annealing.passes["levels"], annealing.passes["tempered"]
    log_w = np.concatenate([state.log_weight for state in passes])
    indices = annealing_lib.resample(log_w, len(passes[0].x), u)
    return np.concatenate([state.x for state in passes])[indices]


def path_indices(name: str, schedule: NoiseSchedule, budget: Budget) -> Int[np.ndarray, "V"]:
    """Returns the indices of the V distributions that a pass of V - 1 moves visits, in order.

    Args:
      name: one of `PASSES`; the upward passes start with the burn-in at level 0.
      schedule: the noise levels.
      budget: its fields distributions and burn_in are used.
    """
    if name == "tempered":
        return np.arange(budget.distributions + 1)
    indices = np.arange(len(annealing_lib.annealing_path(schedule, budget.distributions).level))
    if name == "levels":
        return indices
    return np.concatenate([np.full(budget.burn_in, indices[-1]), indices[::-1]])


def moves(schedule: NoiseSchedule, budget: Budget) -> int:
    """Returns the number of moves of all passes together, burn-in included."""
    return sum(len(path_indices(name, schedule, budget)) - 1 for name in PASSES)


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
      x: data that the pass `from_data` starts from.
      budget: cost of the bounds.
    """
    annealing = begin(model, key, x, budget)
    for state in annealed(model, key, annealing, budget):
        annealing = state
    return annealing.partition(budget.burn_in)


class Course(NamedTuple):
    """Course of one pass. The arrays begin at the Gaussian and end at level 0.

    Attributes:
      width: standard deviation sigma_bar of the noise of each intermediate distribution; for
        the tempered pass, the width of each hotter version of level 0 (`annealing.tempering`).
      log_Z: estimate of log Z of each distribution [nats]. For a pass that starts at the
        Gaussian, log mean w there. For a pass that starts at level 0, the pass's estimate for
        level 0 plus log mean w there.
      effective_sample_size: effective sample size of the weights w there, divided by the
        number of chains.
      acceptance: acceptance probability of the transitions there; NaN where there are none.
    """

    width: Float[np.ndarray, "R"]
    log_Z: Float[np.ndarray, "R"]
    effective_sample_size: Float[np.ndarray, "R"]
    acceptance: Float[np.ndarray, "R"]


def history(annealing: Annealing, schedule: NoiseSchedule, budget: Budget) -> dict[str, Course]:
    """Returns the course of every pass of a complete annealing, by name."""
    path = annealing_lib.annealing_path(schedule, budget.distributions)
    log_sigma_bar = np.log(np.asarray(schedule.sigma_bar, np.float64))
    level = np.asarray(path.level - path.beta)
    noise_std = np.exp(np.interp(level, np.arange(len(log_sigma_bar)), log_sigma_bar))
    tempering = annealing_lib.tempering(budget.distributions, budget.tempered_std, schedule)
    courses = {}
    for name, state in annealing.passes.items():
        up = name.startswith("from_")
        burn_in = budget.burn_in if up else 0
        terms = np.float64(state.log_weights[:, burn_in:])
        bounds = [annealing_lib.bound(log_w) for log_w in np.cumsum(terms, axis=1).T]
        log_Z = np.array([0.0, *(b.log_Z for b in bounds)])
        sizes = np.array([1.0, *(b.effective_sample_size / b.chains for b in bounds)])
        acceptance = np.append(np.nan, state.acceptance[burn_in:])
        if up:  # the pass ends at white noise, whose log Z is 0
            log_Z, sizes, acceptance = (log_Z - log_Z[-1])[::-1], sizes[::-1], acceptance[::-1]
        width = np.asarray(tempering.width) if name == "tempered" else noise_std
        courses[name] = Course(width, log_Z, sizes, acceptance)
    return courses


def log_likelihood(
    model: Model,
    key: Key[Array, ""],
    x: Num[np.ndarray, "n *D"],
    values: int | None = None,
    dequantised: bool = False,
) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"] | None]:
    """Returns log p(x_0) + log Z, and for discrete data log P(x) + log Z, per example [nats].

    x_0 is the example x with the noise of level 0 (`annealing.noisy_log_density`). If the
    data are standardised, Z is that of the standardised density, but p is the density in the
    units of the data. P(x) is the probability of x among its possible discrete values, of which
    the result is a lower bound in expectation over the noise (`annealing.log_volume`).

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

    standardisation = model.standardisation
    x = standardisation.apply(np.float32(x))
    batches = model.run(model.compile(program), key, np.arange(len(x)), x)
    log_q, log_P = map(np.concatenate, zip(*batches, strict=True))
    log_q = log_q - np.asarray(standardisation.log_volume(model.shape), log_q.dtype)
    return log_q, log_P if values else None
