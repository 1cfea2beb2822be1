"""Networks f(x, t): `resnet` for images, `mlp` for vectors.

In both modules, the function `energy` returns an `energy.Energy`. `convolution` and `winograd`
contain the convolutions, `spectral` the spectral normalisation.
"""
