"""Labels and guidance: the densities of classes, their samples, and p(label | x)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.statistical import assert_counts, assert_mean, assert_variance

from drl_jax import diffusion, recovery
from drl_jax.errors import UserError
from drl_jax.mcmc import hmc
from drl_jax.method import Method
from drl_jax.metrics import labels as labels_lib
from drl_jax.model import Model
from drl_jax.networks.energy import Energy
from drl_jax.networks.guidance import Condition, conditioned, with_condition
from drl_jax.networks.initialiser import Initialiser
from drl_jax.recovery import Parameterisation
from drl_jax.runtime import sharding
from drl_jax.sampling.ladder import Sampler
from drl_jax.training import step as train_step

MEANS = np.array([0.0, -1.0, 0.5, 2.0])  # of y at every level, by label
VARIANCES = np.array([4.0, 0.5, 1.0, 0.25])
LOG_Z = np.array([0.0, 3.0, -40.0, 1.0])  # by label
SCHEDULE = diffusion.schedule(6)
DIMENSION = 2
KEY = jax.random.key(0)


def f(params, x, t, keys=None, label=None):
    """Returns the log-density of N(mean, variance) of the label, plus its log Z."""
    label = jnp.zeros_like(t) if label is None else label
    mean, variance = jnp.asarray(MEANS)[label], jnp.asarray(VARIANCES)[label]
    quadratic = jnp.sum(jnp.square(x - mean[:, None]), axis=1) / (2 * variance)
    normaliser = DIMENSION * jnp.log(2 * jnp.pi * variance) / 2
    return jnp.asarray(LOG_Z)[label] - quadratic - normaliser


def gaussian_model(leapfrog=3):
    """Returns a model whose energy of each label is a Gaussian, the same at all levels."""
    energy = Energy(
        init=lambda key: ({}, {}),
        normalise=lambda params, vectors: (params, vectors),
        f=f,
        shape=(DIMENSION,),
        classes=3,
    )
    tuning = {"step_size": jnp.full(6, 0.3), "leapfrog": jnp.full(6, leapfrog)}
    sampler = Sampler(hmc.init, hmc.kernel, tuning, 20)
    parameterisation = Parameterisation(jnp.ones(6), recovery.no_reference)
    method = Method(energy, SCHEDULE, parameterisation, sampler)
    return Model.create(method, {}, sharding.make_mesh(), batch_size=8192)


@pytest.fixture(scope="module")
def model():
    return gaussian_model()


def conditional_moments(label, guidance, x_tilde, t):
    """Returns the mean and variance of the guided p(y | x_tilde, label) in closed form."""
    precision = (1 + guidance) / VARIANCES[label] - guidance / VARIANCES[0]
    linear = (1 + guidance) * MEANS[label] / VARIANCES[label]
    linear -= guidance * MEANS[0] / VARIANCES[0]
    if t < 5:
        coupling = 1 / float(SCHEDULE.sigma[t + 1]) ** 2
        precision, linear = precision + coupling, linear + coupling * x_tilde
    return linear / precision, 1 / precision


@pytest.mark.parametrize("t", [1, 5])
def test_a_guided_chain_has_the_moments_of_the_closed_form(model, t):
    """20,000 chains at a level with x_tilde and at one without, with three labels, w = 0.7.

    Fails if the quadratic term is scaled by 1 + w, or if f(none) is not subtracted.
    """
    n, guidance = 20_000, 0.7
    for label in (1, 2, 3):
        x_tilde = np.full((n, DIMENSION), 1.5, np.float32)
        _, end = model.long_run(
            KEY, x_tilde, np.full(n, t), 60, points=0, label=label, guidance=guidance
        )
        y = end.x * float(SCHEDULE.y_scale(jnp.array(t)))
        mean, variance = conditional_moments(label, guidance, 1.5, t)
        assert_mean(y, mean, variance, of=6)
        assert_variance(y, mean, variance, of=6)


def test_samples_of_several_labels_are_those_of_each_label_alone(model):
    labels = np.arange(24) % 3 + 1
    together = model.sample(KEY, 24, label=labels, guidance=0.3)
    for label in (1, 2, 3):
        alone = model.given(label, guidance=0.3).sample(KEY, 24)
        np.testing.assert_allclose(together[labels == label], alone[labels == label], rtol=1e-4)
        same = model.sample(KEY, 24, label=label, guidance=0.3)
        np.testing.assert_array_equal(alone, same)
    assert len(np.unique(together.round(3), axis=0)) == 24


def test_label_0_is_none_and_a_model_without_a_label_has_none(model):
    x, t = np.linspace(-1, 1, 8).reshape(4, 2), np.arange(4)
    np.testing.assert_array_equal(model.f(x, t), model.f(x, t, np.zeros(4, int)))
    np.testing.assert_array_equal(model.f(x, t), model.given(0).f(x, t))
    np.testing.assert_array_equal(model.given(2).f(x, t), model.f(x, t, np.full(4, 2)))
    assert not np.allclose(model.given(2).f(x, t), model.f(x, t))


def test_f_and_log_density_of_a_guided_model_are_guided(model):
    x, t = np.linspace(-1, 1, 8).reshape(4, 2), np.arange(4)
    none, of_label = model.f(x, t), model.f(x, t, np.full(4, 3))
    guided = model.given(3, guidance=0.7)
    np.testing.assert_allclose(guided.f(x, t), 1.7 * of_label - 0.7 * none, rtol=1e-5)
    np.testing.assert_allclose(guided.log_density(x, t), guided.f(x, t), rtol=1e-6)


def test_the_initialiser_is_conditioned_and_guided_as_f_is():
    def g(params, x, t, keys=None, label=None):
        label = jnp.zeros_like(t) if label is None else label
        return x + params["scale"] * label[:, None]

    params = {"initialiser": {"scale": 2.0}}
    method = gaussian_model().method._replace(initialiser=Initialiser(None, g))
    condition = Condition(jnp.int32(3), jnp.float32(0.5))
    propose = method.propose(with_condition(params, condition))
    np.testing.assert_allclose(propose(jnp.zeros((2, 2)), jnp.zeros(2, int)), 9.0)
    labels = jnp.array([1, 2])
    propose = method.conditionals(params, label=labels).propose
    np.testing.assert_allclose(propose(jnp.zeros((2, 2)), jnp.zeros(2, int))[:, 0], [2, 4])


def test_other_labels_and_weights_compile_nothing_new():
    model = gaussian_model()
    for label, guidance in ((1, 0.5), (2, 0.5), (3, 2.0)):
        model.sample(KEY, 3, label=label, guidance=guidance)
        model.given(label, guidance).f(np.zeros((3, 2)), np.zeros(3, int))
    assert model.programs.generate._cache_size() == 1
    assert model.programs.f._cache_size() == 1


def test_without_guidance_the_network_is_evaluated_once():
    calls = []

    def network(x, t, label=None):
        calls.append(label)
        return x

    conditioned(network, {}, jnp.array([1]))(jnp.zeros(1), jnp.zeros(1, int))
    assert len(calls) == 1
    params = with_condition({}, Condition(jnp.int32(1), jnp.float32(0.1)))
    conditioned(network, params)(jnp.zeros(1), jnp.zeros(1, int))
    assert len(calls) == 3
    assert conditioned(network, {}) is network


def test_the_step_sizes_are_adapted_to_the_label():
    """The narrowest class needs the smallest steps where nothing ties y to x_tilde."""
    model = gaussian_model(leapfrog=1)
    sizes = [model.given(label).adapt(KEY)[0].step_size[5] for label in (1, 2, 3)]
    assert sizes[2] < sizes[0] < sizes[1]


def test_classes_have_the_posterior_of_bayes_rule(model):
    """Fails if the prior is not added, or the labels are counted from 0."""
    x = np.random.default_rng(0).normal(size=(50, DIMENSION))
    log_prior = np.log([0.2, 0.3, 0.5]) - LOG_Z[1:]
    found = np.exp(model.classify(x, np.arange(50) % 6, log_prior))
    joint = [
        prior * np.exp(-np.sum((x - m) ** 2, axis=1) / (2 * v)) / v ** (DIMENSION / 2)
        for prior, m, v in zip([0.2, 0.3, 0.5], MEANS[1:], VARIANCES[1:], strict=True)
    ]
    expected = np.transpose(joint / np.sum(joint, axis=0))
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-6)


def test_the_fitted_prior_makes_up_for_log_z(model):
    """log Z of the classes is up to 43 nats apart; the fit finds prior - log Z.

    With 20,000 examples. The tolerance is ten standard errors of the fit, whose inverse Fisher
    information is below 4 / n for each of the three values.
    """
    rng, n = np.random.default_rng(1), 20_000
    labels = rng.choice([1, 2, 3], p=[0.2, 0.3, 0.5], size=n)
    x = MEANS[labels, None] + np.sqrt(VARIANCES[labels, None]) * rng.normal(size=(n, 2))
    log_p = np.asarray(model.classify(x, np.zeros(n, int)), np.float64)
    b = labels_lib.fit_prior(log_p, labels)
    expected = np.log([0.2, 0.3, 0.5]) - LOG_Z[1:]
    np.testing.assert_allclose(b, expected - expected.mean(), atol=10 * np.sqrt(4 / n))
    p = np.exp(log_p + b)
    p /= p.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(p.mean(axis=0), np.bincount(labels)[1:] / n, atol=1e-6)
    exact = labels_lib.accuracy(log_p + expected, labels)
    assert abs(labels_lib.accuracy(log_p + b, labels) - exact) < 0.01


def test_a_comparison_uses_the_best_level_and_reports_the_accuracy_of_test_data(monkeypatch):
    """At the chosen level, labels are certain; at the others, they are random."""
    n = 300
    labels = np.random.default_rng(0).integers(1, 4, n)

    def classify_data(model, key, x, level):
        certain = np.where(x[:, :1] == np.arange(1, 4), 0.0, -9.0)
        return certain if level == 2 else np.zeros((n, 3))

    monkeypatch.setattr(labels_lib, "classify_data", classify_data)
    x = labels[:, None].astype(float)
    wrong = np.where(np.arange(n) < 60, labels % 3 + 1, labels)
    found = labels_lib.compare(gaussian_model(), KEY, x, labels, x, wrong)
    assert (found["level"], found["accuracy"], found["accuracy_of_test"]) == (2, 1.0, 0.8)


def test_data_are_diffused_to_the_level_before_they_are_classified(model):
    """With one seed; a wrong scale or level changes the values by far more than rounding."""
    x = np.random.default_rng(0).normal(size=(5, DIMENSION)).astype(np.float32)
    found = labels_lib.classify_data(model, KEY, x, 4)
    keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(5))
    y, _ = recovery.positives(keys, jnp.asarray(x), jnp.full(5, 4), SCHEDULE)
    np.testing.assert_allclose(found, model.classify(y, np.full(5, 4)), rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.given(4), "label 4 does not exist: give 1 to 3, or 0 for no label"),
        (lambda m: m.given(-1), "label -1 does not exist"),
        (lambda m: m.given(1.5), "dtype float64"),
        (lambda m: m.given(1, guidance=np.nan), "guidance is nan: give a finite number"),
        (lambda m: m.given(0, guidance=0.5), "guidance is 0.5, but there is no label"),
        (lambda m: m.sample(KEY, 2, guidance=0.5), "guidance is 0.5, but there is no label"),
        (
            lambda m: m.sample(KEY, 2, label=np.array([1, 2, 3])),
            "give one integer per example, 2",
        ),
        (
            lambda m: m.classify(np.zeros((1, 2)), np.array([0]), np.zeros(2)),
            "give 3 numbers, one per class",
        ),
    ],
)
def test_labels_and_weights_that_cannot_be_used_are_errors(model, call, message):
    with pytest.raises(UserError, match=message):
        call(model)


def test_a_model_without_classes_takes_no_label():
    method = gaussian_model().method
    method = method._replace(energy=method.energy._replace(classes=0))
    model = Model.create(method, {}, sharding.make_mesh())
    for call in (
        lambda: model.given(1),
        lambda: model.sample(KEY, 1, label=1),
        lambda: model.classify(np.zeros((1, 2)), np.array([0])),
    ):
        with pytest.raises(UserError, match="trained without labels: give no label"):
            call()


def test_labels_are_dropped_with_the_given_probability():
    """20,000 examples, with a false-alarm rate of 1e-6; a label is kept or becomes 0."""
    n = 20_000
    keys = jax.random.split(KEY, n)
    labels = jnp.arange(n) % 3 + 1
    dropped = np.asarray(train_step.drop_labels(keys, labels, 0.1))
    assert set(np.unique(dropped[dropped != labels])) == {0}
    assert_counts(np.bincount(dropped == 0), np.array([0.9, 0.1]))
