"""Held-out bits per dimension of a normalising flow, to compare those of an energy with.

    python -m drl_jax.tools.flow [--config=configs/digits_density.py] [--seconds=80] [--seed=0]

The density of a flow is exact. This one is a masked autoregressive flow (Papamakarios et al.
2017) by the package flowjax, which has to be installed. It learns the training images of the
configuration with the noise of level 0, by maximum likelihood, for --seconds of CPU time
(wall-clock time on accelerators); compilation does not count. Every batch has new noise.
A tenth of the training images is set aside; the parameters with the highest likelihood of these
are used.

The result is the same upper bound of the bits per dimension of the held-out images that
--mode=likelihood reports for an energy (`sampling.annealing.log_volume`).
"""

import functools
import importlib
import logging
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from jaxtyping import Array, Float, Key

from drl_jax import config as config_lib
from drl_jax import diffusion, noise
from drl_jax.data import pipeline, sources
from drl_jax.diffusion import NoiseSchedule
from drl_jax.errors import UserError, not_installed
from drl_jax.sampling import annealing
from drl_jax.tools import command

log = logging.getLogger("drl_jax.tools.flow")  # __name__ is __main__

BATCH = 128  # images per training step
CHECK_EVERY = 50  # steps between two evaluations on the images that are set aside
LEARNING_RATE = 1e-3
# Of the flow: layers, and width and depth of the network in each.
LAYERS, WIDTH, DEPTH = 6, 128, 1

# x [n, D] -> log-density of each example [n], in nats
LogProb = Callable[[Float[Array, "n D"]], Float[Array, "n"]]


def noisy(
    key: Key[Array, ""], x: Float[Array, "n *D"], schedule: NoiseSchedule
) -> Float[Array, "n *D"]:
    """Returns x with the noise of level 0."""
    keys = noise.example_keys(key, jnp.arange(len(x)))
    return diffusion.diffuse(keys, x, jnp.zeros(len(x), jnp.int32), schedule)


def bits_per_dim(
    log_prob: LogProb,
    key: Key[Array, ""],
    x: Float[np.ndarray, "n H W C"],
    values: int,
    schedule: NoiseSchedule,
) -> tuple[float, float]:
    """Returns an upper bound of -log2 P(x) / D, and its standard error over the images.

    Args:
      log_prob: density of images with the noise of level 0, as vectors.
      key: random key of the noise.
      x: images in [-1, 1].
      values: number of possible values of a pixel.
      schedule: noise levels.
    """
    x_0 = noisy(key, jnp.asarray(x), schedule)
    volume = annealing.log_volume(x_0, values, False, schedule)
    nats = np.float64(log_prob(x_0.reshape(len(x), -1)) + volume)
    bits = -nats / (x[0].size * math.log(2))
    return float(bits.mean()), float(bits.std() / len(x) ** 0.5)


def train(
    key: Key[Array, ""],
    x: Float[np.ndarray, "n H W C"],
    schedule: NoiseSchedule,
    seconds: float,
) -> LogProb:
    """Trains a flow and returns its log-density.

    Args:
      key: random key.
      x: training images.
      schedule: noise levels.
      seconds: training time [s].

    Raises:
      UserError: if flowjax is not installed, there are too few images, or training diverges.
    """
    try:
        flows, distributions, eqx, paramax = map(
            importlib.import_module,
            ("flowjax.flows", "flowjax.distributions", "equinox", "paramax"),
        )
    except ImportError as error:
        raise not_installed("training a flow", "flowjax") from error
    D = x[0].size
    flow_key, run_key = jax.random.split(key)
    flow = flows.masked_autoregressive_flow(
        flow_key,
        base_dist=distributions.Normal(jnp.zeros(D)),
        flow_layers=LAYERS,
        nn_width=WIDTH,
        nn_depth=DEPTH,
    )
    params, static = eqx.partition(
        flow, eqx.is_inexact_array, is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable)
    )

    def log_prob(params: Any, x: Float[Array, "n D"]) -> Float[Array, "n"]:
        return paramax.unwrap(eqx.combine(params, static)).log_prob(x)

    def loss(params: Any, key: Key[Array, ""], x: Float[Array, "n H W C"]) -> Any:
        return -jnp.mean(log_prob(params, noisy(key, x, schedule).reshape(len(x), -1)))

    optimiser = optax.adam(LEARNING_RATE)
    aside = len(x) // 10
    validation, images = jnp.asarray(x[:aside]), jnp.asarray(x[aside:])
    if len(images) < BATCH or not aside:
        raise UserError(f"{len(x)} training images are too few for batches of {BATCH}")

    @jax.jit
    def steps(params, state, key, first):
        def step(carry, i):
            params, state = carry
            step_key = jax.random.fold_in(key, i)
            chosen = jax.random.choice(step_key, images, (BATCH,), replace=False)
            grads = jax.grad(loss)(params, step_key, chosen)
            updates, state = optimiser.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(
            step, (params, state), first + jnp.arange(CHECK_EVERY)
        )
        return params, state, loss(params, key, validation)

    state = optimiser.init(params)
    compiled = steps.lower(params, state, run_key, 0).compile()
    best, best_loss, best_step, done, start = params, math.inf, 0, 0, command.clock()
    while command.clock() - start < seconds:
        params, state, validation_loss = jax.block_until_ready(
            compiled(params, state, run_key, done)
        )
        done += CHECK_EVERY
        if validation_loss < best_loss:
            best, best_loss, best_step = params, float(validation_loss), done
    if not best_step:
        raise UserError(f"training diverged in {done} steps; try another --seed")
    log.info("%d steps; the parameters after step %d are used", done, best_step)
    return functools.partial(jax.jit(log_prob), best)


def run(config_name: str, seconds: float, seed: int) -> tuple[float, float]:
    """Trains a flow on the data of a configuration, and returns what `bits_per_dim` returns.

    Raises:
      UserError: if the configuration or the data cannot be used, or flowjax is not installed.
    """
    config = config_lib.load(config_name)
    config_lib.validate(config)
    source, held_out = sources.open_source(config), sources.open_held_out(config)
    if config.data.dequantise or not source.white:
        raise UserError(
            f"{config_name}: this program needs images, and config.data.dequantise to be 0"
        )
    if not held_out.held_out:
        raise UserError(f"{config_name}: set config.data.test_fraction, such as 0.2")
    schedule = diffusion.schedule(
        config.diffusion.T, config.diffusion.schedule, config.diffusion.min_noise
    )
    train_key, data_key = jax.random.split(jax.random.key(seed))
    log_prob = train(train_key, pipeline.load_examples(config, source), schedule, seconds)
    x = pipeline.load_examples(config, held_out)
    return bits_per_dim(log_prob, data_key, x, round(source.white) + 1, schedule)


def define_flags() -> flags.FlagValues:
    """Returns this program's flags, unparsed and separate from those of `drl_jax.main`."""
    values = flags.FlagValues()
    flags.DEFINE_string(
        "config",
        "digits_density",
        "Configuration with the data and the noise of level 0 (default: digits_density).",
        flag_values=values,
    )
    flags.DEFINE_float(
        "seconds", 80.0, "Training time [s] (default: 80).", 1, flag_values=values
    )
    flags.DEFINE_integer("seed", 0, "Random seed (default: 0).", 0, flag_values=values)
    return values


def main(argv: Sequence[str]) -> int:
    """Prints the result and returns the exit status."""
    values = define_flags()

    def tool() -> None:
        bits, error = run(values.config, values.seconds, values.seed)
        print(f"{bits:.3f} bits per dimension, standard error over the images {error:.3f}")

    return command.execute(tool, values, argv, __doc__)


if __name__ == "__main__":
    command.set_up()
    sys.exit(main(sys.argv))
