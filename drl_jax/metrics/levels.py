"""Statistics of each level's energy, on data and on the ends of chains that sample it."""

import logging
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, Num

from drl_jax import diffusion, noise, recovery
from drl_jax.model import Model
from drl_jax.sampling import ladder

log = logging.getLogger(__name__)

STATISTICS = ("f_data", "f_chain", "displacement", "acceptance")
MAX_RESOLUTION = 0.1  # of F [nats]; a ratio of densities is then wrong by about 10%


def level_statistics(
    model: Model, key: Key[Array, ""], x: Float[np.ndarray, "n *D"]
) -> dict[str, list[int | float]]:
    """Returns the statistics of each level, as means over the data.

    Every example is diffused to a level t (y, `recovery.positives`) and to level t + 1
    (x_tilde). A chain samples p(y | x_tilde), as in generation.

    With many levels, only the first of each of the `diffusion.level_groups` is evaluated.

    Args:
      model: the model.
      key: random key.
      x: data, images in [-1, 1] or points.

    Returns:
      lists with one number per evaluated level:
        level: t.
        f_data: f(y, t).
        f_chain: f at the end of the chain; equal to f_data once the level has been learned.
        displacement: Euclidean distance between x_tilde and the end of the chain.
        acceptance: acceptance probability of the chain.
        resolution: resolution of F at y in float32 [nats], see `resolution`.
    """
    method, engine = model.method, model.engine

    def program(shared, examples):
        params, tuning, key, level = shared
        indices, x = examples
        keys = noise.example_keys(key, indices)
        t = jnp.full(indices.shape, level)
        y_pos, x_tilde = recovery.positives(noise.fold(keys, 0), x, t, method.schedule)
        y_neg, acceptance = ladder.sample_conditional(
            noise.fold(keys, 1), method.conditionals(params, tuning), x_tilde, t
        )
        f = method.f(params)
        moved = recovery.displacement(y_neg, x_tilde)
        return f(y_pos, t), f(y_neg, t), moved, acceptance

    compiled = engine.compile(program)
    x = model.standardisation.apply(x)
    levels = [group[0] for group in diffusion.level_groups(method.schedule.T)]
    statistics: dict[str, list[int | float]] = {"level": [*levels]}
    statistics |= {name: [] for name in (*STATISTICS, "resolution")}
    temperature = np.asarray(method.parameterisation.temperature)
    for level in levels:
        shared = model.params, method.sampler.tuning, jax.random.fold_in(key, level), level
        batches = engine.run(compiled, shared, engine.split((np.arange(len(x)), x)))
        for name, values in zip(STATISTICS, zip(*batches, strict=True), strict=True):
            all_values = np.concatenate(values)
            statistics[name].append(float(np.mean(all_values)))
            if name == "f_data":
                statistics["resolution"].append(resolution(all_values, temperature[level]))
    return statistics


def resolution(f: Num[np.ndarray, "n"], temperature: float | np.floating) -> float:
    """Returns the resolution of a level's log-density F in float32 [nats].

        resolution = median over the examples of spacing(|f|) · dF/df,   dF/df = 1 / tau_t

    where spacing(v) is the distance from v to the next larger float32 number, between 2^-24 v
    and 2^-23 v. Smaller differences of F are lost. This is a lower estimate of the errors of F:
    it includes neither the rounding inside the network, nor that of F itself, which is up to
    twice as coarse.

    Args:
      f: output of the network at typical positions of the level.
      temperature: tau_t of the level (`recovery.Parameterisation`).
    """
    return float(np.median(np.spacing(np.abs(np.float32(f)))) / np.float64(temperature))


def warn_of_rounding(levels: Sequence[int | float], resolutions: Sequence[float]) -> None:
    """Warns if the resolution of F exceeds `MAX_RESOLUTION` at a level.

    This matters where differences of F are exponentiated: in the accept decisions of MALA and
    HMC, and in the weights of annealed importance sampling.

    Args:
      levels: numbers of the levels.
      resolutions: resolution of F at each of them [nats].
    """
    worst = int(np.argmax(resolutions))
    if resolutions[worst] > MAX_RESOLUTION:
        log.warning(
            "in float32, F of level %d has a resolution of only %.2g nats: accept decisions "
            "and annealing weights of this level have rounding errors of at least that size",
            levels[worst],
            resolutions[worst],
        )
