"""Networks f(x, t): `resnet` for images, `mlp` for vectors."""
