import pytest

from drl_jax.tools.plan import chips, hlo, report
from drl_jax.tools.plan.programs import Compiled, Memory

TEXT = """\
ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %y = f32[8]{0} negate(%x), backend_config={"estimated_cycles":"3000000"}
}
"""
MEMORY = Memory(arguments=3 * 2**30, outputs=2**30, aliased=2**30, temporaries=2**30, code=0)
FITS = Compiled(1.0, MEMORY.total, MEMORY, hlo.parse(TEXT))
REFUSED = Compiled(1.0, None, None, None)


@pytest.fixture
def plan():
    """Returns a function that makes the plan of one program on a topology."""

    def make(compiled, name):
        topology = chips.parse(name)
        program = report.Program("training step", 64, compiled, flops=197e9, runs=86400)
        return {
            "topology": name,
            "chip": topology.chip.title,
            "devices": topology.devices,
            "memory": topology.chip.memory,
            "peak": topology.chip.peak,
            "clock": topology.chip.clock,
            "jax": "0",
            "programs": [report.values(program, topology)],
            "largest_batch_size": 0,
            "tried": [],
            "config": {"data": {"name": "digits"}},
        }

    return make


def test_memory_is_what_lives_at_once(plan):
    [program] = plan(FITS, "v5e:2x2")["programs"]
    assert program["bytes_needed"] == 4 * 2**30
    assert program["fits"]


def test_seconds_are_cycles_at_the_clock_and_mfu_and_days_follow(plan):
    [program] = plan(FITS, "v5e:2x2")["programs"]
    seconds = 3e6 * 2 * 4 * 128**2 / 197e12  # 131072 FLOPs a cycle
    assert program["estimated_seconds"] == pytest.approx(seconds)
    assert program["estimated_mfu"] == pytest.approx(1e-3 / seconds)
    assert program["estimated_days"] == pytest.approx(seconds)  # 86400 steps


def test_of_a_gpu_no_time_is_told_but_a_bound(plan):
    told = plan(FITS, "h100:8")
    [program] = told["programs"]
    assert not any(name.startswith("estimated") for name in program)
    assert program["seconds_at_peak"] == pytest.approx(197e9 / 989e12)
    assert report.NO_CYCLES in report.markdown(told)


def test_more_than_there_is_does_not_fit_though_it_compiles(plan):
    large = MEMORY._replace(temporaries=60 * 2**30)
    told = plan(FITS._replace(memory=large, needed=large.total), "a100:8")
    assert "| verdict | **does not fit** |" in report.markdown(told)


def test_a_refused_program_is_told_without_a_number(plan):
    text = report.markdown(plan(REFUSED, "v5e:2x2"))
    assert "| verdict | **does not fit** |" in text
    assert "| memory a device | ? |" in text
    assert "No batch was found that fits" in text
