import importlib.util
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import tomllib
import types

import pytest
from etils import epath
from helpers import examples, tiny
from PIL import Image

import drl_jax
from drl_jax import config as config_lib
from drl_jax import main as main_lib
from drl_jax.errors import Interrupted, UserError
from drl_jax.runtime import cpu_devices, jax_setup
from drl_jax.tasks import command_line, table

CONFIG = f"--config={tiny.DIGITS}"
IMPORT = "--mode=import_original", "--tf_checkpoint=nonesuch", "--image_size=8", "--workdir=x"


@pytest.fixture
def workdir(tmp_path):
    """A path at which nothing exists yet."""
    return epath.Path(tmp_path) / "run"


@pytest.fixture
def fails(workdir, capsys):
    """Returns a function that runs the program, which must print one error and exit."""

    def run(*args):
        assert tiny.main(*args) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert re.fullmatch(r"error: .*\n", err), err  # '.' matches no newline
        assert not workdir.exists()
        return err

    return run


@pytest.fixture
def tree():
    """Returns a function that reads all files below a folder, with their times."""

    def look(folder):
        paths = [parent / file for parent, _, names in folder.walk() for file in names]
        return {
            path.relative_to(folder).as_posix(): (os.stat(path).st_mtime_ns, path.read_bytes())
            for path in paths
        }

    return look


@pytest.fixture
def trained():
    """A work directory that no test may change."""
    return tiny.trained()


@pytest.fixture
def called(monkeypatch):
    """Replaces every task by one that records its arguments."""
    calls = []
    task = types.SimpleNamespace(run=lambda **arguments: calls.append(arguments))
    modules = {f"drl_jax.tasks.{name}": task for name in table.TASKS}
    monkeypatch.setattr(main_lib.importlib, "import_module", modules.__getitem__)
    return calls


def test_main_is_short():
    assert len((tiny.ROOT / "drl_jax" / "main.py").read_text().splitlines()) <= 120


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "needs --config"),
        (["--mode=foo"], "train.*sample.*evaluate"),
        (["--sed=1"], "--sed .*--seed"),
        (["--config=nonesuch.py", "--config.seed=1"], "nonesuch.py.*no such"),
        ([CONFIG, "--config.train.batch_size=abc"], "train.batch_size=abc"),
        ([CONFIG, "--num_samples=10"], "num_samples is for --mode=sample"),
        (["--mode=plan", CONFIG, "--topology=v9:2x2"], "v9.*v3, v4, v5e, v5p, v6e, a100, h100"),
        (["--mode=plan", CONFIG, "--topology=v5e:2"], "v5e:2: .*v5e:4x4"),
        ([*IMPORT, "--config=nonesuch.py"], "nonesuch.py.*no such"),
        ([*IMPORT], "tf_checkpoint=nonesuch cannot be read"),
        ([CONFIG, "--num_processes=2"], "--coordinator_address and --process_id"),
        ([CONFIG, "--distributed"], "--workdir"),
        (["--mode=sample", "--workdir=nonesuch"], "no checkpoint.*nonesuch"),
        (["--mode=evaluate", "--workdir=nonesuch"], "no checkpoint.*nonesuch"),
        (["--mode=sample", "--workdir=digits"], "no checkpoint.*digits"),
        (["--mode=ood", "--workdir=x", "--model=nonesuch"], "'nonesuch'"),
        (tiny.training("runs/lr[1e-4]"), r"cannot be kept in .*runs/lr\[1e-4\].* rename"),
        ([*IMPORT[:-1], "--workdir=a*"], r"cannot be kept in .*/a\*'.* rename"),
    ],
)
def test_a_wrong_command_is_one_clear_line(fails, args, words):
    assert re.search(words, fails(*args))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"diffusion__T": 0}, "diffusion.T is 0"),
        ({"diffusion__T": 502}, "T = 502"),
        ({"mcmc__sampler": "hmc", "mcmc__leapfrog": "(1,2)"}, r"leapfrog is \(1, 2\): .* 6 "),
        ({"mcmc__b_squared": "nan"}, "b_squared is nan"),
        ({"data__image_size": 7, "energy__mult": "(1,1)"}, "length 7 cannot be halved once"),
        (
            {"data__image_size": 8, "energy__mult": "(1,1,1,1,1)"},
            "length 8 cannot be halved 4 times",
        ),
        ({"data__channels": 3}, "channels"),
        ({"data__name": "folder:nonesuch"}, "data.name is 'folder:nonesuch'"),
        ({"data__name": "folder:EMPTY"}, "empty.*.png, .jpg, .jpeg"),
        ({"data__name": "folder:BROKEN"}, r"cannot read image .*broken.png"),
        ({"data__name": "nonesuch"}, "nonesuch.*TFDS"),
    ],
)
def test_an_impossible_run_is_refused_before_anything_is_written(
    fails, workdir, tmp_path, changes, words
):
    folder = tmp_path / "data"
    (folder / "empty").mkdir(parents=True)
    (folder / "broken").mkdir()
    (folder / "broken" / "broken.png").write_bytes(b"no image")
    name = changes.get("data__name", "digits")
    for word in ("empty", "broken"):
        name = name.replace(word.upper(), str(folder / word))
    assert re.search(words, fails(*tiny.training(workdir, **changes | {"data__name": name})))


@pytest.mark.parametrize("inside", ["", "deeper"])
def test_a_workdir_that_cannot_be_written_is_one_clear_line(fails, tmp_path, inside):
    file = tmp_path / "file"
    file.write_text("")
    assert "cannot write to" in fails(*tiny.training(file / inside))
    assert "cannot write to" in fails(*tiny.training("/proc/nonesuch"))


@pytest.mark.slow
def test_an_image_that_turns_out_unreadable_is_skipped_or_refused(
    workdir, tmp_path, capsys, caplog
):
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(20):
        Image.new("L", (8, 8), i).save(folder / f"{i:02d}.png")
    examples.save_damaged(folder / "13.png")  # only decoding it tells
    args = tiny.training(workdir, data__name=f"folder:{folder}", train__num_steps=2)
    assert tiny.main(*args, "--config.data.strict=True") == 1
    assert re.search(r"^error: cannot read image .*13\.png.*$", capsys.readouterr().err, re.M)
    assert tiny.main(*args) == 0
    assert re.search(
        r"skipping an image: cannot read image .*13\.png.* \(number 1\)", caplog.text
    )
    assert json.loads((workdir / "metrics.json").read_text())["num_data"] == 19


@pytest.mark.parametrize("args", [["--help"], ["--mode=inpaint", "--help"]])
def test_help_is_printed_without_loading_jax(args):
    command = f"import sys, drl_jax.main as m; s = m.main(['m', *{args}]);"
    command += "print('jax' in sys.modules); sys.exit(s)"
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    help_text = command_line.help_text(["", *args], introduction=main_lib.__doc__)
    assert done.stdout == f"{help_text}\nFalse\n"


def test_the_version_is_printed(capsys):
    assert tiny.main("--version", "--xyzzy") == 0
    assert capsys.readouterr().out == f"drl_jax {drl_jax.__version__}\n"


def test_the_package_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["drl_jax", "--version"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_module("drl_jax", run_name="__main__")
    assert capsys.readouterr().out == f"drl_jax {drl_jax.__version__}\n"


def test_the_console_script_reads_the_arguments_of_the_process(monkeypatch, capsys):
    project = tomllib.loads((tiny.ROOT / "pyproject.toml").read_text())["project"]
    ((name, function),) = project["scripts"].items()
    module, _, function = function.partition(":")
    monkeypatch.setattr(sys, "argv", [name, "--version"])
    with pytest.raises(SystemExit) as ended:
        getattr(importlib.import_module(module), function)()
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("drl_jax ")


def test_the_program_in_a_shell_ends_with_one_line_and_status_1():
    with tiny.start(
        "--config=nonesuch.py", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.fullmatch(rb"error: .*nonesuch.py.*\n", out)


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (UserError("wrong"), 1, "error: wrong\n"),
        (Interrupted(signal.SIGTERM, "step 7 is saved"), 143, ""),
        (Interrupted(signal.SIGINT, "step 7 is saved"), 130, ""),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_the_exit_status_states_why_the_program_ended(
    error, status, words, monkeypatch, capsys, caplog
):
    def run(_):
        raise error

    monkeypatch.setattr(main_lib, "run", run)
    assert tiny.main(CONFIG) == status
    assert capsys.readouterr().err.endswith(words)
    assert ("step 7" in caplog.text) is isinstance(error, Interrupted)


def test_other_exceptions_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(main_lib, "run", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tiny.main(CONFIG)


def test_a_workdir_is_chosen_and_reported_if_none_is_given(
    tmp_path, monkeypatch, caplog, called
):
    monkeypatch.chdir(tmp_path)
    assert tiny.main(CONFIG) == 0
    (arguments,) = called
    assert re.fullmatch(r"runs/digits_t6-\d{8}-\d{6}", str(arguments["workdir"]))
    assert f"using {arguments['workdir']}" in caplog.text


def test_a_configuration_is_found_by_its_name_from_any_folder(
    tmp_path, monkeypatch, caplog, called
):
    monkeypatch.chdir(tmp_path)
    assert tiny.main("--config=digits_t6") == 0
    (arguments,) = called
    expected = config_lib.load(str(tiny.DIGITS))
    assert config_lib.to_json(arguments["config"]) == config_lib.to_json(expected)
    assert re.fullmatch(r"runs/digits_t6-\d{8}-\d{6}", str(arguments["workdir"]))


def test_a_task_on_a_configuration_gets_it_with_the_changes(called):
    args = [arg for arg in IMPORT if "workdir" not in arg]
    assert tiny.main(*args, "--workdir=~/x", "--config.mcmc.K=7") == 0
    (arguments,) = called
    config = arguments.pop("config")
    assert arguments == {
        "workdir": epath.Path("~/x").expanduser(),
        "tf_checkpoint": "nonesuch",
        "image_size": 8,
    }
    changes = {"mcmc.K": 7}
    fields = dict(config_lib.flatten(config_lib.default())) | changes
    assert dict(config_lib.flatten(config)) == fields


@pytest.mark.slow
def test_a_task_on_a_trained_model_gets_it_with_the_changes(trained, called):
    args = "--mode=sample", f"--workdir={trained}", "--config.mcmc.K=7"
    assert tiny.main(*args, "--num_samples=3") == 0
    (arguments,) = called
    run = arguments.pop("run")
    flags = {"num_samples": 3, "label": None, "guidance": 0.0, "seed": 0}
    assert arguments == {"workdir": trained} | flags
    assert (run.config.mcmc.K, run.model.method.sampler.K, run.step) == (7, 7, tiny.STEPS)


def test_another_model_than_that_of_the_workdir_can_be_named(called, workdir):
    assert tiny.main("--mode=ood", "--model=digits_t6", f"--workdir={workdir}") == 0
    (arguments,) = called
    assert arguments["run"].model.shape == (8, 8, 1)
    assert arguments["workdir"] == workdir


def test_a_plan_without_a_workdir_writes_nothing_and_is_one_process(called, monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "host-0,host-1")
    assert tiny.main("--mode=plan", CONFIG, "--topology=v5e:2x2") == 0
    (arguments,) = called
    assert arguments["workdir"] is None
    assert arguments["topology"] == "v5e:2x2"


@pytest.mark.parametrize(
    ("args", "devices", "variable"),
    [
        ([CONFIG], "CONFIG", None),
        (["--mode=sample", "--workdir=x"], "NONE", None),
        (["--mode=plan", CONFIG, "--topology=v5e:2x2"], "CONFIG", "ALLOW_MULTIPLE_LIBTPU_LOAD"),
    ],
)
def test_jax_is_set_up_for_the_task(args, devices, variable, monkeypatch):
    class ReadyError(Exception):
        pass

    def prepare(cpu_devices, environment):
        assert cpu_devices == devices
        assert (variable in environment) if variable else not environment
        raise ReadyError

    monkeypatch.setattr(cpu_devices, "count", lambda config: "CONFIG" if config else "NONE")
    monkeypatch.setattr(jax_setup, "prepare", prepare)
    with pytest.raises(ReadyError):
        tiny.main(*args)


def test_processes_must_share_all_settings_but_their_number():
    job = "--coordinator_address=a:1", "--num_processes=2"
    command = command_line.parse(["", CONFIG, "--workdir=x", *job, "--process_id=0"])
    shared = main_lib.settings(command, config_lib.default())
    assert shared["workdir"] == "x"
    assert shared["config.mcmc.K"] == 30
    other = command_line.parse(["", "--config=b.py", "--workdir=x", *job, "--process_id=1"])
    assert main_lib.settings(other, config_lib.default()) == shared
    args = ["", "--mode=sample", "--workdir=x", "--config.mcmc.K=7"]
    assert ["--config.mcmc.K=7"] in main_lib.settings(command_line.parse(args), None).values()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("mcmc.foo=1", "config.mcmc.foo is unknown"),
        (
            "mcmc.sampler=normal_approximation",
            "--config.mcmc.start=posterior --config.mcmc.K=0",
        ),
        ("mcmc.K=0", "config.mcmc.K is 0"),
    ],
)
def test_a_trained_model_takes_no_impossible_sampler(workdir, tree, capsys, change, words):
    tiny.trained(copy=workdir)
    before = tree(workdir)
    capsys.readouterr()
    assert tiny.main("--mode=sample", f"--workdir={workdir}", f"--config.{change}") == 1
    assert re.fullmatch(rf"error: .*{words}.*\n", capsys.readouterr().err)
    assert tree(workdir) == before


@pytest.mark.parametrize("mode", ["train", "sample", "evaluate"])
def test_every_task_uses_the_newest_undamaged_checkpoint(workdir, mode, caplog, capsys):
    tiny.trained(copy=workdir)
    newest = workdir / "checkpoints" / str(tiny.STEPS)
    for parent, _, names in newest.walk():
        for name in names:
            (parent / name).write_bytes((parent / name).read_bytes()[:10])
    args = {
        "train": tiny.training(workdir),
        "sample": ["--mode=sample", f"--workdir={workdir}", "--num_samples=2"],
        "evaluate": ["--mode=evaluate", f"--workdir={workdir}"],
    }
    assert tiny.main(*args[mode]) == 0
    damaged = [line for line in caplog.messages if "damaged" in line]
    assert len(damaged) == 1
    assert re.search(rf"step {tiny.STEPS} is damaged.*step {tiny.STEPS - 20}", damaged[0])
    assert len(capsys.readouterr().err.splitlines()) == len(caplog.messages)
    if mode == "train":  # it repeats the lost steps, with the same result
        reference = (tiny.trained() / "metrics.json").read_text()
        assert (workdir / "metrics.json").read_text() == reference


@pytest.mark.parametrize("mode", ["train", "sample", "evaluate"])
def test_no_task_runs_if_all_checkpoints_are_damaged(workdir, mode, tree, capsys):
    tiny.trained(copy=workdir)
    for step in (workdir / "checkpoints").iterdir():
        (step / "state" / "_METADATA").write_bytes(b"")
    before = tree(workdir)
    args = (
        tiny.training(workdir)
        if mode == "train"
        else [f"--mode={mode}", f"--workdir={workdir}"]
    )
    assert tiny.main(*args) == 1
    assert re.fullmatch(r"error: every checkpoint .* is damaged .*\n", capsys.readouterr().err)
    assert tree(workdir) == before


@pytest.mark.parametrize("mode", ["sample", "evaluate"])
def test_a_workdir_without_checkpoints_is_one_clear_line(mode, tmp_path, capsys):
    assert tiny.main(f"--mode={mode}", f"--workdir={tmp_path}") == 1
    assert re.fullmatch(r"error: .*no checkpoint .*\n", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_another_config_is_refused_with_every_field_that_differs(workdir, tree, capsys):
    tiny.trained(copy=workdir)
    before = tree(workdir)
    changes = {"mcmc__K": 3, "optim__learning_rate": 0.5, "checkpoint__every_steps": 7}
    assert tiny.main(*tiny.training(workdir, **changes)) == 1
    err = capsys.readouterr().err
    assert re.fullmatch(r"error: .*\n", err)
    assert "mcmc.K was 2, now 3" in err
    assert "optim.learning_rate was 0.001, now 0.5" in err
    assert "every_steps" not in err
    assert tree(workdir) == before


def test_a_bucket_needs_tensorflow(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert tiny.main(CONFIG, "--workdir=gs://bucket/run") == 1
    err = capsys.readouterr().err
    assert re.fullmatch(
        r"error: --workdir=gs://bucket/run needs tensorflow, .* -m pip install tensorflow\n",
        err,
    )
