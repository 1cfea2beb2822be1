import subprocess
import sys

import pytest
from helpers import tiny

from drl_jax.tools.plan import bars


def values(**changes):
    """Of a job that keeps to every bar, but for changes of its training step."""
    reduction = {
        "kind": "all-reduce",
        "name": "all-reduce.1",
        "size": 10**6,
        "runs": 1,
        "loop": "",
    }
    step = {
        "estimated_mfu": 0.8,
        "estimated_cycles": 100,
        "compile_seconds": 50.0,
        "bytes": {"code": 10**8},
        "bytes_needed": 10**9,
        "fits": True,
        "collectives": [reduction, reduction | {"size": 100}],
    }
    return {"training step": step | changes, "sampler": step | {"collectives": []}}


def missed(found):
    return [bar.name for bar in found if not bar.holds]


def every_bar(step, many=None):
    for kind in (bars.fast, bars.quiet, bars.fits):
        yield from kind(step)
    yield from bars.flat(values(), many or step)


REDUCTION = values()["training step"]["collectives"][0]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, ()),
        ({"estimated_mfu": 0.74}, ("estimated MFU",)),
        ({"compile_seconds": 61.0}, ("compilation",)),
        ({"bytes": {"code": 121 * 10**6}}, ("code",)),
        ({"fits": False, "bytes_needed": None}, ("the training step fits",)),
        ({"estimated_cycles": 103}, ("cycles a chip of a step",)),
        ({"collectives": []}, ("reductions",)),
        ({"collectives": 2 * [REDUCTION]}, ("reductions", "bytes that a step reduces")),
        ({"collectives": [REDUCTION | {"runs": 2}]}, ("reductions",)),
        ({"collectives": [REDUCTION | {"kind": "all-gather"}]}, ("reductions",)),
        (
            {"collectives": [REDUCTION, REDUCTION | {"size": 4, "loop": "while.1"}]},
            ("collectives in the chain",),
        ),
    ],
)
def test_what_a_step_misses_is_named(changes, names):
    found = missed(every_bar(values(**changes)))
    assert len(found) == len(names)
    for bar, name in zip(found, names, strict=True):
        assert bar.startswith(name)


def test_a_sampler_that_communicates_is_named():
    talking = values()
    talking["sampler"]["collectives"] = [REDUCTION]
    assert missed(every_bar(talking)) == ["collectives in the sampler"]


def test_a_small_job_keeps_to_every_bar_that_does_not_depend_on_size():
    command = [sys.executable, "-m", "drl_jax.tools.plan.bars", "--small"]
    done = subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 7
    assert all(line.startswith("holds") for line in lines)


def test_another_option_is_one_line(capsys):
    assert bars.main(["bars", "--large"]) == 1
    assert capsys.readouterr().err == "error: --large: the one option is --small\n"
