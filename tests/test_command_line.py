import os
import re
import subprocess
import sys

import pytest
from helpers import tiny

from drl_jax import config as config_lib
from drl_jax import main as main_lib
from drl_jax.errors import UserError
from drl_jax.tasks import command_line, table

TASKS = pytest.mark.parametrize("task", table.TASKS.values(), ids=table.TASKS)
# Values that every flag of a task accepts.
VALUES = {
    "distributed": "true",
    "dtype": "float16",
    "find_largest_batch": "true",
    "guidance": "0.5",
    "rule": "mixture",
    "images": "a.png,b.png",
    "label": "2",
    "marginal": "true",
    "mode": "train",
    "observations": "a.npy",
    "operator": "blur:1",
    "protocol": "paper",
    "resume_with_changes": "true",
}
CONFIG = "--config=a.py"
IMPORT = "--mode=import_original", "--tf_checkpoint=x", "--image_size=8", "--workdir=x"
SAMPLE = "--mode=sample", "--workdir=x"


def parse(*args):
    return command_line.parse(["", *args])


def required(task):
    """Returns the flags that a task needs, with values."""
    return [
        f"--mode={task.name}",
        *(f"--{name}={VALUES.get(name, 3)}" for name in task.required),
    ]


@TASKS
def test_flags_that_are_not_given_have_the_defaults_of_the_table(task):
    command = parse(*required(task))
    assert command.task is task
    assert command.changes == ()
    accepted = {flag.name: flag for flag in (*table.COMMON, *task.flags)}
    assert command.values.keys() == accepted.keys()
    for name in accepted.keys() - {"mode", *task.required}:
        default = accepted[name].default
        wanted = list(default) if isinstance(default, tuple) else default
        assert command.values[name] == wanted
    assert command.arguments == {name: command.values[name] for name in task.arguments}


@TASKS
def test_a_task_refuses_the_flags_of_other_tasks_and_names_theirs(task):
    for flag in table.all_flags().values():
        args = [*required(task), f"--{flag.name}={VALUES.get(flag.name, 100)}"]
        if flag in (*table.COMMON, *task.flags):
            continue
        with pytest.raises(UserError) as raised:
            parse(*args)
        owners, _, own = str(raised.value).partition(", not for --mode=")
        assert own == task.name
        assert owners.startswith(f"--{flag.name} is for --mode=")
        assert all(name in owners for name in table.tasks_of(flag))


@TASKS
def test_a_task_that_lacks_a_required_flag_names_it(task):
    for name in task.required:
        args = [arg for arg in required(task) if not arg.startswith(f"--{name}=")]
        with pytest.raises(UserError, match=f"^--mode={task.name} needs --{name}=[^\n]*$"):
            parse(*args)


@pytest.mark.parametrize(
    "line", re.findall("^python -m drl_jax.main .*$", main_lib.__doc__, re.M)
)
def test_the_examples_in_the_help_are_valid(line):
    _, _, _, *args = line.split()
    assert parse(*args).values["workdir"] in (None, "DIR")


@pytest.mark.parametrize(
    ("args", "name", "value"),
    [
        ([CONFIG], "timeout", 100),
        ([CONFIG, "--timeout=20"], "timeout", 20),
        ([CONFIG, "--timeout", "20"], "timeout", 20),
        ([CONFIG], "distributed", None),
        ([CONFIG, "--distributed"], "distributed", True),
        ([CONFIG, "--distributed=1"], "distributed", True),
        ([CONFIG, "--nodistributed"], "distributed", False),
        ([CONFIG, "--distributed", "--timeout=20"], "distributed", True),
        ([CONFIG, "--distributed", "false"], "distributed", False),
        (["--config", "a.py"], "config", "a.py"),
        ([*SAMPLE, "--seed=4294967295"], "seed", 2**32 - 1),
        (["--mode", "long_run", "--workdir=x", "--levels=0, 3,5"], "levels", [0, 3, 5]),
        (["--mode=long_run", "--workdir=x", "--levels="], "levels", []),
        (["--mode=compose", "--workdir=x", "--weights=-0.3"], "weights", [-0.3]),
        (
            ["--mode=inpaint", "--workdir=x", "--images=a.png,b.png"],
            "images",
            ["a.png", "b.png"],
        ),
        (["--mode=ood", "--workdir=x"], "against", ["shuffled", "inverted", "uniform"]),
        (["--mode=ood", "--workdir=x", "--against=mnist"], "against", ["mnist"]),
        ([CONFIG, "--workdir=file:///a%20b/c"], "workdir", "/a b/c"),
        ([CONFIG, "--workdir=file://localhost/a"], "workdir", "/a"),
        ([CONFIG, "--workdir=gs://bucket/run"], "workdir", "gs://bucket/run"),
        ([CONFIG, "--workdir=a/~"], "workdir", "a/~"),
        (["--mode=long_run", "--workdir=x", "--levels=1", "--levels=2"], "levels", [2]),
        (["--mode=ood", "--workdir", "x", "--against", "a,b"], "against", ["a", "b"]),
        (["--mode", "long_run", "--workdir", "x", "--levels", "0,3"], "levels", [0, 3]),
    ],
)
def test_values_have_the_type_of_their_flag(args, name, value):
    assert parse(*args).values[name] == value


@TASKS
def test_the_home_directory_is_expanded_in_every_flag_that_names_a_file_or_folder(task):
    other = re.compile("NAME,...|NAME:VALUE,...|NAME|TASK|N|N,...|HOST:PORT|CHIP:SHAPE")
    flags = (*table.COMMON, *task.flags)
    names = [flag.name for flag in flags if not other.fullmatch(flag.metavar)]
    assert names == [flag.name for flag in flags if flag.is_path]
    lists = ("images", "observations", "others")  # see below
    names = [name for name in names if name not in lists]
    values = parse(*required(task), *(f"--{name}=~/a" for name in names)).values
    assert {values[name] for name in names} == {os.path.expanduser("~/a")}


def test_the_home_directory_is_expanded_in_every_element_of_a_list():
    values = parse("--mode=interpolate", "--workdir=x", "--images=~/a,b/~").values
    assert values["images"] == [os.path.expanduser("~/a"), "b/~"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--mode=foo"], "--mode=foo: .*train, sample, evaluate.* or plan"),
        ([CONFIG, "--sed=1"], "--sed is unknown.*--seed"),
        ([CONFIG, "--xyzzy"], "--xyzzy is unknown.*--help"),
        (["--config"], "--config has no value: give --config=VALUE"),
        ([CONFIG, "--workdir="], "--workdir=: it is empty"),
        (["--config="], "--config=: it is empty"),
        (["--mode=interpolate", "--workdir=x", "--images=a,,b"], "--images=a,,b: it is empty"),
        ([CONFIG, "--workdir=file://host/a"], "--workdir=file://host/a: 'host' is another"),
        ([*SAMPLE, "--seed=a"], "--seed=a: .*whole number"),
        ([*SAMPLE, "--seed=1.5"], "--seed=1.5: .*whole number"),
        ([*SAMPLE, "--seed=-1"], "--seed=-1: .*at least 0"),
        ([*SAMPLE, "--seed=4294967296"], "--seed=4294967296: .*at most 4294967295"),
        (
            [*SAMPLE, "--num_samples=2147483648"],
            "--num_samples=2147483648: .*at most 2147483647",
        ),
        ([*SAMPLE, "--num_samples=0"], "--num_samples=0: .*at least 1"),
        ([*SAMPLE, "--num_samples="], "--num_samples=: '' is not a whole number"),
        ([*IMPORT, "--image_size=0"], "--image_size=0: .*at least 1"),
        ([CONFIG, "--distributed=maybe"], "--distributed=maybe: .*true or false"),
        ([CONFIG, "--nodistributed=3"], "--nodistributed=3"),
        ([CONFIG, "--nodistributed", "3"], "unexpected argument '3'"),
        ([CONFIG, "--distributed", "maybe"], "--distributed=maybe: .*true or false"),
        ([*SAMPLE, "--seed", "-1"], "--seed=-1: .*at least 0"),
        ([CONFIG, "train"], "'train'.*--name=value"),
        (["--mode=long_run", "--workdir=x", "--levels=0,a"], "--levels=0,a: 'a' is not"),
        (["--mode=long_run", "--workdir=x", "--levels=-1"], "'-1' is not .*at least 0"),
        (["--mode=interpolate", "--workdir=x", "--images=a.png"], "--images .* odd .*pairs"),
        (
            ["--mode=interpolate", "--workdir=x", "--images=a,b", "--pairs=3"],
            "--pairs .*--images",
        ),
    ],
)
def test_a_wrong_value_is_one_line_that_names_flag_and_value(args, words):
    with pytest.raises(UserError, match=f"^[^\n]*{words}[^\n]*$"):
        parse(*args)


EVALUATE = "--mode=evaluate", "--workdir=x"


def test_the_papers_protocol_sets_the_fields_of_the_configuration_that_it_prescribes():
    assert parse(*EVALUATE).changes == ()
    config = config_lib.default()
    config.mcmc.K = 7
    command = parse(*EVALUATE, "--config.mcmc.noise_scale=0.99", "--protocol=paper")
    assert command.arguments == {"protocol": "paper", "label": None, "guidance": 0.0}
    config = command_line.changed(config, command.changes)
    assert config.mcmc.noise_scale == 0.99
    assert config.evaluation.num_samples == 50_000
    assert config.evaluation.num_data > 10_000_000
    assert (config.mcmc.K, config.data.split) == (7, "train")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("--config.mcmc.noise_scale=1", "sets it to 0.99"),
        ("--config.evaluation.num_samples=1000", "sets it to 50000"),
        ("--config.evaluation.num_data=10000", "sets it to"),
        ("--config.data.split=test", "takes this from training"),
        ("--config.mcmc.sampler=mala", "takes this from training"),
        ("--config.mcmc.K=10", "takes this from training"),
    ],
)
def test_a_change_that_contradicts_the_papers_protocol_is_refused(change, words):
    with pytest.raises(UserError, match=f"^{change}: --protocol=paper {words}[^\n]*$"):
        parse(*EVALUATE, change, "--protocol=paper")
    assert parse(*EVALUATE, change, "--protocol=default").changes == (change,)


def test_changes_of_the_configuration_are_kept_apart_from_the_flags():
    command = parse("--config.seed=1", CONFIG, "-config.mcmc.K=2", "--noconfig.data.flip")
    assert command.changes == ("--config.seed=1", "-config.mcmc.K=2", "--noconfig.data.flip")
    assert command.values["config"] == "a.py"


def test_the_value_of_a_change_may_follow_as_an_argument():
    args = "--config.seed", "1", "--config.mesh.data", "-1", "--config.energy.mult", "(1,3)"
    command = parse(*args, "--config.data.flip", "false", "--config.data.dequantise", CONFIG)
    changes = "seed=1", "mesh.data=-1", "energy.mult=(1,3)", "data.flip=false"
    assert command.changes == (
        *(f"--config.{change}" for change in changes),
        "--config.data.dequantise",
    )
    assert command.values["config"] == "a.py"
    config = command_line.changed(config_lib.default(), command.changes[:-1])
    assert (config.mesh.data, config.energy.mult, config.data.flip) == (-1, (1, 3), False)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([CONFIG, "--config.foo=1"], "--config.foo=1: config.foo is unknown"),
        ([CONFIG, "--config.energy=1"], "config.energy is unknown"),
        ([CONFIG, "--config.energy.c=1"], "energy.c is unknown.*did you mean config.energy.ch"),
        ([*IMPORT, "--config.foo=2"], "config.foo is unknown"),
        ([*SAMPLE, "--config.mcmc.foo=1"], "mcmc.foo is unknown"),
        ([*SAMPLE, "--config.seed=1"], "--config.seed=1: --mode=sample .*mcmc"),
        ([*SAMPLE, "--config.energy.ch=8"], "--config.energy.ch=8: --mode=sample .*mcmc"),
        ([*SAMPLE, "--noconfig.data.flip"], "--noconfig.data.flip: --mode=sample .*mcmc"),
        (
            ["--mode=export", "--workdir=x", "--config.mcmc.b_squared=1e-3"],
            "b_squared=1e-3: --mode=export .*no field",
        ),
        (
            [*IMPORT, "--config.energy.N=2"],
            r"energy.N=2: --mode=import_original .*except energy.\*",
        ),
        ([*IMPORT, "--config.data.image_size=8"], "image_size=8: --mode=import_original"),
    ],
)
def test_a_change_of_a_field_that_a_task_may_not_change_is_refused(args, words):
    with pytest.raises(UserError, match=f"^[^\n]*{words}[^\n]*$"):
        parse(*args)


@pytest.mark.parametrize(("old", "new"), config_lib.RENAMED.items())
def test_a_renamed_field_is_refused_by_its_new_name(old, new):
    with pytest.raises(UserError, match=f"config.{old} .*renamed.*config.{new}$"):
        parse(CONFIG, f"--config.{old}=4")


def test_the_last_of_two_values_of_a_field_counts():
    changes = ["--config.energy.mult=(1,2)", "--config.energy.mult=(3,)", "--config.seed=1"]
    changed = command_line.changed(config_lib.default(), [*changes, "--config.seed=2"])
    assert (changed.energy.mult, changed.seed) == ((3,), 2)


def test_changed_leaves_the_original_alone():
    config = config_lib.default()
    changes = ["--config.mcmc.K=7", "--noconfig.data.flip", "--config.energy.mult=(1,3)"]
    changed = command_line.changed(config, changes)
    assert (changed.mcmc.K, changed.data.flip, changed.energy.mult) == (7, False, (1, 3))
    assert dict(config_lib.flatten(config)) == dict(config_lib.flatten(config_lib.default()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("train.batch_size=abc", "train.batch_size=abc: .* such as 256"),
        ("train.batch_size=1.5", "train.batch_size=1.5: .* such as 256"),
        ("train.batch_size", "train.batch_size: .* such as 256"),
        ("data.flip=maybe", "data.flip=maybe: .* such as True"),
        ("energy.mult=abc", "energy.mult is "),
        ("energy.mult=(1,1.5)", "energy.mult is "),
        ("energy.mult=()", "energy.mult is "),
        ("mcmc.K=0", "mcmc.K is 0: .*config.mcmc.start 'posterior'"),
        ("mcmc.sampler=nuts", "mcmc.sampler is 'nuts'"),
    ],
)
def test_a_value_that_a_field_cannot_have_is_refused(change, words):
    with pytest.raises(UserError, match=f"^[^\n]*config.{words}[^\n]*$"):
        command_line.changed(config_lib.default(), [f"--config.{change}"])


def entries(text):
    """Returns (name, description) of each flag in the help, in order."""
    pieces = re.split(r"^ {2,4}(?=--)|^ {2}(?=\w)|\n\n", text, flags=re.MULTILINE)
    found = (re.fullmatch(r"--(?:\[no\])?([\w.]+)\S*\s+(.*)", p, re.DOTALL) for p in pieces)
    return [(match[1], " ".join(match[2].split())) for match in found if match]


def test_help_to_a_pipe_that_nobody_reads_is_no_error():
    """As in `--help | head`."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "drl_jax.main", "--help"]
    done = subprocess.run(command, cwd=tiny.ROOT, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_the_help_names_every_flag_once_with_its_default():
    text = command_line.help_text(["", "--help"], introduction="The program.")
    assert text.startswith("The program.\n")
    found = entries(text)
    assert sorted(n for n, _ in found) == sorted(
        [*table.all_flags(), "config.FIELD", "version"]
    )
    descriptions = dict(found)
    for name, flag in table.all_flags().items():
        default = ",".join(flag.default) if isinstance(flag.default, tuple) else flag.default
        if isinstance(flag.default_help, str):
            default = flag.default_help or default
            wanted = [f"(default: {default})" if default is not None else "(required)"]
        else:
            wanted = ["(default: ", *flag.default_help, *flag.default_help.values()]
        assert flag.help in descriptions[name]
        assert all(words in descriptions[name] for words in wanted)
    for task in table.TASKS.values():
        assert re.search(rf"^  {task.name} +{task.help[:20]}", text, re.MULTILINE)
    assert max(map(len, text.splitlines())) <= command_line.WIDTH


@TASKS
def test_the_help_on_a_task_names_only_its_flags(task):
    text = command_line.help_text(["", f"--mode={task.name}", "--help"], introduction="")
    title, _, rest = text.partition("\n\n")
    assert title == f"--mode={task.name}: {task.help}"
    found = entries(rest)
    names = [flag.name for flag in (*table.COMMON, *task.flags)]
    names += ["config.FIELD"] if task.changeable else []
    assert sorted(name for name, _ in found) == sorted(names)
    assert {name for name, words in found if words.endswith("(required).")} == {*task.required}


@pytest.mark.parametrize("flag", ["--help", "-help", "-h"])
def test_help_is_given_whatever_else_is_wrong(flag):
    args = ["", "--mode", "inpaint", "--xyzzy", "--num_samples=a", flag]
    assert "--mask=" in command_line.help_text(args, introduction="")
    assert command_line.help_text(args[:-1], introduction="") is None


def test_help_on_an_unknown_task_lists_the_tasks():
    with pytest.raises(UserError, match=r"--mode=foo: .*inpaint"):
        command_line.help_text(["", "--mode=foo", "--help"], introduction="")


def test_the_last_of_two_values_counts():
    arguments = ["", "--config=digits", "--workdir=x"]
    arguments += ["--config.mcmc.leapfrog=(2,)", "--config.mcmc.leapfrog=(3,)"]
    changes = command_line.parse(arguments).changes
    changed = command_line.changed(config_lib.load("digits"), changes)
    assert changed.mcmc.leapfrog == (3,)
    arguments = ["", "--mode=long_run", "--workdir=x", "--levels=0,1", "--levels=3"]
    assert command_line.parse(arguments).values["levels"] == [3]
