"""Per-example random keys and draws.

Every example has its own key, derived from the seed, the step and the example's index in the
global batch. Its noise therefore depends neither on the device that holds it nor on the other
examples in the batch.

Draws are always float32 and promoted afterwards. JAX draws different numbers from the same key
in float64, so a chain in float64 (`jax.enable_x64`) would otherwise have other noise than the
same chain in float32.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped, UInt32

# What `jax.random.key` or `jax.random.PRNGKey` returns.
AnyKey = Key[Array, ""] | UInt32[Array, "_"]


def example_keys(key: AnyKey, examples: Int[Array, "B"]) -> Key[Array, "B"]:
    """Returns one key per example, from its index in the global batch."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, examples)


def fold(keys: Key[Array, "B"], data: int | Int[Array, ""]) -> Key[Array, "B"]:
    """Folds an integer into every key: the number of a step, or of a use of the key."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, data)


def normal(keys: Key[Array, "B"], shape: tuple[int, ...]) -> Float[Array, "B *D"]:
    """Draws standard normal noise of the given shape per key, in float32."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


def uniform(keys: Key[Array, "B"]) -> Float[Array, "B"]:
    """Draws one uniform number in [0, 1) per key, in float32."""
    return jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32))(keys)


def dropout(
    keys: Key[Array, "B"], h: Float[Array, "B *D"], rate: float
) -> Float[Array, "B *D"]:
    """Sets each feature to zero with probability `rate`, and divides the others by 1 - rate."""

    def draw(key):
        return jax.random.bernoulli(key, jnp.float32(1 - rate), h.shape[1:])

    return jnp.where(jax.vmap(draw)(keys), h / (1 - rate), 0)


def per_example(values: Shaped[Array, "B"], x: Float[Array, "B *D"]) -> Shaped[Array, "B ..."]:
    """Returns values [B] reshaped to [B, 1, ..., 1], to broadcast against x [B, ...]."""
    return jnp.reshape(values, values.shape + (1,) * (x.ndim - 1))
