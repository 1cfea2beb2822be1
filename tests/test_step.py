import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import tiny

from drl_jax import config as config_lib
from drl_jax import diffusion, noise, recovery
from drl_jax import method as method_lib
from drl_jax.data import mixtures, pipeline, sources
from drl_jax.errors import UserError
from drl_jax.mcmc import hmc, langevin
from drl_jax.method import Method
from drl_jax.networks import resnet
from drl_jax.networks.energy import Energy, with_dtype
from drl_jax.recovery import Parameterisation
from drl_jax.runtime import sharding
from drl_jax.sampling import ladder
from drl_jax.sampling.ladder import Conditionals, Sampler
from drl_jax.training import state as train_state
from drl_jax.training import step as train_step
from drl_jax.training.state import TrainState
from drl_jax.training.step import Metrics

B, K = 16, 3
SCHEDULE = diffusion.schedule(6)
S = recovery.step_sizes(SCHEDULE, 2e-3)
METHOD = Method(
    energy=resnet.energy(4, 1, ch=8, mult=(1, 2), N=1),
    schedule=SCHEDULE,
    parameterisation=Parameterisation(S**2, recovery.no_reference),
    sampler=Sampler(langevin.init, langevin.kernel, {"step_size": S}, K),
)
DECAY = 0.9


def training(optimiser, ema_decay=DECAY, objective="recovery"):
    """Returns a training on uniformly distributed levels."""
    return train_step.Training(
        objective=train_step.OBJECTIVES[objective],
        draw_levels=train_step.uniform_levels,
        optimiser=optimiser,
        ema_decay=ema_decay,
    )


def perturbed(state):
    """Returns a state whose parameters differ from their initial values.

    With the initial values the second convolution of every block is zero.
    """
    params = jax.tree.map(
        lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size).reshape(p.shape)), state.params
    )
    return state.replace(params=params)


class OneStep(NamedTuple):
    """The arguments of a compiled training step, as numpy arrays, and its results."""

    before: TrainState
    x: jax.Array
    key: jax.Array
    optimiser: optax.GradientTransformation
    after: TrainState
    metrics: Metrics


@pytest.fixture(scope="module")
def one_step():
    # Gradient descent, because Adam's first step would amplify rounding in tiny gradients.
    optimiser = optax.sgd(1.0)
    mesh = sharding.make_mesh()
    state = perturbed(train_state.create(jax.random.key(0), METHOD.energy, optimiser))
    state = state.replace(step=jnp.int32(7))
    x = jax.random.uniform(jax.random.key(1), (B, 4, 4, 1), minval=-1, maxval=1)
    key = jax.random.key(2)
    before = jax.tree.map(np.asarray, state)
    step = train_step.compile_step(mesh, METHOD, training(optimiser))
    with jax.debug_nans(True):  # most levels have no example
        after, metrics = step(state, {"image": x}, key)
    return OneStep(before, x, key, optimiser, after, metrics)


def recovery_step(params, vectors, x, key, step):
    """Computes the loss of a step and its gradient without the functions under test.

    Returns ((loss, (t, f_pos, displacement)), gradient), new vectors.
    """
    keys = noise.example_keys(jax.random.fold_in(key, step), jnp.arange(B))
    t = jnp.stack([jax.random.randint(k, (), 0, 6) for k in noise.fold(keys, 0)])
    x_t, x_tilde = diffusion.diffuse_pair(noise.fold(keys, 1), x, t, SCHEDULE)
    a = jnp.append(SCHEDULE.a[1:6], 1.0)[t][:, None, None, None]
    normalised, new_vectors = METHOD.energy.normalise(params, vectors)
    conditionals = Conditionals(
        F=lambda y, t: METHOD.energy.f(normalised, y, t) / S[t] ** 2,
        schedule=SCHEDULE,
        sampler=METHOD.sampler,
    )
    y_neg, _ = ladder.sample_conditional(noise.fold(keys, 2), conditionals, x_tilde, t)

    def loss(params):
        normalised, _ = METHOD.energy.normalise(params, vectors)
        f_pos = METHOD.energy.f(normalised, a * x_t, t)
        f_neg = METHOD.energy.f(normalised, y_neg, t)
        return -jnp.mean(SCHEDULE.sigma[1] / SCHEDULE.sigma[t + 1] * (f_pos - f_neg)), (
            t,
            f_pos,
            recovery.displacement(y_neg, x_tilde),
        )

    return jax.value_and_grad(loss, has_aux=True)(params), new_vectors


def assert_trees_close(actual, expected, rtol=2e-4, atol=1e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), actual, expected
    )


@pytest.mark.slow
@pytest.mark.parametrize("pairs", ["independent", "shared"])
def test_the_configured_pairs_are_the_positives_and_the_conditions_of_the_chains(pairs):
    """Fails if the configured function is not used, or only for one of both."""
    config = config_lib.default()
    config.train.pairs = pairs
    draw = {
        "independent": recovery.positives,
        "shared": recovery.positives_with_shared_noise,
    }[pairs]
    keys = jax.random.split(jax.random.key(0), B)
    x = jax.random.uniform(jax.random.key(1), (B, 4, 4, 1), minval=-1, maxval=1)
    t = jnp.arange(B, dtype=jnp.int32) % 6
    state = perturbed(train_state.create(jax.random.key(2), METHOD.energy, optax.sgd(1.0)))
    params, _ = METHOD.energy.normalise(state.params, state.vectors)
    objective = functools.partial(train_step.from_config(config).objective, method=METHOD)
    _, statistics = jax.jit(objective)(keys, params, x, t)
    y, x_tilde = draw(noise.fold(keys, 1), x, t, SCHEDULE)
    y_neg, _ = jax.jit(
        lambda: ladder.sample_conditional(
            noise.fold(keys, 2), METHOD.conditionals(params), x_tilde, t
        )
    )()
    f_pos = METHOD.energy.f(params, y, t)
    np.testing.assert_allclose(statistics.f_pos, f_pos, rtol=1e-4, atol=1e-5)
    displacement = recovery.displacement(y_neg, x_tilde)
    np.testing.assert_allclose(statistics.displacement, displacement, rtol=1e-4)


@pytest.mark.slow
def test_a_step_descends_the_gradient_of_the_recovery_loss(one_step):
    """Fails if the levels are not weighted, or negative samples use unnormalised parameters."""
    before, after, metrics = one_step.before, one_step.after, one_step.metrics
    ((loss, (t, f_pos, displacement)), grads), vectors = jax.jit(recovery_step)(
        before.params, before.vectors, one_step.x, one_step.key, before.step
    )
    np.testing.assert_allclose(metrics.loss, loss, rtol=1e-3)
    np.testing.assert_allclose(metrics.grad_norm, optax.tree.norm(grads), rtol=1e-3)
    updates, _ = one_step.optimiser.update(grads, before.opt_state, before.params)
    assert_trees_close(after.params, optax.apply_updates(before.params, updates))
    assert_trees_close(after.vectors, vectors)
    for level in range(6):
        at_level = t == level
        if np.any(at_level):
            np.testing.assert_allclose(
                metrics.f_pos[level], np.mean(f_pos[at_level]), rtol=1e-4, atol=1e-5
            )
            np.testing.assert_allclose(
                metrics.displacement[level], np.mean(displacement[at_level]), rtol=1e-4
            )
        else:
            assert metrics.f_pos[level] == 0
    np.testing.assert_array_equal(metrics.examples, np.bincount(t, minlength=6))


@pytest.mark.slow
def test_a_step_increments_the_step_number_and_averages_the_parameters(one_step):
    before, after = one_step.before, one_step.after
    assert after.step == before.step + 1
    expected = jax.tree.map(
        lambda new, old: (1 - DECAY) * new + DECAY * old, after.params, before.ema
    )
    assert_trees_close(after.ema, expected, rtol=1e-5)


@pytest.mark.slow
def test_a_denoising_step_descends_the_error_of_the_noise():
    """The loss is the mean over examples of |eps + a sigma_bar_t grad F(y, t)|² / 2D.

    No chain is run or reported. Fails if sigma_bar or y is that of level t + 1.
    """
    schedule = diffusion.schedule(20, "cosine")
    parameterisation = Parameterisation(schedule.sigma_bar[:-1], recovery.white_noise)
    method = METHOD._replace(schedule=schedule, parameterisation=parameterisation)
    optimiser, mesh = optax.sgd(1.0), sharding.make_mesh()
    state = perturbed(train_state.create(jax.random.key(0), method.energy, optimiser))
    before = jax.tree.map(np.asarray, state)
    x = jax.random.uniform(jax.random.key(1), (B, 4, 4, 1), minval=-1, maxval=1)
    key = jax.random.key(2)
    denoising = training(optimiser, objective="denoising")
    with jax.debug_nans(True):  # some levels have no example, and there is no chain
        after, metrics = train_step.compile_step(mesh, method, denoising)(
            state, {"image": x}, key
        )

    keys = noise.example_keys(jax.random.fold_in(key, 0), jnp.arange(B))
    t = jnp.stack([jax.random.randint(k, (), 0, 20) for k in noise.fold(keys, 0)])
    eps = noise.normal(noise.fold(keys, 1), (4, 4, 1))
    a, a_bar, sigma_bar = (
        v[t].reshape(B, 1, 1, 1)
        for v in (jnp.append(schedule.a[1:20], 1.0), schedule.a_bar, schedule.sigma_bar)
    )
    y = a * (a_bar * x + sigma_bar * eps)

    def loss(raw):
        normalised, _ = method.energy.normalise(raw, before.vectors)

        def F(y):
            f = method.energy.f(normalised, y, t) / schedule.sigma_bar[t]
            return jnp.sum(f) - jnp.sum(y**2) / 2

        return jnp.mean((eps + a * sigma_bar * jax.grad(F)(y)) ** 2) / 2

    value, grads = jax.jit(jax.value_and_grad(loss))(before.params)
    np.testing.assert_allclose(metrics.loss, value, rtol=1e-4)
    error = jax.tree.map(lambda b, a, g: b - a - g, before.params, after.params, grads)
    assert optax.tree.norm(error) < 1e-3 * optax.tree.norm(grads)
    assert metrics.f_pos.shape == (10,)
    for of_chain in (metrics.f_neg, metrics.displacement, metrics.acceptance):
        assert of_chain is None


@pytest.mark.slow
def test_training_in_bfloat16_has_almost_the_losses_of_float32():
    """Compares each of the first steps, before rounding errors have made the runs diverge."""
    config = config_lib.load(str(tiny.DIGITS))
    source = sources.open_source(config)
    x = jnp.stack(list(pipeline.all_examples(config, source, limit=512)))
    optimiser, mesh = optax.adam(1e-3), sharding.make_mesh()

    def train(energy):
        method = METHOD._replace(energy=energy)
        step = train_step.compile_step(mesh, method, training(optimiser))
        state = train_state.create(jax.random.key(0), energy, optimiser)
        losses = []
        for i in range(100):
            batch = x[i * B % 512 :][:B]
            state, metrics = step(state, {"image": batch}, jax.random.key(1))
            losses.append(metrics.loss)
        assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype(np.float32)}
        return np.asarray(losses)

    energy = resnet.energy(8, 1, ch=8, mult=(1, 2), N=1)
    float32, bfloat16 = train(energy), train(with_dtype(jnp.bfloat16, energy))
    assert 0 < np.std(bfloat16 - float32) < 0.1 * np.std(float32)


def quadratic_energy(temperature):
    """Returns f = tau F with F = h·y - yᵀ P y / 2; every level has its own tau, h and P."""

    def f(params, x, t):
        h, P = params["h"][t], params["P"][t]
        F = jnp.sum(h * x, axis=1) - jnp.einsum("bi,bij,bj->b", x, P, x) / 2
        return temperature[t] * F

    def init(key):
        T = len(temperature)
        return {"h": jnp.zeros((T, 2)), "P": jnp.tile(jnp.eye(2), (T, 1, 1))}, {}

    return Energy(init, lambda params, vectors: (params, vectors), f, (2,))


@pytest.mark.slow
def test_a_quadratic_energy_learns_the_mean_and_covariance_of_every_level():
    """Trains on Gaussian data in the plane, with the compiled step and short HMC chains.

    P^-1 h must be the mean of y_t within 0.05 standard deviations, and P^-1 its covariance
    within 3%. The conditionals are learned from data, so if sigma is 2% too large, a variance v
    changes by only 4% u / (1 + 2u) with u = v / sigma², which is 1 to 2%. This shows in the
    mean over the levels below the top, which must be within 0.6%. Fails if sigma is 2% too
    large in the conditional or in the step of the diffusion, if y is scaled at the top, or if
    the momentum of the chains is zero.
    """
    data = mixtures.gaussian(np.array([0.3, -0.2]), np.array([[0.3, 0.15], [0.15, 0.2]]))
    exact = [
        mixtures.energy_marginal(data, t, SCHEDULE).mean_and_covariance() for t in range(6)
    ]
    smallest_variance = jnp.array(
        [np.linalg.eigvalsh(covariance)[0] for _, covariance in exact]
    )
    noise_precision = (1 - SCHEDULE.is_marginal(jnp.arange(6))) / SCHEDULE.sigma[1:] ** 2
    tuning = {
        "step_size": 0.6 / jnp.sqrt(1 / smallest_variance + noise_precision),
        "leapfrog": jnp.full(6, 3),
    }
    method = METHOD._replace(
        energy=quadratic_energy(S**2), sampler=Sampler(hmc.init, hmc.kernel, tuning, 6)
    )
    steps, B = 1500, 2000
    optimiser, mesh = optax.adam(optax.cosine_decay_schedule(0.05, steps)), sharding.make_mesh()
    step = train_step.compile_step(mesh, method, training(optimiser, ema_decay=0.99))
    state = train_state.create(jax.random.key(0), method.energy, optimiser)
    batch = jax.jit(lambda k: data.sample(jax.random.split(jax.random.key(k), B)))
    for k in range(steps):
        state, _ = step(state, {"image": batch(k)}, jax.random.key(1))
    excess_variance = []
    for t, (mean, covariance) in enumerate(exact):
        P = np.asarray(state.ema["P"][t])
        found = np.linalg.inv((P + P.T) / 2)
        whiten = np.linalg.inv(np.linalg.cholesky(covariance))
        mean_error = whiten @ (found @ state.ema["h"][t] - mean)
        covariance_error = whiten @ found @ whiten.T - np.eye(2)
        assert np.max(np.abs(mean_error)) < 0.05, (t, mean_error)
        assert np.max(np.abs(covariance_error)) < 0.03, (t, covariance_error)
        excess_variance.append(np.trace(covariance_error) / 2)
    assert abs(np.mean(excess_variance[:-1])) < 0.006, excess_variance


def gaussians(parameterisation="gaussians"):
    """Returns the configuration of a small network with a mixture of two Gaussians."""
    config = config_lib.default()
    config.data.update(image_size=4, channels=1)
    config.energy.update(network="image_mlp", ch=8, N=1, components=2)
    config.energy.parameterisation = parameterisation
    config.train.objective = "denoising"
    return config


@pytest.mark.parametrize("parameterisation", config_lib.FITTED)
def test_F_is_the_limited_f_over_the_temperature_plus_the_reference(parameterisation):
    method = method_lib.from_config(gaussians(parameterisation))
    fitted = mixtures.isotropic(np.random.default_rng(0).normal(size=(2, 16)), 0.3)
    params, _ = jax.jit(method.energy.init)(jax.random.key(0))
    params = method_lib.with_mixture(jax.tree.map(lambda p: p + 0.1, params), fitted)
    t = jnp.arange(6)
    y = noise.normal(noise.example_keys(jax.random.key(1), t), (4, 4, 1))
    exact = mixtures.exact_F(fitted, method.schedule)(y.reshape(6, 16), t)
    f = method.energy.f(params, y, t) / method.parameterisation.temperature[t]
    assert np.std(f) > 1
    limit = recovery.LIMIT * 16
    wanted = limit * np.tanh(f / limit) + exact
    if parameterisation == "bounded_gaussians":
        wanted += recovery.bounded_pixels(method.schedule, 1.0)(y, t)
    np.testing.assert_allclose(method.F(params)(y, t), wanted, rtol=1e-5)


@pytest.mark.slow
def test_training_changes_the_network_and_not_the_fitted_mixture():
    config = gaussians()
    method, training = method_lib.from_config(config), train_step.from_config(config)
    mesh = sharding.make_mesh()
    state = train_state.create_on(mesh, jax.random.key(0), method.energy, training.optimiser)
    step = train_step.compile_step(mesh, method, training)
    x = noise.normal(noise.example_keys(jax.random.key(1), jnp.arange(8)), (4, 4, 1))
    new = state
    for _ in range(3):
        new, _ = step(jax.tree.map(jnp.copy, new), {"image": x}, jax.random.key(2))
    before, after = (dict(s.params) for s in (state, new))
    for name, array in before.pop(method_lib.MIXTURE).items():
        np.testing.assert_array_equal(after[method_lib.MIXTURE][name], array)
    after.pop(method_lib.MIXTURE)
    assert np.all(before["dense_out"]["kernel"] != after["dense_out"]["kernel"])


def test_a_training_has_the_settings_of_its_configuration():
    config = config_lib.default()
    config.train.update(objective="denoising", levels="log_snr", accumulate=3)
    config.optim.ema_decay = 0.8
    found = train_step.from_config(config)
    assert found.objective is train_step.denoising_gradient
    assert found.draw_levels is train_step.log_snr_levels
    assert (found.ema_decay, found.accumulate) == (0.8, 3)


def test_the_recovery_likelihood_needs_chains_that_depend_on_the_energy_of_their_level():
    config = config_lib.default()
    config.mcmc.update(start="posterior", K=0)
    with pytest.raises(UserError, match=r"^config\.mcmc\.K is 0: [^\n]*'recovery'[^\n]*$"):
        train_step.from_config(config)
    config.train.objective = "denoising"
    train_step.from_config(config)


@pytest.mark.parametrize("name", ["uniform", "log_snr"])
def test_levels_are_drawn_with_their_probabilities(name):
    """For log_snr the probability is proportional to sigma_{t+1}² / sigma_bar_{t+1}².

    Fails for uniform draws, without the square, or with sigma_bar_t.
    """
    n = 100_000
    schedule = diffusion.schedule(100)
    keys = noise.example_keys(jax.random.key(0), jnp.arange(n))
    sigma, sigma_bar = (np.asarray(s[1:], float) for s in (schedule.sigma, schedule.sigma_bar))
    p = {"uniform": np.ones(100), "log_snr": (sigma / sigma_bar) ** 2}[name]
    t = train_step.LEVEL_DISTRIBUTIONS[name](keys, schedule)
    expected = n * p / p.sum()
    counts = np.bincount(np.asarray(t), minlength=100)
    assert np.abs((counts - expected) / np.sqrt(expected)).max() < 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "energy", "objective", "classes"),
    [
        (1, {"network": "resnet", "mult": (1, 2), "N": 1}, "recovery", 0),
        (3, {"network": "unet", "mult": (1,), "N": 1, "patch": 2}, "denoising", 3),
        (0, {"network": "mlp", "N": 1, "parameterisation": "unit"}, "recovery", 3),
    ],
    ids=["signals", "volumes", "labelled vectors"],
)
def test_networks_train_on_signals_volumes_and_labelled_vectors(
    axes, energy, objective, classes
):
    """The loss stays finite, and all parameters change."""
    config = config_lib.default()
    config.data.update(axes=axes, image_size=4, channels=2, classes=classes, flip=False)
    config.energy.update(ch=4, **energy)
    config.mcmc.K = 1
    config.optim.update(learning_rate=1e-2, warmup_steps=0, adam="optax")
    config.train.objective = objective
    config_lib.validate(config)
    method = method_lib.from_config(config)
    chosen = train_step.from_config(config)
    state = train_state.create(jax.random.key(0), method.energy, chosen.optimiser)
    before = jax.tree.map(np.asarray, state.params)
    x = jax.random.uniform(jax.random.key(1), (8, *method.energy.shape), minval=-1)
    batch = {"image": x} | ({"label": 1 + jnp.arange(8) % 3} if classes else {})
    step = train_step.compile_step(sharding.make_mesh(), method, chosen)
    options = {"xla_backend_optimization_level": 0}  # compiles in half the time
    step = step.lower(state, batch, jax.random.key(2)).compile(options)
    for _ in range(3):
        state, metrics = step(state, batch, jax.random.key(2))
        assert np.isfinite(metrics.loss)
    for path, leaf in jax.tree_util.tree_leaves_with_path(before):
        after = functools.reduce(lambda tree, key: tree[key.key], path, state.params)
        assert np.any(leaf != np.asarray(after)), path
