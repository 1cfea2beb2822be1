"""The 3x3 convolution, with gradients that are fast on every backend.

Left to itself, autodiff spells the gradients in ways that XLA runs or compiles slowly:

- The input gradient is a convolution with transposed dimension numbers (`01oi`), about
  five times slower than a forward one inside a while-loop, where every Langevin step lives
  (https://github.com/jax-ml/jax/issues/12868). Here it is a forward convolution (`01io`) of
  the output gradient with the kernel turned by 180 degrees and its channels swapped: the
  same numbers, and one program for every backend.
- The kernel gradient is a convolution whose window is the whole image, with the batch for
  channels: in a while-loop it is a hundred times slower, unless the arrays are transposed
  first, as they are here. TPUs get it in pieces of one size.

And on CPUs wide ones are Winograd's, with fewer products, and so are their kernels' gradients
(`winograd.py`).

The two are each other's gradients, so both hold at any order of differentiation.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from drl_jax.energies import winograd

# Channels in one of the convolutions of `_kernel_gradient_by_tiles`.
CHANNELS = 128


def _forward(
    x: Float[Array, "B H W I"], kernel: Float[Array, "3 3 I O"]
) -> Float[Array, "B H W O"]:
    if winograd.pays(x, kernel):
        return lax.platform_dependent(x, kernel, cpu=winograd.conv3x3, default=_direct)
    return _direct(x, kernel)


def _direct(x, kernel):
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
    """Convolves NHWC images with a 3x3 kernel, stride 1, zeros around the border.

    Products are of numbers in x's precision, and their sums have the kernel's. Reverse-mode
    differentiable to any order. Inside `shard_map` the kernel must be each device's own, as
    `parallel.over_examples` makes it.
    """
    return _forward(x, kernel)


@jax.custom_vjp
def kernel_gradient(
    x: Float[Array, "B H W I"], g: Float[Array, "B H W O"]
) -> Float[Array, "3 3 I O"]:
    """Returns the gradient of <g, conv3x3(x, kernel)> with respect to the kernel.

    Products are of numbers in x's precision, and their sums have g's. Reverse-mode
    differentiable to any order.
    """
    return lax.platform_dependent(
        *(x, g),
        cpu=winograd.kernel_gradient if winograd.pays(x, g) else _kernel_gradient_transposed,
        tpu=_kernel_gradient_by_tiles,
        default=_kernel_gradient_by_convolution,
    )


@jax.custom_vjp
def whole_gradient(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns x; its gradient is computed and stored before it is used.

    XLA:TPU would rather compute it wherever a convolution reads it, convolutions and all:
    slower, and no two of them the same program.
    """
    return x


whole_gradient.defvjp(lambda x: (x, None), lambda _, g: (lax.optimization_barrier(g),))


def _transposed(kernel: Float[Array, "3 3 I O"]) -> Float[Array, "3 3 O I"]:
    """Returns the kernel of the adjoint convolution."""
    # The barrier lets XLA hoist this out of a loop in which the kernel is constant: it
    # does not think a reversal or a transposition alone worth hoisting.
    return lax.optimization_barrier(jnp.swapaxes(kernel[::-1, ::-1], 2, 3))


def _image_gradient(x, g, kernel):
    return conv3x3(g.astype(x.dtype), _transposed(kernel)).astype(x.dtype)


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


def _kernel_gradient_by_tiles(x, g):
    """Takes CHANNELS of x and CHANNELS of g at a time, which is what a TPU multiplies at once.

    So all widths come down to one shape an image size, and barriers keep out of it what
    stands around it: one program to compile, where each would take seconds.
    """

    def split(a):
        return [a[..., i : i + CHANNELS] for i in range(0, a.shape[-1], CHANNELS)]

    def tile(x, low):
        return lax.optimization_barrier(_correlate(x, low, g.dtype))

    xs, lows = lax.optimization_barrier((split(x), split(g.astype(x.dtype))))
    rows = [jnp.concatenate([tile(x, low) for low in lows], axis=3) for x in xs]
    return jnp.concatenate(rows, axis=2)


def _correlate(x, g, dtype):
    # Images are channels here, and the channels of x are images.
    return lax.conv_general_dilated(
        x,
        g,
        (1, 1),
        ((1, 1), (1, 1)),
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
        preferred_element_type=dtype,
    )


def _kernel_gradient_transposed(x, g):
    # The barriers keep XLA from making of this what `_correlate` says.
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
