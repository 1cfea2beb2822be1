import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drl_jax import noise
from drl_jax.errors import UserError
from drl_jax.networks import mlp


def test_f_is_one_number_per_vector_that_depends_on_the_level_and_is_differentiable():
    energy = mlp.energy(2, width=16, depth=2)
    params, vectors = energy.init(jax.random.key(0))
    normalised, new_vectors = energy.normalise(params, vectors)
    assert vectors == new_vectors == {}
    jax.tree.map(np.testing.assert_array_equal, params, normalised)
    x = jnp.tile(jax.random.normal(jax.random.key(1), (1, 2)), (6, 1))
    f = jax.jit(energy.f)(params, x, jnp.arange(6))
    assert f.shape == (6,)
    assert len(np.unique(f)) == 6
    gradient = jax.grad(lambda x: jax.jit(energy.f)(params, x, jnp.arange(6)).sum())(x)
    assert np.all(np.isfinite(gradient))
    assert np.any(gradient != 0)


def test_the_angles_of_vectors_of_unit_variance_vary_by_about_a_radian():
    """20% are more than four standard errors of the mean square (a false alarm in 30,000).

    The frequencies for points in the plane are those with which toy2d.py was measured.
    """
    for dimension, expected in ((2, mlp.FREQUENCY**2 * 2), (13, 1), (200, 1)):
        params, _ = mlp.energy(dimension, width=500, depth=1).init(jax.random.key(0))
        (waves,) = (
            leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
            if "waves" in str(path) and leaf.ndim == 2
        )
        mean_square = np.sum(np.square(waves)) / waves.shape[1]
        np.testing.assert_allclose(mean_square, expected, rtol=0.2)


def perturbed(energy):
    """Returns parameters far from their initial values."""
    params, _ = energy.init(jax.random.key(0))
    return jax.tree.map(lambda p: p + jnp.sin(jnp.arange(p.size)).reshape(p.shape) / 3, params)


def test_a_network_with_classes_reads_a_label_per_vector():
    """No label is label 0. Fails if labels are added after the activation."""
    energy = mlp.energy(3, width=8, depth=1, T=6, classes=4)
    assert energy.classes == 4
    params = perturbed(energy)
    f = jax.jit(energy.f)
    x = jnp.tile(jax.random.normal(jax.random.key(1), (1, 3)), (5, 1))
    t, label = jnp.full(5, 2), jnp.arange(5)
    labelled = f(params, x, t, label=label)
    assert np.min(np.abs(labelled[:, None] - labelled) + np.eye(5)) > 1e-3
    np.testing.assert_allclose(f(params, x, t, label=label[::-1]), labelled[::-1], rtol=1e-5)
    np.testing.assert_allclose(f(params, x, t), np.repeat(labelled[0], 5), rtol=1e-5)
    y_map, temb = params.pop("y_map"), params["temb_1"]
    bias = temb["bias"] + y_map["kernel"][3] + y_map["bias"]
    without = mlp.energy(3, width=8, depth=1, T=6)
    expected = without.f(params | {"temb_1": temb | {"bias": bias}}, x, t)
    np.testing.assert_allclose(np.repeat(labelled[3], 5), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"labels are given to a MLP without classes"):
        without.f(params, x, t, label=label)


def test_dropout_needs_keys_and_depends_only_on_each_example_and_its_key():
    energy = mlp.energy(3, width=32, depth=2, T=6, dropout=0.5)
    params = perturbed(energy)
    x, t = jax.random.normal(jax.random.key(1), (6, 3)), jnp.arange(6)
    keys = noise.example_keys(jax.random.key(4), jnp.arange(6))
    f = jax.jit(energy.f)
    without, dropped = f(params, x, t), f(params, x, t, keys)
    assert np.all(np.abs(without - dropped) > 1e-4)
    expected = mlp.energy(3, width=32, depth=2, T=6).f(params, x, t)
    np.testing.assert_allclose(without, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(f(params, x[::-1], t[::-1], keys[::-1]), dropped[::-1], 1e-4)
