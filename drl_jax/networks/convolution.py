"""Convolution with 3, 3x3 or 3x3x3 taps, whose gradients are fast on every backend.

The gradients of a convolution by JAX's automatic differentiation are slow to run or to compile:

- The gradient with respect to the images (or signals, or volumes) is a convolution with
  transposed dimension numbers (`01oi`). Inside a while-loop, such as that over the steps of a
  chain, it is about five times slower than the forward convolution
  (https://github.com/jax-ml/jax/issues/12868). Here it is a forward convolution (`01io`) of the
  output gradient with the kernel, reversed along its spatial axes and with its channels
  swapped: the same result, and the same program on every backend.
- The gradient with respect to the kernel is a convolution whose window is the whole image, with
  the batch in place of the channels. Inside a while-loop on CPUs, it is a hundred times slower
  than outside, unless the arrays are transposed first, as is done here. On TPUs it is computed
  in blocks of equal size.

On CPUs, wide convolutions of images and their kernel gradients use Winograd's algorithm
(`winograd.py`).

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

Kernel = Float[Array, "3 I O"] | Float[Array, "3 3 I O"] | Float[Array, "3 3 3 I O"]


def _forward(x: Float[Array, "B *S I"], kernel: Kernel) -> Float[Array, "B *S O"]:
    """Computes `conv3x3` by the fastest algorithm, without its gradients."""
    if x.ndim == 4 and winograd.is_faster(x, kernel):
        return lax.platform_dependent(x, kernel, cpu=winograd.conv3x3, default=_direct)
    return _direct(x, kernel)


def _direct(x, kernel):
    """Computes `conv3x3` as a direct sum, with XLA's convolution."""
    axes = _spatial(x)
    return lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        (1,) * len(axes),
        "SAME",
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
        preferred_element_type=kernel.dtype,
    )


def _spatial(x) -> str:
    """Returns one letter per spatial axis of x [B, ..., C], for dimension numbers."""
    return "DHW"[5 - x.ndim :]


@jax.custom_vjp
def conv3x3(x: Float[Array, "B *S I"], kernel: Kernel) -> Float[Array, "B *S O"]:
    """Convolves NHWC images with a 3x3 kernel, with stride 1 and zero padding.

    Likewise signals [B, L, I] with a kernel of 3 taps, and volumes [B, D, H, W, I] with one of
    3x3x3.

    Multiplies in x's dtype and accumulates in the kernel's. Reverse-mode differentiable to any
    order. Inside `shard_map` the kernel must be device-varying, since its gradient is not
    summed over devices here.
    """
    return _forward(x, kernel)


@jax.custom_vjp
def kernel_gradient(x: Float[Array, "B *S I"], g: Float[Array, "B *S O"]) -> Kernel:
    """Returns the gradient of <g, conv3x3(x, kernel)> with respect to the kernel.

    Multiplies in x's dtype and accumulates in g's. Reverse-mode differentiable to any order.
    """
    on_cpu = _kernel_gradient_transposed
    if x.ndim == 4 and winograd.is_faster(x, g):
        on_cpu = winograd.kernel_gradient
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


def _adjoint(kernel: Float[Array, "*taps I O"]) -> Float[Array, "*taps O I"]:
    """Returns the kernel of the adjoint convolution."""
    # With the barrier, XLA moves this out of a loop in which the kernel is constant. XLA does
    # not move a reversal or a transposition by itself.
    reversed_kernel = lax.rev(kernel, range(kernel.ndim - 2))
    return lax.optimization_barrier(jnp.swapaxes(reversed_kernel, -2, -1))


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
    rows = [jnp.concatenate([block(x, g_block) for g_block in gs], axis=-1) for x in xs]
    return jnp.concatenate(rows, axis=-2)


def _correlate(x, g, dtype):
    """Computes the kernel gradient as one convolution, accumulated in `dtype`."""
    # The batch takes the place of the channels, and the channels of x that of the batch.
    axes = _spatial(x)
    return lax.conv_general_dilated(
        x,
        g,
        (1,) * len(axes),
        ((1, 1),) * len(axes),
        dimension_numbers=(f"C{axes}N", f"I{axes}O", f"{axes}NC"),
        preferred_element_type=dtype,
    )


def _kernel_gradient_transposed(x, g):
    # The barriers keep XLA from merging the transpositions into the convolution, which would
    # then be the slow one of `_correlate`.
    axes = _spatial(x)
    x, g = lax.optimization_barrier((jnp.swapaxes(x, 0, -1), jnp.moveaxis(g, 0, -2)))
    result = lax.conv_general_dilated(
        x,
        g.astype(x.dtype),
        (1,) * len(axes),
        ((1, 1),) * len(axes),
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
        preferred_element_type=g.dtype,
    )
    return jnp.moveaxis(lax.optimization_barrier(result), 0, -2)
