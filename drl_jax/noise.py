"""Randomness that belongs to examples: each one has its own key.

Keys are folded from (seed, step, example). An example therefore meets the same noise
whatever device it lies on and whoever its neighbours in the batch are.
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
    """Returns standard normal noise, an array of this shape for each key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def per_example(values: Shaped[Array, "B"], x: Float[Array, "B *D"]) -> Shaped[Array, "B *D"]:
    """Returns values [B] shaped [B, 1, ...] so that they scale each example of x."""
    return jnp.reshape(values, values.shape + (1,) * (x.ndim - 1))
