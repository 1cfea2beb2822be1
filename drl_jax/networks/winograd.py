"""Winograd's 3x3 convolution, which needs fewer multiplications than the direct sum.

Implements F(2 x 2, 3 x 3) of Lavin and Gray (2016, https://arxiv.org/abs/1509.09308). Images
are cut into 4 x 4 tiles that overlap by 2. Tile X and kernel K are transformed by additions and
multiplied elementwise; a last transform gives 2 x 2 pixels of the result Y from 16 products
instead of 36:

    Y = Aᵀ [(G K Gᵀ) * (Bᵀ X B)] A

Rounding errors are a third larger than those of the direct sum. For the gradient dY of the
result, the kernel's gradient takes as many products:

    dK = Gᵀ [(A dY Aᵀ) * (Bᵀ X B)] G

Both are used on CPUs only. `cpu_step.md` has the measurements.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# Images are processed in chunks. This is the maximum number of elements of a chunk's input or
# output images, whichever are more. The tiles of a chunk have four times as many elements, and
# stay in a core's cache from the first transform to the last.
CHUNK_ELEMENTS = 2**18


def is_faster(x: Float[Array, "B H W I"], other: Float[Array, "*D O"]) -> bool:
    """Returns whether this convolution is faster than the direct sum on a CPU.

    The cost of the transforms grows with I + O, that of the saved products with I * O, so with
    few channels the direct sum is faster. The answer does not depend on the batch size.

    Args:
      x: images.
      other: the kernel; or for the kernel's gradient, the output gradient.
    """
    _, H, W, I = x.shape  # noqa: E741
    O = other.shape[-1]  # noqa: E741
    even = H % 2 == W % 2 == 0 and min(H, W) >= 4
    return even and min(I, O) >= 32 and I * O >= 32 * 64 and x.dtype == other.dtype


def conv3x3(
    x: Float[Array, "B H W I"], kernel: Float[Array, "3 3 I O"]
) -> Float[Array, "B H W O"]:
    """Computes `convolution.conv3x3` for even H and W."""
    # With the barrier, XLA moves the transform out of a loop in which the kernel is constant.
    kernel_points = lax.optimization_barrier(_along_both_axes(_kernel_transform, kernel))

    def convolve(x):
        products = jnp.einsum("pqbhwi,pqio->pqbhwo", _image_points(x), kernel_points)
        rows = jnp.stack(_output_transform(products), 3)
        return jnp.stack(_output_transform(rows), 4).reshape(*x.shape[:3], kernel.shape[-1])

    n = _chunk_size(x, kernel)
    results = lax.map(convolve, x.reshape(len(x) // n, n, *x.shape[1:]))
    return results.reshape(*x.shape[:3], kernel.shape[-1])


def kernel_gradient(
    x: Float[Array, "B H W I"], g: Float[Array, "B H W O"]
) -> Float[Array, "3 3 I O"]:
    """Computes `convolution.kernel_gradient` for even H and W."""
    n = _chunk_size(x, g)

    def add(total, chunk):
        x, g = chunk
        pixels = g.reshape(len(g), g.shape[1] // 2, 2, g.shape[2] // 2, 2, g.shape[-1])
        rows = jnp.stack(_output_adjoint([pixels[:, :, i] for i in range(2)]))
        g_points = jnp.stack(_output_adjoint([rows[..., j, :] for j in range(2)]), 1)
        products = jnp.einsum("pqbhwi,pqbhwo->pqio", _image_points(x), g_points)
        return total + products, None

    zeros = jnp.zeros_like(x, shape=(4, 4, x.shape[-1], g.shape[-1]))
    chunks = [a.reshape(len(x) // n, n, *a.shape[1:]) for a in (x, g)]
    total, _ = lax.scan(add, zeros, chunks)
    return _along_both_axes(_kernel_adjoint, total)


def _chunk_size(x, other):
    """Returns how many images are processed at a time: a divisor of the batch size."""
    B, H, W, I = x.shape  # noqa: E741
    most = max(1, CHUNK_ELEMENTS // (H * W * max(I, other.shape[-1])))
    return max((n for n in range(1, min(most, B) + 1) if B % n == 0), default=1)


def _image_points(x):
    """Returns Bᵀ X B of every tile, [4, 4, B, H/2, W/2, I]."""
    _, H, W, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = jnp.stack(_image_transform([padded[:, i : i + H - 1 : 2] for i in range(4)]))
    return jnp.stack(_image_transform([rows[:, :, :, j : j + W - 1 : 2] for j in range(4)]), 1)


def _along_both_axes(transform, a):
    """Applies a transform along a's first axis, then along its second."""
    rows = jnp.stack(transform(a))
    return jnp.stack(transform(jnp.swapaxes(rows, 0, 1)), 1)


def _kernel_transform(g):
    """Returns G g: 4 points from 3 taps."""
    return g[0], (g[0] + g[1] + g[2]) / 2, (g[0] - g[1] + g[2]) / 2, g[2]


def _kernel_adjoint(m):
    """Returns Gᵀ m: 3 taps from 4 points."""
    return m[0] + (m[1] + m[2]) / 2, (m[1] - m[2]) / 2, (m[1] + m[2]) / 2 + m[3]


def _image_transform(d):
    """Returns Bᵀ d: 4 points from 4 pixels."""
    return d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]


def _output_transform(m):
    """Returns Aᵀ m: 2 pixels from 4 points."""
    return m[0] + m[1] + m[2], m[1] - m[2] - m[3]


def _output_adjoint(y):
    """Returns A y: 4 points from 2 pixels."""
    return y[0], y[0] + y[1], y[0] - y[1], -y[1]
