"""The initialiser: where chains start, what it learns from their ends, and its optimiser.

"Fails" in a docstring names bugs that were introduced on purpose to see the test fail.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.gaussian_ladder import (
    CONDITIONALS,
    DATA,
    LANGEVIN,
    MEAN,
    SCHEDULE,
    VARIANCE,
    exact_F,
    marginal_moments,
)
from helpers.statistical import assert_mean, assert_variance

from drl_jax import config as config_lib
from drl_jax import diffusion, noise, recovery
from drl_jax import method as method_lib
from drl_jax.data import mixtures
from drl_jax.errors import UserError
from drl_jax.mcmc import langevin
from drl_jax.method import Method
from drl_jax.model import Model
from drl_jax.networks import initialiser
from drl_jax.networks.energy import Energy
from drl_jax.networks.image_mlp import ImageMLP
from drl_jax.recovery import Parameterisation
from drl_jax.runtime import sharding
from drl_jax.sampling import inpainting, ladder
from drl_jax.sampling.ladder import Conditionals, Sampler
from drl_jax.training import state as train_state
from drl_jax.training import step as train_step

LEVELS = SCHEDULE.conditioning[1:]
FIELDS = {
    "network": "unet",
    "ch": 8,
    "mult": (1,),
    "N": 1,
    "groups": 4,
    "dropout": 0.2,
    "learning_rate": 1e-3,
}


def with_initialiser(**changes):
    """Returns a configuration of a small model for 4x4 images with an initialiser."""
    config = config_lib.default()
    config.data.image_size, config.data.channels = 4, 1
    config.energy.ch, config.energy.mult, config.energy.N = 8, (1,), 1
    config.mcmc.K, config.mcmc.start = 2, "initialiser"
    config.initialiser.update(FIELDS)
    config.update_from_flattened_dict(changes)
    return config


class Affine(nn.Module):
    """g = w_t x_tilde + b_t: what the initialiser can be at best where F is quadratic."""

    @nn.compact
    def __call__(self, x, level, keys=None):
        del keys
        t = jnp.argmin(jnp.abs(level[:, None] - LEVELS), axis=1)
        w = self.param("w", nn.initializers.zeros, (6,))
        b = self.param("b", nn.initializers.zeros, (6,))
        return w[t, None] * x + b[t, None]


def gaussian_method(K=10):
    """Returns a method for independent Gaussian numbers, with the exact F and `Affine`."""
    tuning = {"step_size": 0.5 * SCHEDULE.sigma[1:], "noise_scale": jnp.ones(6)}
    sampler = Sampler(langevin.init, langevin.kernel, tuning, K, ladder.STARTS["initialiser"])
    network = initialiser.from_network(Affine(), (4,), LEVELS)
    energy = Energy(
        init=lambda key: ({"scale": jnp.ones(())}, {}),
        normalise=lambda params, vectors: (params, vectors),
        f=lambda params, y, t, keys=None: params["scale"] * exact_F(y, t),
        shape=(4,),
    )
    parameterisation = Parameterisation(jnp.ones(6), recovery.no_reference)
    return Method(
        initialiser.joined(energy, network),
        SCHEDULE,
        parameterisation,
        sampler,
        initialiser=network,
    )


def conditional_moments(t):
    """Returns (slope, intercept, variance): the mean of p(y | x_tilde) is affine in x_tilde."""
    mean, variance = (float(v) for v in marginal_moments(jnp.array(t)))
    sigma2 = np.inf if t == 5 else float(SCHEDULE.sigma[t + 1]) ** 2
    slope = variance / (variance + sigma2)
    return slope, (1 - slope) * mean, (1 - slope) * variance


@pytest.mark.slow
def test_the_initialiser_learns_the_mean_of_the_conditional():
    """With a quadratic F, the mean of the chains' ends is that of their starts only there.

    Where the chain starts at g plus noise, the loss is stationary if the chain does not move
    the mean, which is then that of the exact conditional: an affine function of x_tilde.
    Fails if the loss has the wrong sign, or x_tilde is the target.
    """
    method = gaussian_method()
    params, _ = method.energy.init(jax.random.key(0))
    B = 3000

    def step(params, i):
        keys = noise.example_keys(jax.random.key(1), i * B + jnp.arange(B))
        x = MEAN + VARIANCE**0.5 * noise.normal(noise.fold(keys, 5), (4,))
        grads, _ = train_step.recovery_gradient(keys, params, x, jnp.arange(B) % 6, method)
        grads[initialiser.NAME] = jax.tree.map(lambda g: -0.2 * g, grads[initialiser.NAME])
        own = optax.apply_updates(params[initialiser.NAME], grads[initialiser.NAME])
        return params | {initialiser.NAME: own}, own

    _, trace = jax.jit(lambda p: jax.lax.scan(step, p, jnp.arange(400)))(params)
    for t in range(6):
        slope, intercept, _ = conditional_moments(t)
        w, b = (np.asarray(trace[name][200:, t]).mean() for name in ("w", "b"))
        np.testing.assert_allclose(1 + w, slope, atol=0.02)
        np.testing.assert_allclose(b, intercept, atol=0.02)


def test_starts_have_the_mean_of_the_proposal_and_the_variance_of_the_posterior():
    """Fails if the noise is that of x_t where it should be that of y, or scaled at the top."""
    n = 100_000

    def propose(x_tilde, t):
        return 0.5 * x_tilde + t[:, None]

    conditionals = CONDITIONALS._replace(propose=propose)
    for t in range(6):
        keys = noise.example_keys(jax.random.key(t), jnp.arange(n))
        levels = jnp.full(n, t)
        x_tilde = jnp.ones((n, 1))
        y = ladder.start_from_initialiser(keys, conditionals, x_tilde, levels)
        a, sigma, _, sigma_bar = (np.float64(v) for v in jax.tree.leaves(SCHEDULE))
        std = sigma[t + 1] * sigma_bar[t] / sigma_bar[t + 1] * (a[t + 1] if t < 5 else 1)
        assert_mean(y[:, 0], 0.5 + t, std**2, of=12)
        assert_variance(y[:, 0], 0.5 + t, std**2, of=12)


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0.0, 2.0])
def test_long_chains_have_the_same_limit_from_any_start(offset):
    """Compares with the stationary distribution of Langevin steps on the exact conditional.

    Its mean is the exact one, and its variance s² / (1 - r²), with r = 1 - s² / (2 variance).
    Fails if the chain's target contains the proposal.
    """
    n, K = 20_000, 200
    step_size = 0.4 * SCHEDULE.sigma[1:]
    tuning = {"step_size": step_size, "noise_scale": jnp.ones(6)}
    sampler = Sampler(langevin.init, langevin.kernel, tuning, K, ladder.STARTS["initialiser"])
    conditionals = Conditionals(
        exact_F, SCHEDULE, sampler, propose=lambda x_tilde, t: x_tilde + offset
    )
    draw = jax.jit(lambda *args: ladder.sample_conditional(args[0], conditionals, *args[1:])[0])
    for t in (0, 2, 4):
        keys = noise.example_keys(jax.random.key(t), jnp.arange(n))
        y = draw(keys, jnp.ones((n, 1)), jnp.full(n, t))[:, 0]
        slope, intercept, variance = conditional_moments(t)
        s2 = float(step_size[t]) ** 2
        variance = s2 / (1 - (1 - s2 / (2 * variance)) ** 2)
        assert_mean(y, slope + intercept, variance, of=6)
        assert_variance(y, slope + intercept, variance, of=6)


@pytest.mark.parametrize("T", [1, 6])
def test_denoised_is_the_mean_of_gaussian_data(T):
    """Fails if the score is that of y and not of x_0, or without division by a_bar_0."""
    schedule = diffusion.schedule(T, "cosine")
    conditionals = Conditionals(mixtures.exact_F(DATA, schedule), schedule, LANGEVIN)
    x_0 = jnp.linspace(-1, 1, 7)[:, None]
    a_bar, sigma_bar = float(schedule.a_bar[0]), float(schedule.sigma_bar[0])
    gain = a_bar * VARIANCE / (a_bar**2 * VARIANCE + sigma_bar**2)
    expected = MEAN + gain * (x_0 - a_bar * MEAN)
    np.testing.assert_allclose(ladder.denoised(conditionals, x_0), expected, atol=1e-6)


def test_generated_and_completed_examples_are_denoised_only_on_request():
    keys = noise.example_keys(jax.random.key(0), jnp.arange(5))
    sampler = LANGEVIN._replace(denoise=1.0)
    denoising = CONDITIONALS._replace(sampler=sampler)
    x_0, clean = (ladder.generate(keys, c, (2,)) for c in (CONDITIONALS, denoising))
    np.testing.assert_allclose(clean, ladder.denoised(CONDITIONALS, x_0), rtol=1e-5)
    assert np.max(np.abs(clean - x_0)) > 1e-6
    twice = CONDITIONALS._replace(sampler=LANGEVIN._replace(denoise=2.0))
    a_bar = SCHEDULE.a_bar[0]
    expected = x_0 + 2 * (a_bar * clean - x_0)
    np.testing.assert_allclose(a_bar * ladder.generate(keys, twice, (2,)), expected, atol=1e-6)
    x, known = jnp.ones((5, 2)), jnp.tile(jnp.array([True, False]), (5, 1))
    x_0, clean = (inpainting.inpaint(keys, c, x, known, 1) for c in (CONDITIONALS, denoising))
    np.testing.assert_array_equal(clean[:, 0], 1)
    expected = ladder.denoised(CONDITIONALS, x_0)[:, 1]
    np.testing.assert_allclose(clean[:, 1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_loss_is_the_squared_distance_from_the_start_of_the_chain_to_its_end():
    """Compares loss and gradient with a direct computation, with dropout.

    Fails if the start in the loss has other noise or other dropout than that of the chain, or
    the gradient contains that of the energy's loss.
    """
    config = with_initialiser()
    method, B = method_lib.from_config(config), 12
    keys = jax.random.split(jax.random.key(0), B)
    x = jax.random.uniform(jax.random.key(1), (B, 4, 4, 1), minval=-1, maxval=1)
    t = jnp.arange(B, dtype=jnp.int32) % 6
    params, vectors = method.energy.init(jax.random.key(2))
    params = jax.tree.map(
        lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size).reshape(p.shape)), params
    )
    params, _ = method.energy.normalise(params, vectors)
    grads, statistics = jax.jit(
        lambda params: train_step.from_config(config).objective(keys, params, x, t, method)
    )(params)

    @jax.jit
    def direct(params):
        _, x_tilde = recovery.positives(noise.fold(keys, 1), x, t, SCHEDULE)
        chain_keys, dropout_keys = noise.fold(keys, 2), noise.fold(keys, 3)

        def start(own):
            z = noise.normal(noise.fold(chain_keys, ladder.START), x.shape[1:])
            std = SCHEDULE.y_scale(t) * diffusion.posterior_std(t, SCHEDULE)
            return (
                method.initialiser.g(own, x_tilde, t, dropout_keys)
                + noise.per_example(std, z) * z
            )

        own = params[initialiser.NAME]
        log_density = method.conditionals(params).log_density_fn(x_tilde, t)
        y_neg, _ = ladder.run_chain(
            chain_keys, method.sampler, log_density, start(own), t, jnp.arange(2)
        )

        def loss(own):
            return jnp.sum((y_neg - start(own)) ** 2, axis=(1, 2, 3))

        f_neg = method.energy.f(params, y_neg, t)
        return loss(own), jax.grad(lambda own: jnp.mean(loss(own)))(own), f_neg

    loss, own_grads, f_neg = direct(params)
    np.testing.assert_allclose(statistics.initialiser_loss, loss, rtol=1e-3)
    np.testing.assert_allclose(statistics.f_neg, f_neg, rtol=1e-3, atol=1e-4)
    jax.tree.map(
        lambda g, e: np.testing.assert_allclose(g, e, rtol=5e-3, atol=1e-5),
        grads[initialiser.NAME],
        own_grads,
    )
    assert set(grads) == set(params)


@pytest.mark.slow
def test_the_energy_learns_as_without_an_initialiser_from_equal_chains():
    """With g = x_tilde and no noise in the start, both methods have the same chains."""
    config = with_initialiser()
    method, B = method_lib.from_config(config), 6
    keys = jax.random.split(jax.random.key(0), B)
    x = jax.random.uniform(jax.random.key(1), (B, 4, 4, 1), minval=-1, maxval=1)
    t = jnp.arange(B, dtype=jnp.int32)
    params, vectors = method.energy.init(jax.random.key(2))  # U is zero
    params, _ = method.energy.normalise(params, vectors)
    own, of_initialiser = initialiser.split(params)

    def gradient(method, params):
        return train_step.recovery_gradient(keys, params, x, t, method)[0]

    tuning = method.sampler.tuning | {"noise_scale": jnp.zeros(6)}  # also of the start
    method = method._replace(sampler=method.sampler._replace(tuning=tuning))
    without = method._replace(
        initialiser=None,
        sampler=method.sampler._replace(start=ladder.start_at_x_tilde),
    )
    grads = jax.jit(lambda p: gradient(method, p))(params)
    expected = jax.jit(lambda p: gradient(without, p))(own)
    assert of_initialiser
    for name, value in expected.items():
        jax.tree.map(
            lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-3, atol=1e-6),
            grads[name],
            value,
        )


def test_the_parameters_of_the_initialiser_are_not_normalised():
    """Both networks have kernels in modules of the same names."""
    method = method_lib.from_config(with_initialiser())
    params, vectors = method.energy.init(jax.random.key(0))
    assert not any(initialiser.NAME in path for path in vectors)
    normalised, _ = method.energy.normalise(params, vectors)
    jax.tree.map(
        np.testing.assert_array_equal, normalised[initialiser.NAME], params[initialiser.NAME]
    )
    own, of_initialiser = initialiser.split(params)
    assert initialiser.NAME not in own
    assert of_initialiser is params[initialiser.NAME]
    assert initialiser.split(own) == (own, {})


def test_each_network_has_its_own_learning_rate_and_clipped_gradient():
    """Fails if one norm is that of both networks, or the initialiser has the energy's rate."""
    config = with_initialiser()
    config.optim.adam = "optax"
    config.optim.learning_rate, config.optim.warmup_steps = 1e-2, 0
    config.initialiser.warmup_steps, config.initialiser.first_step = 10, 4
    config.optim.clip_norm = 1.0
    optimiser = train_state.optimiser(config)
    params = {"conv": jnp.zeros(4), initialiser.NAME: {"conv": jnp.zeros(4)}}
    state = optimiser.init(params)
    large, smaller = 100 * jnp.arange(1.0, 5), 3 * jnp.arange(1.0, 5)
    grads = {"conv": large, initialiser.NAME: {"conv": smaller}}
    rates = []
    for _ in range(16):
        updates, state = optimiser.update(grads, state, params)
        rates.append([-float(updates["conv"][0]), -float(updates[initialiser.NAME]["conv"][0])])
    energy_rate, own_rate = np.array(rates).T
    np.testing.assert_allclose(energy_rate, 1e-2, rtol=1e-3)
    expected = 1e-3 * np.clip((np.arange(16) - 4) / 10, 0, 1)
    np.testing.assert_allclose(own_rate, expected, rtol=1e-2, atol=1e-9)
    moments = optax.tree.get_all_with_path(state, "mu")
    norms = [float(optax.tree.norm(mu)) for _, mu in moments]
    np.testing.assert_allclose(norms, [1 - config.optim.beta1**16] * 2, rtol=1e-3)


@pytest.mark.parametrize(("first_step", "warmup"), [(20, 10), (20, 500), (0, 0)])
def test_the_learning_rate_of_the_initialiser_decays_with_that_of_the_energy(
    first_step, warmup
):
    """Fails if it starts to decay after its own warm-up, which can be longer than the run."""
    config = with_initialiser()
    config.optim.adam = "keras"
    config.optim.learning_rate, config.optim.warmup_steps = 0.1, 10
    without = train_state.learning_rate(config)
    config.optim.decay_steps = 100
    config.initialiser.warmup_steps, config.initialiser.first_step = warmup, first_step
    rate, energy_rate = (
        train_state.initialiser_learning_rate(config),
        train_state.learning_rate(config),
    )
    for n in (0, 15, 25, 31, 65, 99, 100, 200):
        increase = np.clip((n - first_step) / warmup, 0, 1) if warmup else float(n >= 0)
        decay = float(energy_rate(n)) / float(without(n)) if n else 1.0
        np.testing.assert_allclose(float(rate(n)), 1e-3 * increase * decay, atol=1e-8)


def test_the_state_of_the_optimiser_has_the_same_form_with_and_without_a_limit():
    """Otherwise, a run could not resume with another limit."""
    config = with_initialiser()
    params = {"conv": jnp.zeros(4), initialiser.NAME: {"conv": jnp.zeros(4)}}
    states = []
    for norm in (0.0, 1.0):
        config.optim.clip_norm = norm
        states.append(train_state.optimiser(config).init(params))
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])


def test_a_model_without_an_initialiser_cannot_start_from_one():
    """Neither by the configuration of generation, nor by another sampler."""
    config = with_initialiser(**{"initialiser.network": "none", "mcmc.start": "x_tilde"})
    method = method_lib.from_config(config)
    changed = config.copy_and_resolve_references()
    changed.mcmc.start = "initialiser"
    message = "'initialiser', but this model has none: use 'x_tilde' or 'posterior'"
    with pytest.raises(UserError, match=message):
        method_lib.for_generation(method, changed)
    with pytest.raises(UserError, match=message):
        method_lib.with_sampler(method, start="initialiser")


@pytest.mark.slow
def test_interpolations_end_with_the_samples_that_they_lie_between():
    """Fails if only one of both is denoised."""
    config = with_initialiser(**{"mcmc.denoise": "tweedie", "mcmc.b_squared": 2e-3})
    method = method_lib.for_generation(method_lib.from_config(config), config)
    params, vectors = method.energy.init(jax.random.key(0))
    params, _ = method.energy.normalise(params, vectors)
    model = Model.create(method, params, sharding.make_mesh(), 4)
    key = jax.random.key(1)
    strips = model.interpolate(key, pairs=2, frames=2)
    np.testing.assert_allclose(strips[:, 0], model.sample(key, 2), rtol=1e-4, atol=1e-5)
    assert "sampler=one draw per level, then langevin (K=2)" in repr(model)


@pytest.mark.slow
def test_a_model_proposes_and_samples_from_its_proposals():
    """Without chains, the samples are the proposals with their noise."""
    config = with_initialiser()
    config.mcmc.K = 0
    method = method_lib.for_generation(method_lib.from_config(config), config)
    params, vectors = method.energy.init(jax.random.key(0))
    params = jax.tree.map(
        lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size).reshape(p.shape)), params
    )
    model = Model.create(
        method, method.energy.normalise(params, vectors)[0], sharding.make_mesh(), 4
    )
    key = jax.random.key(1)
    keys = noise.example_keys(key, jnp.arange(4))
    x = ladder.white_noise(keys, (4, 4, 1), SCHEDULE)
    for level in reversed(range(6)):
        t = jnp.full(4, level)
        z = noise.normal(noise.fold(noise.fold(keys, level), ladder.START), (4, 4, 1))
        std = SCHEDULE.y_scale(t) * diffusion.posterior_std(t, SCHEDULE)
        y = model.propose(x, t) + noise.per_example(std, z) * z
        x = y / noise.per_example(SCHEDULE.y_scale(t), y)
    np.testing.assert_allclose(model.sample(key, 4), x, rtol=1e-3, atol=1e-4)
    assert model.propose(x[:0], jnp.zeros(0, jnp.int32)).shape == (0, 4, 4, 1)


def test_a_model_without_an_initialiser_cannot_propose():
    config = with_initialiser(**{"initialiser.network": "none", "mcmc.start": "x_tilde"})
    method = method_lib.from_config(config)
    params, _ = method.energy.init(jax.random.key(0))
    model = Model.create(method, params, sharding.make_mesh(), 4)
    with pytest.raises(UserError, match="this model has no initialiser"):
        model.propose(jnp.zeros((1, 4, 4, 1)), jnp.zeros(1, jnp.int32))


def test_the_initialiser_is_conditioned_on_the_level_of_its_input():
    """Fails if it is that of its output."""
    config = with_initialiser(**{"initialiser.network": "mlp"})
    method = method_lib.from_config(config)
    params, _ = method.energy.init(jax.random.key(0))
    own = jax.tree.map(lambda p: p + 0.1, params[initialiser.NAME])
    x, t = jax.random.normal(jax.random.key(1), (6, 4, 4, 1)), jnp.arange(6)
    network = ImageMLP(config.initialiser.ch, config.initialiser.N)
    u = jax.jit(network.apply)({"params": own}, x, SCHEDULE.conditioning[1:])
    g = jax.jit(method.initialiser.g)(own, x, t)
    np.testing.assert_allclose(g, x + u, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", ["unet", "mlp"])
def test_a_new_initialiser_predicts_that_nothing_changes(network):
    config = with_initialiser(**{"initialiser.network": network})
    method = method_lib.from_config(config)
    params, _ = method.energy.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (6, 4, 4, 1))
    y = method.propose(params)(x, jnp.arange(6))
    np.testing.assert_allclose(y, x, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"initialiser.network": "none"},
            "config.mcmc.start is 'initialiser', but this model has none",
        ),
        ({"mcmc.start": "x_tilde"}, "training an initialiser needs 'initialiser'"),
        ({"train.objective": "denoising"}, "config.initialiser.network is 'unet': it learns"),
        (
            {"initialiser.network": "mlp", "energy.dtype": "bfloat16"},
            "config.initialiser.network 'mlp' needs 'float32'",
        ),
        (
            {"initialiser.network": "mlp", "initialiser.attention": (8,)},
            "only config.initialiser.network 'unet' has attention",
        ),
        ({"initialiser.mult": (1,) * 5}, "examples of length 4 cannot be halved 4 times"),
        ({"initialiser.attention": (5,)}, "attention at (5,)"),
        ({"initialiser.dropout": 1.0}, "config.initialiser.dropout is 1.0"),
        ({"optim.clip_norm": -1.0}, "config.optim.clip_norm is -1.0"),
        (
            {"energy.network": "mlp", "energy.parameterisation": "unit", "data.channels": 2},
            "points are not images; use 'mlp'",
        ),
    ],
)
def test_what_cannot_be_configured_is_an_error(changes, message):
    config = with_initialiser(**{"energy.dropout": 0.0})
    config.data.flip = False
    config.update_from_flattened_dict(changes)

    def use():
        config_lib.validate(config)
        method_lib.from_config(config)
        train_step.from_config(config)

    with pytest.raises(UserError) as error:
        use()
    assert message in str(error.value)
