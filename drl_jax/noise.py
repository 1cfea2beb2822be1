"""Randomness that belongs to examples: each one has its own key.

Keys are folded from (seed, step, example). An example therefore meets the same noise
whatever device it lies on and whoever its neighbours in the batch are. Draws are float32
whatever is computed with them: JAX makes other numbers of the same key in float64, and so a
chain in float64 (`jax.enable_x64`) meets the noise of the one in float32.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped


def example_keys(key: Key[Array, ""], examples: Int[Array, "B"]) -> Key[Array, "B"]:
    """Returns one key an example, from the index of each in the global batch."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, examples)


def fold(keys: Key[Array, "B"], data: int | Int[Array, ""]) -> Key[Array, "B"]:
    """Returns every example's key for a purpose or a step numbered `data`."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, data)


def normal(keys: Key[Array, "B"], shape: tuple[int, ...]) -> Float[Array, "B *D"]:
    """Returns standard normal noise in float32, an array of this shape for each key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


def uniform(keys: Key[Array, "B"]) -> Float[Array, "B"]:
    """Returns a number in [0, 1) for each key, in float32."""
    return jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32))(keys)


def per_example(values: Shaped[Array, "B"], x: Float[Array, "B *D"]) -> Shaped[Array, "B *D"]:
    """Returns values [B] shaped [B, 1, ...] so that they scale each example of x."""
    return jnp.reshape(values, values.shape + (1,) * (x.ndim - 1))
