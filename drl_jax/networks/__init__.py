"""Networks f(x, t): `resnet` for images, `mlp` for vectors.

The `energy` function of either module returns an `energy.Energy`. `convolution`, `winograd` and
`spectral` are what they are built from.
"""
