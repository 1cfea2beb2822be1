"""The tests check the package's annotations at run time; see tests/conftest.py."""

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from drl_jax import diffusion, noise

SCHEDULE = diffusion.schedule(6)
KEYS = noise.example_keys(jax.random.key(0), jnp.arange(3))


def test_arrays_of_the_annotated_shapes_are_accepted():
    x = diffusion.diffuse(KEYS, jnp.zeros((3, 2)), jnp.zeros(3, int), SCHEDULE)
    assert x.shape == (3, 2)


@pytest.mark.parametrize(
    ("x", "t"),
    [
        (jnp.zeros((4, 2)), jnp.zeros(3, int)),  # another number of examples
        (jnp.zeros((3, 2), int), jnp.zeros(3, int)),  # another dtype
        (jnp.zeros((3, 2)), jnp.zeros((3, 1), int)),  # another number of axes
    ],
)
def test_other_shapes_and_dtypes_are_refused(x, t):
    with pytest.raises(jaxtyping.TypeCheckError):
        diffusion.diffuse(KEYS, x, t, SCHEDULE)
