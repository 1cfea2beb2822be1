"""The training state: parameters, their moving average, spectral vectors and optimiser."""

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

from drl_jax.networks.energy import Energy, Params, Vectors
from drl_jax.networks.initialiser import NAME
from drl_jax.runtime import sharding


@flax.struct.dataclass
class TrainState:
    """The state of a training run, as checkpoints store it.

    Attributes:
      step: number of training steps made.
      params: raw parameters of the network, before spectral normalisation.
      ema: exponential moving average of the raw parameters, used for generation.
      vectors: vector u of the power iteration of each spectrally normalised kernel.
      opt_state: state of the optimiser.
    """

    step: Int[Array, ""]
    params: Params
    ema: Params
    vectors: Vectors
    opt_state: optax.OptState


def learning_rate(config: ConfigDict) -> optax.Schedule:
    """Returns the learning rate of an update, given the number of updates before it.

    It increases linearly during the warm-up. After the warm-up it is constant if
    `config.optim.decay_steps` is 0. Otherwise it decays as a cosine and reaches zero at that
    step.
    """
    optim = config.optim
    schedule = _warm_up_and_decay(optim.learning_rate, optim.warmup_steps, optim.decay_steps)
    # The first update has the rate of step 0 in the authors' program, and of step 1 in ours.
    return (lambda count: schedule(count + 1)) if optim.adam == "optax" else schedule


def initialiser_learning_rate(config: ConfigDict) -> optax.Schedule:
    """Returns the initialiser's learning rate, given the number of updates before it.

    It is zero before step `config.initialiser.first_step`, and then increases linearly to
    `config.initialiser.learning_rate`. It decays in proportion to that of the energy.
    """
    own, optim = config.initialiser, config.optim
    increase = optax.join_schedules(
        [optax.constant_schedule(0.0), _warm_up_and_decay(own.learning_rate, own.warmup_steps)],
        [own.first_step],
    )
    decay = _warm_up_and_decay(1.0, optim.warmup_steps, optim.decay_steps)
    return lambda count: increase(count) * decay(jnp.maximum(count, optim.warmup_steps))


def _warm_up_and_decay(rate: float, warmup: int, end: int = 0) -> optax.Schedule:
    """Returns a linear increase, then a cosine decay to zero at step `end`, if it is > 0."""
    if end:
        after = optax.cosine_decay_schedule(rate, max(end - warmup, 1))
    else:
        after = optax.constant_schedule(rate)
    return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), after], [warmup])


def optimiser(config: ConfigDict) -> optax.GradientTransformation:
    """Returns the optimiser of all parameters.

    It is `_adam` for the energy, and Adam with `initialiser_learning_rate` for the initialiser,
    if there is one. The gradient of each network is limited to the norm
    `config.optim.clip_norm`.
    """
    energy = _clipped(_adam(config), config.optim.clip_norm)
    if config.initialiser.network == "none":
        return energy
    own = optax.adam(initialiser_learning_rate(config), b1=config.optim.beta1)

    def network(params: Params) -> dict[str, str]:
        return {name: NAME if name == NAME else "energy" for name in params}

    networks = {"energy": energy, NAME: _clipped(own, config.optim.clip_norm)}
    return optax.partition(networks, network)


def _clipped(
    optimiser: optax.GradientTransformation, norm: float
) -> optax.GradientTransformation:
    """Returns the optimiser of gradients that are scaled down to a norm, if it is > 0.

    Its state has the same form for all norms, so a run can resume with another one.
    """
    if not norm:
        return optimiser
    clip = optax.clip_by_global_norm(norm)

    def update(grads, state, params=None):
        grads, _ = clip.update(grads, clip.init(grads))
        return optimiser.update(grads, state, params)

    return optax.GradientTransformation(optimiser.init, update)


def _adam(config: ConfigDict) -> optax.GradientTransformation:
    """Returns Adam with the schedule `learning_rate` (Gao et al. 2021, appendix B).

    Update n = 1, 2, ... is -rate · m_hat / (sqrt(v_hat) + epsilon), with the moments
    m_hat = m / (1 - b1^n) and v_hat = v / (1 - b2^n). `config.optim.adam` selects:

    - 'keras', as in the authors' program: epsilon = 1e-7 / sqrt(1 - b2^n), because Keras adds
      1e-7 to sqrt(v); the rate is that of step n - 1, so the first update is zero if there is
      a warm-up.
    - 'optax', as in earlier versions of this program: epsilon = 1e-8; the rate is that of
      step n.

    The state of the optimiser has the same form with both.
    """
    rate = learning_rate(config)
    if config.optim.adam == "optax":
        return optax.adam(rate, b1=config.optim.beta1)
    return optax.chain(
        _scale_by_keras_adam(config.optim.beta1), optax.scale_by_learning_rate(rate)
    )


def _scale_by_keras_adam(b1: float) -> optax.GradientTransformation:
    """Returns Adam with b2 = 0.999 that adds 1e-7 to sqrt(v), before v's bias is corrected."""
    b2 = 0.999

    def update(grads, state, params=None):
        epsilon = 1e-7 / jnp.sqrt(1 - b2 ** (state.count + 1))
        return optax.scale_by_adam(b1, b2, eps=epsilon).update(grads, state, params)

    return optax.GradientTransformation(optax.scale_by_adam(b1, b2).init, update)


def create(
    key: Key[Array, ""], energy: Energy, optimiser: optax.GradientTransformation
) -> TrainState:
    """Returns the state before the first step.

    Args:
      key: random key of the initial parameters.
      energy: the network.
      optimiser: the optimiser, as returned by `optimiser`.
    """
    params, vectors = energy.init(key)
    # A copy, because the step donates its state and one buffer cannot be donated twice.
    ema = jax.tree.map(jnp.copy, params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=ema,
        vectors=vectors,
        opt_state=optimiser.init(params),
    )


def create_on(
    mesh: Mesh,
    key: Key[Array, ""],
    energy: Energy,
    optimiser: optax.GradientTransformation,
) -> TrainState:
    """Returns the state that `create` returns, sharded over the devices of a mesh."""
    make = jax.jit(
        lambda key: create(key, energy, optimiser),
        out_shardings=shardings(energy, optimiser, mesh),
        compiler_options=sharding.compiler_options(mesh, runs_once=True),
    )
    return make(key)


def abstract(energy: Energy, optimiser: optax.GradientTransformation) -> TrainState:
    """Returns the shapes and dtypes of a state, as `jax.ShapeDtypeStruct`s."""
    return jax.eval_shape(
        functools.partial(create, energy=energy, optimiser=optimiser), jax.random.key(0)
    )


def shardings(energy: Energy, optimiser: optax.GradientTransformation, mesh: Mesh) -> Any:
    """Returns the sharding of each array of a state (`sharding.fully_sharded`)."""
    return jax.tree.map(
        lambda array: sharding.fully_sharded(array.shape, mesh), abstract(energy, optimiser)
    )


def replicated_kernels(params: Params, mesh: Mesh) -> list[str]:
    """Returns the paths of kernels of which no axis can be split over the `fsdp` devices."""
    flat = traverse_util.flatten_dict(params, sep="/")
    return [
        path
        for path, array in flat.items()
        if mesh.shape[sharding.FSDP] > 1
        and array.ndim > 1
        and sharding.fully_sharded(array.shape, mesh).is_fully_replicated
    ]
