"""Products, mixtures and powers of densities that are known at every level."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import exact
from helpers.statistical import assert_mean, assert_variance
from ml_collections import FrozenConfigDict

import drl_jax
from drl_jax import method as method_lib
from drl_jax.data import mixtures
from drl_jax.errors import UserError
from drl_jax.metrics import density, ood, plane
from drl_jax.model import Model
from drl_jax.sampling import annealing, ladder

T = 6
N = 20_000  # samples whose moments are tested
LOG_Z = 3.0, -2.0  # of the two models: their F are known up to a constant
MEANS, VARIANCES = np.array([[0.5, -0.2], [-0.3, 0.4]]), np.array([0.3, 0.6])


def gaussian(i):
    return mixtures.gaussian(MEANS[i], VARIANCES[i] * np.eye(2))


@functools.cache
def gaussians():
    return tuple(exact.model(gaussian(i), T, LOG_Z[i]) for i in range(2))


@functools.cache
def shapes():
    """Models with the exact energies of moons and rings, and these densities."""
    data = [mixtures.PLANAR_SHAPES[name]() for name in ("moons", "rings")]
    return tuple(exact.model(d, T, log_Z) for d, log_Z in zip(data, LOG_Z, strict=True)), data


def points(n=64):
    """Returns points in the plane, and a level for each."""
    return jnp.asarray(np.random.default_rng(0).normal(size=(n, 2)), jnp.float32), np.arange(
        n
    ) % T


def conditional(model, K):
    """Returns a model that samples conditionals, with K steps after the posterior start."""
    method = method_lib.with_sampler(
        model.method, sampler="mala", start="posterior", K=max(K, 1)
    )
    method = method._replace(sampler=method.sampler._replace(K=K))
    return Model.create(method, model.params, model.mesh, batch_size=N)


def compiled(action, caplog):
    """Returns how many programs JAX compiles during an action."""
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        action()
    return sum(message.startswith("Compiling ") for message in caplog.messages)


@pytest.mark.parametrize(
    ("combine", "expected"),
    [
        (lambda a, b: a + b, lambda p, q: p + q),
        (lambda a, b: a - b, lambda p, q: p - q),
        (lambda a, b: 2 * a - b * 0.5, lambda p, q: 2 * p - 0.5 * q),
        (lambda a, b: -a + b + b, lambda p, q: -p + 2 * q),
        (lambda a, b: a.tempered(4.0), lambda p, q: p / 4),
        (lambda a, b: Model.product([a, b], [0.3, -1]), lambda p, q: 0.3 * p - q),
        (
            lambda a, b: Model.mixture([a, b], [1, 3], np.tile(np.array(LOG_Z)[:, None], T)),
            lambda p, q: np.log((np.exp(p - 3) + 3 * np.exp(q + 2)) / 4),
        ),
        (
            lambda a, b: Model.mixture([a, b]) + a,
            lambda p, q: np.log((np.exp(p) + np.exp(q)) / 2) + p,
        ),
    ],
)
def test_F_is_the_combination_of_the_parts_at_every_level(combine, expected):
    """Fails with a sign flipped, w for log w, log_Z added, and a level's log_Z of another."""
    a, b = shapes()[0]
    y, t = points()
    p, q = (np.asarray(model.log_density(y, t), np.float64) for model in (a, b))
    found = combine(a, b).log_density(y, t)
    np.testing.assert_allclose(found, expected(p, q), rtol=1e-4, atol=1e-4)


def test_log_Z_can_differ_between_the_levels():
    """F of the mixture is then the exact log-density of the diffused mixture.

    Fails with the level above in `compose.mixture`.
    """
    (a, b), data = shapes()
    log_Z = np.random.default_rng(0).normal(size=(2, T))
    shifted = [
        Model.create(model.method._replace(energy=shift(model, log_Z[i])), {}, model.mesh)
        for i, model in enumerate((a, b))
    ]
    total = log_Z + np.array(LOG_Z)[:, None]
    weights = np.array([0.2, 0.8])
    found = Model.mixture(shifted, weights, total)
    joined = mixtures.Mixture(
        log_weights=jnp.concatenate(
            [d.log_weights + np.log(w) for d, w in zip(data, weights, strict=True)]
        ),
        means=jnp.concatenate([d.means for d in data]),
        variances=jnp.concatenate([d.variances for d in data]),
        axes=jnp.concatenate([d.axes for d in data]),
    )
    y, t = points()
    expected = mixtures.exact_F(joined, a.method.schedule)(y, t)
    np.testing.assert_allclose(found.log_density(y, t), expected, rtol=1e-4, atol=1e-4)


def shift(model, constants):
    """Returns the energy with one constant added per level."""
    f, constants = model.method.energy.f, jnp.asarray(constants, jnp.float32)
    return model.method.energy._replace(f=lambda params, x, t: f(params, x, t) + constants[t])


@pytest.mark.slow
@pytest.mark.parametrize("weights", [(1, 1), (1, -0.3)])
def test_chains_on_the_marginals_sample_the_product_and_those_on_the_conditionals_do_not(
    weights,
):
    """Tests mean and variance of level 0 of two Gaussians, whose precisions add up.

    Exact samples fail with a probability of 1e-6. Draws from the posterior start fail, and so
    do 20 steps of MALA on the conditionals, whose levels do not belong to one density.
    """
    a, b = gaussians()
    a_bar, sigma_bar = (
        float(v[0]) for v in (a.method.schedule.a_bar, a.method.schedule.sigma_bar)
    )
    precision = np.array(weights) / (a_bar**2 * VARIANCES + sigma_bar**2)
    variance = 1 / precision.sum()
    mean = variance * precision @ (a_bar * MEANS)
    combined, key = Model.product([a, b], weights), jax.random.key(0)

    def check(model):
        x = model.sample(key, N)
        assert_mean(x, mean, variance, of=2)
        assert_variance(x, mean, variance, of=2)

    on_conditionals = conditional(combined, K=20)
    check(on_conditionals.marginals().adapt(key)[0])
    for model in (on_conditionals.adapt(key)[0], conditional(combined, K=0)):
        with pytest.raises(AssertionError, match=r"standard errors|times the expected"):
            check(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("combine", "steps"),
    [
        (lambda a, b: a + b, 10),
        (lambda a, b: a - 0.3 * b, 10),
        (lambda a, b: Model.mixture([a, b], [1, 3], np.tile(np.log([[2.0], [1.0]]), 50)), 0),
    ],
    ids=["product", "negation", "mixture"],
)
def test_samples_of_shapes_have_the_density_that_quadrature_finds(combine, steps):
    """KL(samples || density) over cells exceeds that of exact samples by at most 0.05 nats.

    Moons and rings, 50 levels, 1,000 samples. It is found to be larger by 0.02. Draws from the
    conditionals sample the mixture, but not the product (0.36) or the quotient (0.29).
    """
    data = [mixtures.PLANAR_SHAPES[name]() for name in ("moons", "rings")]
    model = combine(exact.model(data[0], 50, np.log(2.0)), exact.model(data[1], 50))
    grid, key = plane.square_grid(), jax.random.key(0)
    log_p = plane.log_density_of_level_0(model, grid)

    def excess(model):
        x, rng = model.sample(key, 1000), np.random.default_rng(0)
        found, scatter = plane.divergence_of_samples(rng, x, log_p, grid)
        return found - scatter

    draws = excess(conditional(model, K=0))
    if not steps:
        assert draws < 0.05
        return
    assert draws > 0.2
    chains = conditional(model, K=steps).marginals()
    assert excess(chains.adapt(key, num_steps=30)[0]) < 0.05


def test_other_weights_and_parameters_compile_nothing(caplog):
    a, b = gaussians()
    y, t = points()
    key = jax.random.key(0)

    def use(model):
        return model.log_density(y, t), model.sample(key, 4)

    assert compiled(lambda: use(Model.product([a, b])), caplog) > 0
    assert compiled(lambda: use(Model.product([a, b], [0.3, -2.0])), caplog) == 0
    assert compiled(lambda: use(a - b), caplog) == 0
    slower = a.with_step_size(a.step_size / 2) + b.with_params({})
    assert compiled(lambda: use(slower), caplog) == 0
    np.testing.assert_array_equal(slower.step_size, a.step_size / 2)
    assert np.abs(slower.sample(key, 4) - (a + b).sample(key, 4)).max() > 1e-3
    chains = (a + b).with_sampler("langevin", K=2)
    use(chains)
    heavier = chains.with_params(Model.product([a, b], [1, 2]).params)
    assert compiled(lambda: use(heavier), caplog) == 0
    assert np.abs(heavier.sample(key, 4) - chains.sample(key, 4)).max() > 1e-3
    assert compiled(lambda: use(Model.mixture([a, b])), caplog) > 0
    assert compiled(lambda: use(Model.mixture([a, b], [1, 2], np.ones((2, T)))), caplog) == 0


def test_classes_are_combined_and_other_classes_compile_nothing(caplog):
    """Each part has its own class and guidance, and its F is that of `given`."""
    model = drl_jax.load("mnist", set_up_jax=False)
    four, nine = model.given(5), model.given(10, guidance=0.5)
    x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, *model.shape)), jnp.float32)
    t = np.array([0, 40])
    both = four + nine
    expected = four.log_density(x, t) + nine.log_density(x, t)
    np.testing.assert_allclose(both.log_density(x, t), expected, rtol=1e-5)
    assert both.classes == 0

    def other():
        return (model.given(1) + model.given(2, guidance=0.1)).log_density(x, t)

    assert compiled(other, caplog) == 0
    assert np.abs(other() - expected).min() > 1


def test_fitted_mixtures_are_part_of_F():
    digits = drl_jax.load("digits", set_up_jax=False)
    x = jnp.zeros((2, *digits.shape))
    t = np.array([0, 99])
    np.testing.assert_allclose(
        digits.tempered(2.0).log_density(x, t), digits.log_density(x, t) / 2, rtol=1e-5
    )
    assert "product(ImageMLP)" in repr(digits.tempered(2.0))


def test_chains_that_start_from_an_initialiser_start_from_the_posterior():
    a, b = gaussians()
    mcmc = {**a.method.mcmc, "start": "initialiser"}
    sampler = a.method.sampler._replace(start=ladder.start_from_initialiser)
    method = a.method._replace(sampler=sampler, mcmc=FrozenConfigDict(mcmc))
    combined = Model.create(method, {}, a.mesh) + b
    assert combined.method.sampler.start is ladder.start_from_posterior
    again = combined.with_sampler("langevin", K=1)
    assert again.method.sampler.start is ladder.start_from_posterior


def test_only_mixtures_are_denoised():
    """Fails if the Tweedie step of a product adds up the steps of its models."""
    a, b = gaussians()
    mcmc = FrozenConfigDict({**a.method.mcmc, "denoise": "tweedie"})
    method = a.method._replace(sampler=a.method.sampler._replace(denoise=1.0), mcmc=mcmc)
    denoising = Model.create(method, {}, a.mesh)
    for combined, factor in ((denoising + b, 0.0), (Model.mixture([denoising, b]), 1.0)):
        assert combined.method.sampler.denoise == factor
        assert combined.with_sampler("langevin", K=1).method.sampler.denoise == factor


def test_everything_that_takes_a_model_takes_a_combination():
    data = mixtures.gaussian(np.zeros(4), 0.2 * np.eye(4))
    a, b = (exact.model(data, T, log_Z, shape=(2, 2, 1)) for log_Z in LOG_Z)
    model, key = a + b, jax.random.key(0)
    x = np.clip(model.sample(key, 6), -1, 1)
    known = np.array([[[True], [False]]] * 2)
    completed = model.inpaint(key, x, known, rounds=1)
    np.testing.assert_array_equal(completed[:, 0, :, 0], x[:, :, 0])
    _, end = model.marginals().long_run(key, x, np.zeros(6, int), 3, points=0)
    assert np.isfinite(end.x).all()
    assert model.interpolate(key, pairs=1, frames=3).shape == (1, 3, 2, 2, 1)
    assert np.isfinite(ood.Scorer(model)(key, x).log_density).all()
    assert np.isfinite(density.log_likelihood(model, key, x)[0]).all()


def test_only_models_can_be_added():
    a, _ = gaussians()
    for operation in (lambda: a + 1, lambda: a - 1, lambda: 1 + a):
        with pytest.raises(TypeError, match="unsupported operand"):
            operation()


@pytest.mark.slow
def test_annealing_finds_log_Z_of_a_product():
    """The lower bound is log ∫ exp(F_1 + F_2), known for Gaussians, within 5 errors.

    Fails if log Z of one of the models is left out, which is 3 or -2.
    """
    a, b = gaussians()
    schedule = a.method.schedule
    first, second = (mixtures.energy_marginal(gaussian(i), 0, schedule) for i in range(2))
    joint = mixtures.gaussian(
        np.asarray(second.means[0]),
        np.diag(np.asarray(first.variances[0] + second.variances[0])),
    )
    expected = float(joint.log_density(first.means)[0]) + sum(LOG_Z)
    budget = density.DEFAULT._replace(chains=1024, distributions=24, transitions=2)
    key = jax.random.key(0)
    begun = density.begin(a + b, key, np.zeros((1, 2)), budget)
    *_, state = density.annealed(a + b, key, begun, budget, ["levels"])
    bound = annealing.bound(state.passes["levels"].log_weight)
    assert bound.std_error < 0.05
    assert abs(bound.log_Z - expected) < 5 * bound.std_error


def other_levels():
    return exact.model(gaussian(0), T + 1)


@pytest.mark.parametrize(
    ("combine", "words"),
    [
        (lambda a, b: Model.product([]), "no models"),
        (lambda a, b: Model.mixture([]), "no models"),
        (lambda a, b: Model.product([a, b], [1.0]), r"shape \(1,\): give 2"),
        (lambda a, b: Model.product([a, b], [1, np.nan]), r"\[1.0, nan\]: give finite"),
        (lambda a, b: Model.mixture([a, b], [1, 0]), r"\[1.0, 0.0\]: give positive"),
        (lambda a, b: Model.mixture([a, b], log_Z=np.zeros(2)), r"\(2,\): give \(2, 6\)"),
        (lambda a, b: Model.mixture([a, b], log_Z=np.full((2, 6), np.inf)), "log_Z .* finite"),
        (lambda a, b: a.tempered(0.0), "temperature is 0.0: give a positive"),
        (lambda a, b: a.tempered(np.nan), "temperature is nan: give a positive"),
        (lambda a, b: a + other_levels(), "6 and 7 levels"),
        (lambda a, b: a + b.marginals(), "differs at level 0"),
        (
            lambda a, b: a + exact.model(mixtures.gaussian(np.zeros(3), np.eye(3)), T),
            r"shape \(2,\) and \(3,\)",
        ),
    ],
)
def test_what_cannot_be_combined_is_an_error_of_one_line(combine, words):
    with pytest.raises(UserError, match=words) as error:
        combine(*gaussians())
    assert "\n" not in str(error.value)


def test_models_on_other_devices_cannot_be_combined():
    a, _ = gaussians()
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "data"))
    with pytest.raises(UserError, match="same devices"):
        a + exact.model(gaussian(1), T, mesh=mesh)


def test_a_combination_cannot_be_trained():
    with pytest.raises(UserError, match="train each model"):
        (-gaussians()[0]).method.energy.init(jax.random.key(0))


def test_labels_are_for_the_parts_of_a_combination():
    model = exact.model(mixtures.PLANAR_SHAPES["ellipse"](), 6)
    with pytest.raises(UserError, match="a combination of models takes no label"):
        (model + model).given(1)
