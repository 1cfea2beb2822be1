"""Energy-based models trained by diffusion recovery likelihood (Gao et al., ICLR 2021).

`import drl_jax` is fast: JAX loads when a public name is first used.
"""

import importlib
import os
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


def load(path_or_name: str | os.PathLike[str], *, set_up_jax: bool = True) -> "Model":
    """Returns a trained model, on all devices.

    Sets up JAX as the command line does: a CPU is divided into one device per core, at most
    eight, and compiled programs are cached on disk, so that the next process starts faster.
    This changes no setting that you have made by `jax.config` or by environment variables such
    as JAX_NUM_CPU_DEVICES and JAX_COMPILATION_CACHE_DIR. The number of devices cannot change
    after the first operation of JAX, so call `load` before it.

    Args:
      path_or_name: a work directory, whose newest undamaged checkpoint is used; a file
        written by --mode=export; or the name of a model that comes with the package, such as
        'digits'.
      set_up_jax: whether to set up JAX; False leaves all of its settings as they are.

    Raises:
      UserError: if there is no such model, or it cannot be read.
    """
    if set_up_jax:
        from drl_jax.runtime import jax_setup

        jax_setup.prepare()
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
