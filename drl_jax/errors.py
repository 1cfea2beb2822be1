"""What a user can get wrong, told in one line."""


class UserError(ValueError):
    """Something outside the program is wrong, and its user can put it right.

    The message is one line: what is wrong, the value, what to do. `drl_jax.main` prints
    that line and exits with status 1; everything else keeps its traceback.
    """
