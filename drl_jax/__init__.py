"""Energy-based models learned by diffusion recovery likelihood (Gao et al., ICLR 2021)."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from drl_jax.model import Model


def load(path_or_name: str) -> "Model":
    """Returns a trained model.

    Args:
      path_or_name: a work directory, whose newest readable checkpoint is taken; a file that
        --mode=export wrote; or a model that comes with the package: 'digits'.

    Raises:
      UserError: if there is none.
    """
    from drl_jax.storage import runs  # JAX and Orbax load with it, not with the package

    return runs.load(path_or_name).model
