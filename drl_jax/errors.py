"""What a user can get wrong, told in one line."""


class UserError(ValueError):
    """Something outside the program is wrong, and its user can put it right.

    The message is one line: what is wrong, the value, what to do. `drl_jax.main` prints
    that line and exits with status 1; everything else keeps its traceback.
    """


class Interrupted(Exception):  # noqa: N818  (not an error: the run can go on)
    """A run was asked to stop by a signal, and its state is saved."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"stopped by signal {signum}; step {step} is saved")
        self.signum = signum
