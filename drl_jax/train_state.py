"""Everything that training carries from one step to the next."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key
from ml_collections import ConfigDict

from drl_jax import parallel
from drl_jax.energies.energy import Energy, Params, Vectors


@flax.struct.dataclass
class TrainState:
    """The state of a run: what a checkpoint holds.

    Attributes:
      step: training steps done.
      params: the network's raw parameters (before spectral normalisation).
      ema: their exponential moving average, used to generate.
      vectors: u of every spectral power iteration.
      opt_state: of the optimiser.
    """

    step: Int[Array, ""]
    params: Params
    ema: Params
    vectors: Vectors
    opt_state: optax.OptState


def optimiser(config: ConfigDict) -> optax.GradientTransformation:
    """Returns Adam with a linear warm-up (Gao et al. 2021, appendix B).

    After the warm-up the learning rate is constant, or falls as a cosine to zero at step
    `config.optim.decay_steps` if that is not zero.
    """
    rate, warmup, end, b1 = (
        config.optim[name] for name in ("learning_rate", "warmup_steps", "decay_steps", "beta1")
    )
    after = (
        optax.cosine_decay_schedule(rate, end - warmup)
        if end
        else optax.constant_schedule(rate)
    )
    schedule = optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), after], [warmup])
    return optax.adam(lambda count: schedule(count + 1), b1=b1)


def abstract(energy: Energy, optimiser: optax.GradientTransformation) -> TrainState:
    """Returns the shapes and dtypes of a state."""
    return jax.eval_shape(
        functools.partial(create, energy=energy, optimiser=optimiser), jax.random.key(0)
    )


def shardings(energy: Energy, optimiser: optax.GradientTransformation, mesh: Mesh) -> Any:
    """Returns the shardings of a state's arrays (`parallel.fully_sharded`)."""
    return jax.tree.map(
        lambda array: parallel.fully_sharded(array.shape, mesh), abstract(energy, optimiser)
    )


def kept_whole(params: Params, mesh: Mesh) -> list[str]:
    """Returns the paths of kernels that no `fsdp` devices of the mesh can share equally."""
    flat = traverse_util.flatten_dict(params, sep="/")
    return [
        path
        for path, array in flat.items()
        if mesh.shape[parallel.FSDP] > 1
        and array.ndim > 1
        and parallel.fully_sharded(array.shape, mesh).is_fully_replicated
    ]


def create_on(
    mesh: Mesh,
    key: Key[Array, ""],
    energy: Energy,
    optimiser: optax.GradientTransformation,
) -> TrainState:
    """Returns what `create` does, on the devices of a mesh as `shardings` says."""
    make = jax.jit(
        lambda key: create(key, energy, optimiser),
        out_shardings=shardings(energy, optimiser, mesh),
        compiler_options=parallel.compiler_options(mesh, runs_once=True),
    )
    return make(key)


def create(
    key: Key[Array, ""], energy: Energy, optimiser: optax.GradientTransformation
) -> TrainState:
    """Returns the state before the first step."""
    params, vectors = energy.init(key)
    # Copied: the step donates its state, and one buffer cannot be donated twice.
    ema = jax.tree.map(jnp.copy, params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=ema,
        vectors=vectors,
        opt_state=optimiser.init(params),
    )
