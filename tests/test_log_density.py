import jax
import jax.numpy as jnp
import numpy as np

from drl_jax.mcmc.log_density import value_and_gradient


def test_each_chain_has_the_gradient_of_its_own_log_density():
    precision = jnp.arange(1.0, 5.0)

    def log_density_fn(y):
        return -precision * jnp.sum(y**2, axis=(1, 2)) / 2

    y = jax.random.normal(jax.random.key(0), (4, 3, 2))
    log_p, gradient = value_and_gradient(log_density_fn, y)
    np.testing.assert_allclose(log_p, log_density_fn(y), rtol=1e-6)
    np.testing.assert_allclose(gradient, -precision[:, None, None] * y, rtol=1e-6)
