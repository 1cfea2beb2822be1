import jax.numpy as jnp
import numpy as np
import pytest

from drl_jax.errors import (
    Interrupted,
    UserError,
    as_user_error,
    out_of_memory_as_user_error,
    resumable,
)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(28, "No space left on device", "/a/b"),
            "cannot save: No space left on device",
        ),
        (RuntimeError("first line,\n  second line"), "cannot save: first line, second line"),
        (UserError("the bucket is locked"), "cannot save: the bucket is locked"),
    ],
)
def test_every_exception_becomes_one_line_with_the_original_as_its_cause(error, message):
    with pytest.raises(UserError) as raised, as_user_error("cannot save"):
        raise error
    assert str(raised.value) == message
    assert raised.value.__cause__ is error


def test_requests_to_stop_are_not_turned_into_errors():
    with pytest.raises(KeyboardInterrupt), as_user_error("cannot save"):
        raise KeyboardInterrupt


def test_a_lack_of_memory_is_one_line_that_says_what_to_lower():
    """Checked with the errors that NumPy and JAX really raise."""
    for allocate in np.zeros, jnp.zeros:
        with (
            pytest.raises(UserError, match=r"^there is not enough memory \([^\n]*batch_size"),
            out_of_memory_as_user_error(),
        ):
            allocate(10**13).sum()


def test_other_errors_of_programs_are_not_taken_for_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="INTERNAL: a bug"), out_of_memory_as_user_error():
        raise RuntimeError("INTERNAL: a bug")


def test_interrupted_holds_the_signal_and_states_the_saved_step():
    interrupted = Interrupted(15, resumable(300))
    assert interrupted.signum == 15
    assert str(interrupted).startswith("stopped by signal 15; step 300 is saved")
