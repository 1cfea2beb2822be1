"""3x3 convolution whose gradients are fast on every backend.

The gradients of a convolution by JAX's automatic differentiation are slow to run or to compile:

- The gradient with respect to the images is a convolution with transposed dimension numbers
  (`01oi`). Inside a while-loop, such as that over the steps of a chain, it is about five times
  slower than the forward convolution (https://github.com/jax-ml/jax/issues/12868). Here it is a
  forward convolution (`01io`) of the output gradient with the kernel, rotated by 180 degrees
  and with its channels swapped: the same result, and the same program on every backend.
- The gradient with respect to the kernel is a convolution whose window is the whole image, with
  the batch in place of the channels. Inside a while-loop on CPUs, it is a hundred times slower
  than outside, unless the arrays are transposed first, as is done here. On TPUs it is computed
  in blocks of equal size.

On CPUs, wide convolutions and their kernel gradients use Winograd's algorithm (`winograd.py`).

The derivatives of the convolution and of its kernel gradient are expressed in terms of each
other, so derivatives of any order are as fast.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from drl_jax.networks import winograd

# Channels per block of `_kernel_gradient_by_blocks`: the width of a TPU's matrix unit.
BLOCK_CHANNELS = 128


def _forward(
    x: Float[Array, "B H W I"], kernel: Float[Array, "3 3 I O"]
) -> Float[Array, "B H W O"]:
    """Computes `conv3x3` by the fastest algorithm, without its gradients."""
    if winograd.is_faster(x, kernel):
        return lax.platform_dependent(x, kernel, cpu=winograd.conv3x3, default=_direct)
    return _direct(x, kernel)


def _direct(x, kernel):
    """Computes `conv3x3` as a direct sum, with XLA's convolution."""
    return lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=kernel.dtype,
    )


@jax.custom_vjp
def conv3x3(
    x: Float[Array, "B H W I"], kernel: Float[Array, "3 3 I O"]
) -> Float[Array, "B H W O"]:
    """Convolves NHWC images with a 3x3 kernel, with stride 1 and zero padding.

    Multiplies in x's dtype and accumulates in the kernel's. Reverse-mode differentiable to any
    order. Inside `shard_map` the kernel must be device-varying, since its gradient is not
    summed over devices here.
    """
    return _forward(x, kernel)


@jax.custom_vjp
def kernel_gradient(
    x: Float[Array, "B H W I"], g: Float[Array, "B H W O"]
) -> Float[Array, "3 3 I O"]:
    """Returns the gradient of <g, conv3x3(x, kernel)> with respect to the kernel.

    Multiplies in x's dtype and accumulates in g's. Reverse-mode differentiable to any order.
    """
    on_cpu = (
        winograd.kernel_gradient if winograd.is_faster(x, g) else _kernel_gradient_transposed
    )
    return lax.platform_dependent(
        x,
        g,
        cpu=on_cpu,
        tpu=_kernel_gradient_by_blocks,
        default=_kernel_gradient_by_convolution,
    )


@jax.custom_vjp
def materialise_gradient(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns x unchanged, but makes XLA store the gradient of x in memory before it is used.

    Otherwise XLA:TPU fuses the computation of the gradient, convolutions included, into every
    convolution that reads it. This is slower, and every such convolution has to be compiled
    separately.
    """
    return x


materialise_gradient.defvjp(lambda x: (x, None), lambda _, g: (lax.optimization_barrier(g),))


def _adjoint(kernel: Float[Array, "3 3 I O"]) -> Float[Array, "3 3 O I"]:
    """Returns the kernel of the adjoint convolution."""
    # With the barrier, XLA moves this out of a loop in which the kernel is constant. XLA does
    # not move a reversal or a transposition by itself.
    return lax.optimization_barrier(jnp.swapaxes(kernel[::-1, ::-1], 2, 3))


def _image_gradient(x, g, kernel):
    """Returns the gradient of <g, conv3x3(x, kernel)> with respect to x, in x's dtype."""
    return conv3x3(g.astype(x.dtype), _adjoint(kernel)).astype(x.dtype)


def _conv3x3_fwd(x, kernel):
    return conv3x3(x, kernel), (x, kernel)


def _conv3x3_bwd(residuals, g):
    x, kernel = residuals
    return _image_gradient(x, g, kernel), kernel_gradient(x, g)


def _kernel_gradient_fwd(x, g):
    return kernel_gradient(x, g), (x, g)


def _kernel_gradient_bwd(residuals, kernel):
    x, g = residuals
    return _image_gradient(x, g, kernel), conv3x3(x, kernel)


conv3x3.defvjp(_conv3x3_fwd, _conv3x3_bwd)
kernel_gradient.defvjp(_kernel_gradient_fwd, _kernel_gradient_bwd)


def _kernel_gradient_by_convolution(x, g):
    return _correlate(x, g.astype(x.dtype), g.dtype)


def _kernel_gradient_by_blocks(x, g):
    """Computes the kernel gradient in blocks of BLOCK_CHANNELS channels of x and of g.

    The shape of a block then depends only on the batch and image size, not on the number of
    channels. The barriers keep neighbouring operations from being fused into the blocks, so
    XLA:TPU compiles each shape once. Without blocks, every combination of I and O would take
    seconds to compile.
    """

    def split(a):
        return [a[..., i : i + BLOCK_CHANNELS] for i in range(0, a.shape[-1], BLOCK_CHANNELS)]

    def block(x, g_block):
        return lax.optimization_barrier(_correlate(x, g_block, g.dtype))

    xs, gs = lax.optimization_barrier((split(x), split(g.astype(x.dtype))))
    rows = [jnp.concatenate([block(x, g_block) for g_block in gs], axis=3) for x in xs]
    return jnp.concatenate(rows, axis=2)


def _correlate(x, g, dtype):
    """Computes the kernel gradient as one convolution, accumulated in `dtype`."""
    # The batch takes the place of the channels, and the channels of x that of the batch.
    return lax.conv_general_dilated(
        x,
        g,
        (1, 1),
        ((1, 1), (1, 1)),
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
        preferred_element_type=dtype,
    )


def _kernel_gradient_transposed(x, g):
    # The barriers keep XLA from merging the transpositions into the convolution, which would
    # then be the slow one of `_correlate`.
    x, g = lax.optimization_barrier((x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)))
    result = lax.conv_general_dilated(
        x,
        g.astype(x.dtype),
        (1, 1),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=g.dtype,
    )
    return lax.optimization_barrier(result).transpose(1, 2, 0, 3)
