"""Energy-based models trained by diffusion recovery likelihood (Gao et al., ICLR 2021).

`import drl_jax` is fast: JAX loads when a public name is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drl_jax.errors import UserError
    from drl_jax.model import Model
    from drl_jax.sampling import masks
    from drl_jax.sampling.ladder import Sampler

    __version__: str

__all__ = ["Model", "Sampler", "UserError", "__version__", "load", "masks"]

# Modules of the names that are imported on first use.
_MODULES = {
    "Model": "drl_jax.model",
    "Sampler": "drl_jax.sampling.ladder",
    "UserError": "drl_jax.errors",
}


def load(path_or_name: str) -> "Model":
    """Returns a trained model.

    Args:
      path_or_name: a work directory, whose newest undamaged checkpoint is used; a file
        written by --mode=export; or the name of a model that comes with the package, such as
        'digits'.

    Raises:
      UserError: if there is no such model, or it cannot be read.
    """
    from drl_jax.storage import runs

    return runs.load(path_or_name).model


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        return metadata.version("drl_jax")
    if name == "masks":
        return importlib.import_module("drl_jax.sampling.masks")
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
