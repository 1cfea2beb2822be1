"""Labels and guidance: the densities of classes, and their samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import gaussian_classes
from helpers.gaussian_classes import DIMENSION, MEANS, SCHEDULE, VARIANCES
from helpers.statistical import assert_counts, assert_mean, assert_variance

from drl_jax.errors import UserError
from drl_jax.model import Model
from drl_jax.networks.guidance import Condition, conditioned, with_condition
from drl_jax.networks.initialiser import Initialiser
from drl_jax.runtime import sharding
from drl_jax.training import step as train_step

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def model():
    return gaussian_classes.model()


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


def test_by_default_samples_are_of_each_class_in_turn(model):
    assert model.each_label(7).tolist() == [1, 2, 3, 1, 2, 3, 1]
    labels = np.array([1, 2, 3, 1])
    np.testing.assert_array_equal(
        model.sample(KEY, 4, guidance=0.5), model.sample(KEY, 4, label=labels, guidance=0.5)
    )
    np.testing.assert_array_equal(model.given(2).sample(KEY, 4), model.sample(KEY, 4, label=2))
    none = model.sample(KEY, 4, label=0)
    assert not np.allclose(none, model.sample(KEY, 4))


def test_arguments_replace_the_label_and_the_guidance_of_given(model):
    """Without a label, guidance is that of the given one; `classify` has neither."""
    x, t = np.linspace(-1, 1, 8).reshape(4, 2), np.arange(4)
    guided = model.given(3, guidance=0.7)
    two = np.full(4, 2)
    np.testing.assert_array_equal(guided.f(x, t, two), model.f(x, t, two))
    np.testing.assert_array_equal(guided.sample(KEY, 4, label=2), model.given(2).sample(KEY, 4))
    np.testing.assert_array_equal(
        model.given(3).sample(KEY, 4, guidance=0.7), guided.sample(KEY, 4)
    )
    np.testing.assert_array_equal(guided.classify(x, t), model.classify(x, t))
    assert "parameters=0" in repr(guided)


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
    method = gaussian_classes.model().method._replace(initialiser=Initialiser(None, g))
    condition = Condition(jnp.int32(3), jnp.float32(0.5))
    propose = method.propose(with_condition(params, condition))
    np.testing.assert_allclose(propose(jnp.zeros((2, 2)), jnp.zeros(2, int)), 9.0)
    labels = jnp.array([1, 2])
    propose = method.conditionals(params, label=labels).propose
    np.testing.assert_allclose(propose(jnp.zeros((2, 2)), jnp.zeros(2, int))[:, 0], [2, 4])


def test_other_labels_and_weights_compile_nothing_new():
    model = gaussian_classes.model()
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
    model = gaussian_classes.model(leapfrog=1)
    sizes = [model.given(label).adapt(KEY)[0].step_size[5] for label in (1, 2, 3)]
    assert sizes[2] < sizes[0] < sizes[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.given(4), "label 4 does not exist: give 1 to 3, or 0 for no label"),
        (lambda m: m.given(-1), "label -1 does not exist"),
        (lambda m: m.given(1.5), "dtype float64"),
        (lambda m: m.given(np.array([1, 2])), r"the label is \[1, 2\]: give one label"),
        (lambda m: m.given(1, guidance=np.nan), "guidance is nan: give a finite number"),
        (lambda m: m.given(0, guidance=0.5), "guidance is 0.5, but there is no label"),
        (
            lambda m: m.long_run(KEY, np.zeros((1, 2)), np.zeros(1, int), 1, guidance=0.5),
            "guidance is 0.5, but there is no label",
        ),
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
    method = gaussian_classes.model().method
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
