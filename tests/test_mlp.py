import jax
import jax.numpy as jnp
import numpy as np

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
