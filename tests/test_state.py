import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from drl_jax import config as config_lib
from drl_jax.networks.energy import Energy
from drl_jax.runtime import sharding
from drl_jax.training import state as train_state

ENERGY = Energy(
    init=lambda key: ({"kernel": jax.random.normal(key, (2, 3))}, {"kernel": jnp.ones(3)}),
    normalise=lambda params, vectors: (params, vectors),
    f=lambda params, x, t: jnp.sum(x @ params["kernel"], axis=1),
    shape=(2,),
)


def learning_rates(num_steps, **optim):
    """Returns Adam's updates at a constant gradient, which are the learning rates."""
    config = config_lib.default()
    config.optim.update(optim)
    optimiser = train_state.optimiser(config)
    params = jnp.zeros(1)
    opt_state = optimiser.init(params)
    rates = []
    for _ in range(num_steps):
        update, opt_state = optimiser.update(jnp.ones(1), opt_state, params)
        rates.append(-float(update[0]))
    return rates


# Learning rate at the first update: the authors' schedule starts at step 0, ours at step 1.
FIRST = {"keras": 0, "optax": 1}


@pytest.mark.parametrize("adam", FIRST)
def test_warm_up_increases_the_learning_rate_linearly_and_then_keeps_it_constant(adam):
    rates = learning_rates(6, learning_rate=1e-2, warmup_steps=4, adam=adam)
    expected = np.array([0, 0.25e-2, 0.5e-2, 0.75e-2, 1e-2, 1e-2, 1e-2])[FIRST[adam] :][:6]
    np.testing.assert_allclose(rates, expected, rtol=1e-4)


@pytest.mark.parametrize("adam", FIRST)
def test_learning_rate_decays_as_a_cosine_to_zero_after_the_warm_up(adam):
    rates = learning_rates(6, learning_rate=1.0, warmup_steps=2, decay_steps=6, adam=adam)
    expected = [0, 0.5, *(0.5 * (1 + np.cos(np.pi * np.arange(5) / 4)))][FIRST[adam] :][:6]
    np.testing.assert_allclose(rates, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("adam", FIRST)
def test_a_decay_that_ends_during_the_warm_up_ends_with_the_warm_up(adam):
    rates = learning_rates(6, learning_rate=1.0, warmup_steps=4, decay_steps=3, adam=adam)
    expected = [0, 0.25, 0.5, 0.75, 1, 0, 0][FIRST[adam] :][:6]
    np.testing.assert_allclose(rates, expected, rtol=1e-4, atol=1e-6)


def test_the_gradient_is_averaged_with_decay_beta1():
    """After the gradients 1 and -1, Adam's mean is (b (1 - b) - (1 - b)) / (1 - b²)."""
    config = config_lib.default()
    config.optim.update(beta1=0.5, learning_rate=1.0, warmup_steps=0)
    optimiser = train_state.optimiser(config)
    params = jnp.zeros(1)
    opt_state = optimiser.init(params)
    for gradient in (1.0, -1.0):
        update, opt_state = optimiser.update(jnp.full(1, gradient), opt_state, params)
    np.testing.assert_allclose(update, 1 / 3, rtol=1e-4)


def trajectory(update, num_steps):
    """Returns the parameters [num_steps, 5] after each update, from zero.

    The gradients are about 1e-9 to 1, so that epsilon determines some updates and not others.
    """
    gradients = np.random.default_rng(0).normal(1, 0.5, (num_steps, 5))
    gradients = np.float32(gradients * [1e-9, 1e-8, 1e-7, 1e-6, 1])
    return np.stack([update(gradient) for gradient in gradients])


def test_adam_is_that_of_the_authors_program():
    """Compares with Keras. Fails if epsilon is 1e-8, or added to the unbiased square root."""
    import tensorflow as tf

    class WarmUp(tf.keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return 1e-4 * tf.minimum(1.0, tf.cast(step, tf.float32) / 4)

    theirs = tf.keras.optimizers.Adam(learning_rate=WarmUp(), beta_1=0.5)
    variable = tf.Variable(np.zeros(5, np.float32))

    def their_update(gradient):
        theirs.apply_gradients([(tf.constant(gradient), variable)])
        return variable.numpy()

    config = config_lib.default()
    config.optim.warmup_steps, config.optim.beta1 = 4, 0.5
    ours = train_state.optimiser(config)
    params = jnp.zeros(5)
    opt_state = ours.init(params)

    def our_update(gradient):
        nonlocal params, opt_state
        updates, opt_state = ours.update(jnp.asarray(gradient), opt_state, params)
        params = optax.apply_updates(params, updates)
        return np.asarray(params)

    expected = trajectory(their_update, 12)
    assert not np.any(expected[0])  # the learning rate of the first update is zero
    assert np.all(expected[1:])
    np.testing.assert_allclose(trajectory(our_update, 12), expected, rtol=2e-4)


def test_adam_of_earlier_versions_is_that_of_optax():
    """Its epsilon is 1e-8, added to the unbiased square root of the second moment."""
    config = config_lib.default()
    config.optim.update({"warmup_steps": 0, "beta1": 0.5, "adam": "optax"})
    params = jnp.zeros(5)
    trajectories = []
    for optimiser in (train_state.optimiser(config), optax.adam(1e-4, b1=0.5, eps=1e-8)):
        opt_state = optimiser.init(params)

        def update(gradient, optimiser=optimiser):
            nonlocal opt_state
            updates, opt_state = optimiser.update(jnp.asarray(gradient), opt_state, params)
            return np.asarray(updates)

        trajectories.append(trajectory(update, 12))
    np.testing.assert_array_equal(*trajectories)


def test_both_kinds_of_adam_have_the_same_state():
    config = config_lib.default()
    states = []
    for adam in ("keras", "optax"):
        config.optim.adam = adam
        states.append(train_state.optimiser(config).init({"kernel": jnp.zeros((2, 3))}))
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])


def test_a_new_state_averages_its_initial_parameters_in_arrays_of_their_own():
    state = train_state.create(jax.random.key(0), ENERGY, optax.adam(1e-3))
    assert state.step == 0
    jax.tree.map(np.testing.assert_array_equal, state.ema, state.params)
    average, param = state.ema["kernel"], state.params["kernel"]
    assert average.unsafe_buffer_pointer() != param.unsafe_buffer_pointer()


def test_an_abstract_state_has_the_shapes_and_dtypes_of_a_new_state():
    def shapes(state):
        return jax.tree.map(lambda array: (array.shape, array.dtype), state)

    optimiser = optax.adam(1e-3)
    state = train_state.create(jax.random.key(0), ENERGY, optimiser)
    assert shapes(train_state.abstract(ENERGY, optimiser)) == shapes(state)


def test_replicated_kernels_are_those_without_an_axis_that_the_devices_divide():
    params = {
        "block": {"kernel": jnp.zeros((3, 3, 8, 16)), "bias": jnp.zeros(5)},
        "conv_in": {"kernel": jnp.zeros((3, 3, 1, 5))},
    }
    (device, *_) = jax.devices()
    for fsdp, replicated in ((2, ["conv_in/kernel"]), (1, [])):
        # Only the numbers of devices along the axes of the mesh matter here.
        mesh = Mesh(np.array([[device] * fsdp]), sharding.AXES)
        assert train_state.replicated_kernels(params, mesh) == replicated
