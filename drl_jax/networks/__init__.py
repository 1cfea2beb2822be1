"""Networks f(x, t): `resnet` and `image_mlp` for images, `mlp` for vectors.

In these modules, the function `energy` returns an `energy.Energy`. `convolution` and `winograd`
contain the convolutions, `spectral` the spectral normalisation.
"""
