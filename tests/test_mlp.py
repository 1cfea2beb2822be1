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
