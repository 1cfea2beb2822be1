import importlib
import inspect
import subprocess
import sys

import pytest
from helpers import tiny

from drl_jax import config as config_lib
from drl_jax.runtime import processes
from drl_jax.tasks import table

TASKS = pytest.mark.parametrize("task", table.TASKS.values(), ids=table.TASKS)
FLAGS = pytest.mark.parametrize("flag", table.all_flags().values(), ids=table.all_flags())


def test_the_table_needs_neither_jax_nor_numpy():
    program = (
        "import sys, drl_jax.tasks.table\n"
        "print({'jax', 'numpy', 'tensorflow', 'orbax'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tiny.ROOT, capture_output=True, text=True
    )
    assert done.stdout == "set()\n", done.stderr


@TASKS
def test_a_task_has_a_module_whose_run_takes_exactly_its_flags(task):
    module = importlib.import_module(f"drl_jax.tasks.{task.name}")
    loaded = "run" if task.trained else "config"
    parameters = inspect.signature(module.run).parameters
    assert parameters.keys() == {loaded, "workdir", *task.arguments}
    assert all(each.default is inspect.Parameter.empty for each in parameters.values())


def test_every_module_with_a_run_is_in_the_table():
    folder = tiny.ROOT / "drl_jax" / "tasks"
    modules = [*folder.glob("*.py"), *folder.glob("*/__init__.py")]
    names = {
        path.parent.name if path.name == "__init__.py" else path.stem
        for path in modules
        if "\ndef run(" in path.read_text()
    }
    assert names == table.TASKS.keys()


@TASKS
def test_a_name_means_the_same_flag_in_every_task(task):
    for flag in (*table.COMMON, *task.flags):
        assert flag is table.all_flags()[flag.name]


@TASKS
def test_a_task_requires_flags_that_it_has_and_that_have_no_default(task):
    flags = {flag.name: flag for flag in (*table.COMMON, *task.flags)}
    assert flags.keys() >= set(task.required)
    assert all(flags[name].default is None for name in task.required)
    assert "workdir" in task.required or not task.trained


@TASKS
def test_the_fields_that_a_task_may_change_exist(task):
    names = [name for name, _ in config_lib.flatten(config_lib.default())]
    for prefix in (*task.changeable, *task.fixed):
        assert any(name.startswith(prefix) for name in names)
    assert [name for name in names if task.may_change(name)] or task.name == "export"


def test_after_training_a_task_may_change_the_sampler_and_the_data_but_not_the_network():
    task = table.TASKS["evaluate"]
    assert task.may_change("mcmc.sampler")
    assert task.may_change("data.name")
    assert not task.may_change("data.channels")
    assert not task.may_change("energy.ch")
    assert not table.TASKS["export"].may_change("mcmc.K")


@pytest.mark.parametrize("name", ["likelihood", "ood"])
def test_where_held_out_data_are_measured_their_split_is_changed_and_not_that_of_training(name):
    """Fails if --config.data.split=test can make a task believe that it was trained on."""
    task = table.TASKS[name]
    assert task.may_change("evaluation.split")
    assert not task.may_change("data.split")
    assert table.TASKS["evaluate"].may_change("data.split")


@FLAGS
def test_a_flag_implies_only_fields_that_its_tasks_may_change(flag):
    assert set(flag.implied) <= set(flag.choices)
    for fields in flag.implied.values():
        for name in table.tasks_of(flag):
            assert all(table.TASKS[name].may_change(field) for field in fields)


def test_an_import_takes_the_network_from_the_checkpoint():
    task = table.TASKS["import_original"]
    assert task.may_change("mcmc.K")
    assert not task.may_change("energy.N")
    assert not task.may_change("data.image_size")


@FLAGS
def test_a_flag_has_a_default_or_says_what_happens_without_it(flag):
    required = all(flag.name in table.TASKS[name].required for name in table.tasks_of(flag))
    assert flag.default not in (None, ()) or flag.default_help or required
    assert flag.help[0].isupper()
    assert flag.help.endswith("...") or not flag.help.endswith(".")


@FLAGS
def test_a_default_is_within_the_bounds(flag):
    if flag.choices:
        assert flag.default in flag.choices
    if flag.type is int and flag.default is not None:
        assert flag.minimum <= flag.default
        assert flag.default <= flag.maximum
    if flag.default_help and not isinstance(flag.default_help, str):
        assert table.TASKS.keys() >= flag.default_help.keys()


def test_the_flags_of_a_job_are_the_fields_of_a_job():
    assert tuple(flag.name for flag in table.JOB) == processes.Job._fields
