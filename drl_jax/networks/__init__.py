"""Networks f(x, t): `resnet` and `image_mlp` for images, signals, volumes; `mlp` for vectors.

In these modules, the function `energy` returns an `energy.Energy`. `unet` maps examples to
arrays of their shape; `energy.from_image_to_image` makes an energy of it. `convolution` and
`winograd` contain the convolutions, `spectral` the spectral normalisation.
"""
