"""Winograd's 3x3 convolution, with fewer products than the sum over nine taps has.

F(2 x 2, 3 x 3) of Lavin and Gray (2016, https://arxiv.org/abs/1509.09308): images are cut
into tiles of 4 x 4 that overlap by 2; a tile and the kernel, each transformed by additions,
are multiplied point by point, which gives 2 x 2 pixels of the result out of 16 products
instead of 36. Its rounding errors are a third larger than those of the direct sum.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def pays(x: Float[Array, "B H W I"], kernel: Float[Array, "3 3 I O"]) -> bool:
    """Returns whether a CPU should convolve so, from what does not change with the batch.

    Small images do not fill the matrix products, and with few channels the transforms, whose
    time goes with I + O, take longer than the products save, which go with I * O.
    """
    _, H, W, I = x.shape  # noqa: E741
    wide = I * kernel.shape[3] >= 128 * 256
    return wide and min(H, W) >= 8 and H % 2 == W % 2 == 0 and x.dtype == kernel.dtype


def conv3x3(
    x: Float[Array, "B H W I"], kernel: Float[Array, "3 3 I O"]
) -> Float[Array, "B H W O"]:
    """Returns what `convolution.conv3x3` does, of images with even H and W."""
    B, H, W, I = x.shape  # noqa: E741
    h, w = H // 2, W // 2
    # The barrier has XLA hoist this out of a loop in which the kernel is constant.
    kernels = lax.optimization_barrier(
        jnp.stack([k for row in _of_kernel(kernel) for k in _of_kernel(row)])
    )
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = _of_tile([padded[:, i : i + 2 * h - 1 : 2] for i in range(4)])
    tiles = jnp.stack(
        [
            tile
            for row in rows
            for tile in _of_tile([row[:, :, j : j + 2 * w - 1 : 2] for j in range(4)])
        ]
    )
    products = jnp.einsum("pni,pio->pno", tiles.reshape(16, B * h * w, I), kernels)
    rows = _of_products(products.reshape(4, 4, B, h, w, -1))
    result = jnp.stack([jnp.stack(_of_products(row)) for row in rows])
    return result.transpose(2, 3, 0, 4, 1, 5).reshape(B, H, W, -1)


def _of_kernel(g):
    """Returns G g: 4 points of 3 taps."""
    return g[0], (g[0] + g[1] + g[2]) / 2, (g[0] - g[1] + g[2]) / 2, g[2]


def _of_tile(d):
    """Returns Bᵀ d: 4 points of 4 pixels."""
    return d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]


def _of_products(m):
    """Returns Aᵀ m: 2 pixels of 4 points."""
    return m[0] + m[1] + m[2], m[1] - m[2] - m[3]
