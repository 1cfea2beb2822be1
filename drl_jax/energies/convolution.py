"""The 3x3 convolution, with a gradient that stays fast inside a loop.

Autodiff spells the input gradient as a convolution with transposed dimension numbers
(`01oi`). XLA:CPU runs those about five times slower inside a while-loop, where every
Langevin step lives, than outside it (https://github.com/jax-ml/jax/issues/12868). Here
the input gradient is a forward convolution (`01io`) of the output gradient with the kernel
turned by 180 degrees and its channels swapped: the same numbers, and one program for
every backend.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def _forward(
    x: Float[Array, "B H W I"], kernel: Float[Array, "3 3 I O"]
) -> Float[Array, "B H W O"]:
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@jax.custom_vjp
def conv3x3(
    x: Float[Array, "B H W I"], kernel: Float[Array, "3 3 I O"]
) -> Float[Array, "B H W O"]:
    """Convolves NHWC images with a 3x3 kernel, stride 1, zeros around the border.

    Reverse-mode differentiable to any order.
    """
    return _forward(x, kernel)


def _conv3x3_fwd(x, kernel):
    return conv3x3(x, kernel), (x, kernel)


def _conv3x3_bwd(residuals, g):
    x, kernel = residuals
    flipped = jnp.swapaxes(kernel[::-1, ::-1], 2, 3)
    (kernel_gradient,) = jax.vjp(lambda k: _forward(x, k), kernel)[1](g)
    return conv3x3(g, flipped), kernel_gradient


conv3x3.defvjp(_conv3x3_fwd, _conv3x3_bwd)
