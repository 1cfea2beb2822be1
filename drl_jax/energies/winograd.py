"""Winograd's 3x3 convolution, with fewer products than the sum over nine taps has.

F(2 x 2, 3 x 3) of Lavin and Gray (2016, https://arxiv.org/abs/1509.09308): images are cut
into tiles of 4 x 4 that overlap by 2; a tile and the kernel, each transformed by additions,
are multiplied point by point, which gives 2 x 2 pixels of the result out of 16 products
instead of 36:

    Y = Aᵀ [(G K Gᵀ) * (Bᵀ X B)] A

Its rounding errors are a third larger than those of the direct sum. The gradient with respect
to the kernel is Gᵀ [(A Y Aᵀ) * (Bᵀ X B)] G, as many products again.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# Numbers of the images, in or out, of which the tiles are made at a time: the tiles' own, four
# times as many, go through all stages before they leave a core's cache.
NUMBERS = 2**18


def pays(x: Float[Array, "B H W I"], other: Float[Array, "*D O"]) -> bool:
    """Returns whether a CPU should multiply so, from what does not change with the batch.

    With few channels the transforms, whose time goes with I + O, take longer than the products
    save, which go with I * O. The other is a kernel, or images to be correlated with.
    """
    _, H, W, I = x.shape  # noqa: E741
    O = other.shape[-1]  # noqa: E741
    even = H % 2 == W % 2 == 0 and min(H, W) >= 4
    return even and min(I, O) >= 32 and I * O >= 32 * 64 and x.dtype == other.dtype


def conv3x3(
    x: Float[Array, "B H W I"], kernel: Float[Array, "3 3 I O"]
) -> Float[Array, "B H W O"]:
    """Returns what `convolution.conv3x3` does, of images with even H and W."""
    # The barrier has XLA hoist this out of a loop in which the kernel is constant.
    kernel_points = lax.optimization_barrier(_along_both(_of_kernel, kernel))

    def convolved(x):
        products = jnp.einsum("pqbhwi,pqio->pqbhwo", _image_points(x), kernel_points)
        rows = jnp.stack(_of_products(products), 3)
        return jnp.stack(_of_products(rows), 4).reshape(*x.shape[:3], kernel.shape[-1])

    few = _few(x, kernel)
    results = lax.map(convolved, x.reshape(len(x) // few, few, *x.shape[1:]))
    return results.reshape(*x.shape[:3], kernel.shape[-1])


def kernel_gradient(
    x: Float[Array, "B H W I"], g: Float[Array, "B H W O"]
) -> Float[Array, "3 3 I O"]:
    """Returns what `convolution.kernel_gradient` does, of images with even H and W."""
    few = _few(x, g)

    def add(total, chunk):
        x, g = chunk
        pixels = g.reshape(len(g), g.shape[1] // 2, 2, g.shape[2] // 2, 2, g.shape[-1])
        rows = jnp.stack(_to_products([pixels[:, :, i] for i in range(2)]))
        g_points = jnp.stack(_to_products([rows[..., j, :] for j in range(2)]), 1)
        products = jnp.einsum("pqbhwi,pqbhwo->pqio", _image_points(x), g_points)
        return total + products, None

    zeros = jnp.zeros_like(x, shape=(4, 4, x.shape[-1], g.shape[-1]))
    chunks = [a.reshape(len(x) // few, few, *a.shape[1:]) for a in (x, g)]
    total, _ = lax.scan(add, zeros, chunks)
    return _along_both(_to_kernel, total)


def _few(x, other):
    """Returns how many images are to be taken at a time."""
    B, H, W, I = x.shape  # noqa: E741
    most = max(1, NUMBERS // (H * W * max(I, other.shape[-1])))
    return max((n for n in range(1, min(most, B) + 1) if B % n == 0), default=1)


def _image_points(x):
    """Returns Bᵀ X B of every tile, [4, 4, B, H/2, W/2, I]."""
    _, H, W, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = jnp.stack(_of_tile([padded[:, i : i + H - 1 : 2] for i in range(4)]))
    return jnp.stack(_of_tile([rows[:, :, :, j : j + W - 1 : 2] for j in range(4)]), 1)


def _along_both(transform, a):
    """Returns the transform of a's first axis, and of its second."""
    rows = jnp.stack(transform(a))
    return jnp.stack(transform(jnp.swapaxes(rows, 0, 1)), 1)


def _of_kernel(g):
    """Returns G g: 4 points of 3 taps."""
    return g[0], (g[0] + g[1] + g[2]) / 2, (g[0] - g[1] + g[2]) / 2, g[2]


def _to_kernel(m):
    """Returns Gᵀ m: 3 taps of 4 points."""
    return m[0] + (m[1] + m[2]) / 2, (m[1] - m[2]) / 2, (m[1] + m[2]) / 2 + m[3]


def _of_tile(d):
    """Returns Bᵀ d: 4 points of 4 pixels."""
    return d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]


def _of_products(m):
    """Returns Aᵀ m: 2 pixels of 4 points."""
    return m[0] + m[1] + m[2], m[1] - m[2] - m[3]


def _to_products(y):
    """Returns A y: 4 points of 2 pixels."""
    return y[0], y[0] + y[1], y[0] - y[1], -y[1]
