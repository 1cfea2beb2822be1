"""Energy-based models learned by diffusion recovery likelihood (Gao et al., ICLR 2021)."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from drl_jax.model import Model


def load(workdir: str) -> "Model":
    """Returns the model of a work directory's newest readable checkpoint.

    Raises:
      UserError: if there is none.
    """
    from drl_jax import model  # JAX and Orbax load with it, not with the package

    return model.load_run(workdir).model
