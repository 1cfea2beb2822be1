import io
import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from etils import epath
from helpers import tiny
from PIL import Image

from drl_jax import main as main_lib
from drl_jax import model
from drl_jax.runtime import cpu_devices, progress
from drl_jax.tasks import common

CONFIG = f"--config={tiny.DIGITS}"
IMPORT = "--mode=import_original", "--tf_checkpoint=nonesuch", "--image_size=8", "--workdir=x"


@pytest.fixture
def workdir(tmp_path):
    """Not made yet."""
    return epath.Path(tmp_path) / "run"


@pytest.fixture
def fails(workdir, capsys):
    """Returns a function that runs the program, which must refuse and leave no trace."""

    def run(*args):
        assert tiny.main(*args) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert re.fullmatch(r"error: .*\n", err), err  # '.' is no newline
        assert not workdir.exists()
        return err

    return run


@pytest.fixture
def tree():
    """Returns a function that tells when and with what each file below a folder was written."""

    def look(folder):
        paths = [parent / file for parent, _, names in folder.walk() for file in names]
        return {
            path.relative_to(folder).as_posix(): (os.stat(path).st_mtime_ns, path.read_bytes())
            for path in paths
        }

    return look


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "needs --config"),
        (["--config=nonesuch.py"], "nonesuch.py.*no such"),
        (["--config=nonesuch.py", "--config.seed=1"], "nonesuch.py.*no such"),
        (["--config", "nonesuch.py"], "nonesuch.py.*no such"),
        ([f"--config={tiny.ROOT / 'README.md'}"], "README.md.*no such Python file"),
        (["--config="], "no such"),
        (["--config"], "[Mm]issing value.*config"),
        (["--config.seed=1"], "needs --config"),
        ([CONFIG, "--config.foo=1"], "config.foo.*no such field"),
        ([CONFIG, "--config.energy.foo=1"], "config.energy.foo.*no such field"),
        ([CONFIG, "--config.energy.k=1"], r"energy.k.*did you mean --config.energy\.\w+"),
        ([CONFIG, "--config.energy=1"], "config.energy.*no such field"),
        ([CONFIG, "--config.train.batch_size=abc"], "train.batch_size=abc"),
        ([CONFIG, "--config.train.batch_size=1.5"], "train.batch_size=1.5"),
        ([CONFIG, "--config.train.batch_size"], "[Mm]issing value.*batch_size"),
        ([CONFIG, "--config.data.flip=maybe"], "data.flip=maybe"),
        ([CONFIG, "--config.energy.mult=abc"], "energy.mult"),
        ([CONFIG, "--config.energy.mult=(1,1.5)"], "energy.mult"),
        ([CONFIG, "--config.energy.mult=()"], "energy.mult"),
        (["--mode=foo"], "train.*sample.*evaluate"),
        (["--mode=plan"], "--mode=plan needs --config"),
        (["--mode=plan", CONFIG], "needs --topology"),
        (["--mode=plan", CONFIG, "--topology=v9:2x2"], "v9.*v3, v4, v5e, v5p, v6e, a100, h100"),
        (["--mode=plan", CONFIG, "--topology=v5e:2"], "v5e:2.*2 numbers.*v5e:4x4"),
        ([CONFIG, "--topology=v5e:2x2"], "--topology is for --mode=plan"),
        (["--sed=1"], "'sed'.*seed"),
        (["--mode=sample", "--seed=a"], "seed=a"),
        (["--mode=sample", "--seed=-1"], "seed=-1"),
        ([CONFIG, "train"], "'train'"),
        ([CONFIG, "--config.seed", "1"], "'1'"),
        ([CONFIG, "--num_samples=10"], "num_samples.*sample"),
        ([CONFIG, "--mode=sample"], "config.*train"),
        (["--mode=sample", "--config.seed=1"], "config.seed=1.*train"),
        (["--mode=evaluate", "--config.energy.ch=8"], "config.energy.ch=8.*train"),
        (["--mode=export", "--config.mcmc.b_squared=1e-3"], "b_squared=1e-3.*train"),
        ([CONFIG, "--mode=evaluate"], "config.*train"),
        (["--mode=sample"], "needs the --workdir"),
        (["--mode=evaluate"], "needs the --workdir"),
        (["--mode=sample", "--workdir=x", "--num_samples=0"], "num_samples=0.*positive"),
        (["--mode=sample", "--workdir=x", "--num_samples=-3"], "num_samples=-3.*positive"),
        (["--mode=import_original"], "needs --tf_checkpoint"),
        (["--mode=import_original", "--tf_checkpoint=x"], "needs --image_size"),
        ([*IMPORT[:-1]], "needs --workdir"),
        ([*IMPORT, "--image_size=0"], "image_size=0.*positive"),
        ([*IMPORT, "--config.energy.N=2"], "config.energy.N=2 is for --mode=train"),
        ([*IMPORT, "--config.data.image_size=8"], "image_size=8 is for --mode=train"),
        ([*IMPORT, "--config.foo=2"], "config.foo.*no such field"),
        ([*IMPORT, "--config=nonesuch.py"], "nonesuch.py.*no such"),
        ([*IMPORT, "--seed=1"], "seed is for --mode=sample"),
        ([CONFIG, "--image_size=32"], "image_size is for --mode=import_original"),
        ([*IMPORT], "tf_checkpoint=nonesuch cannot be read"),
        (["--mode=sample", "--workdir=nonesuch"], "no checkpoint.*nonesuch"),
        (["--mode=evaluate", "--workdir=nonesuch"], "no checkpoint.*nonesuch"),
    ],
)
def test_a_wrong_command_is_one_clear_line(fails, args, words):
    assert re.search(words, fails(*args))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("x = 1", "get_config"),
        ("def get_config(:", "SyntaxError.*mine.py, line 2"),
        ("import nonesuch", "nonesuch"),
        ("def get_config():\n    return undefined", "NameError.*undefined"),
        ("def get_config(x):\n    return x", "mine.py.*missing 1 required"),
        ("def get_config():\n    pass", "ConfigDict"),
        ("def get_config():\n    open('nonesuch.txt')", "nonesuch.txt"),
        ("def get_config():\n    c = default()\n    c.seed = 'a'\n    return c", "seed"),
        ("def get_config():\n    c = default()\n    c.sed = 1\n    return c", "config.sed "),
        ("def get_config():\n    c = default()\n    del c.seed\n    return c", "config.seed "),
    ],
)
def test_a_config_file_that_gives_no_config_is_one_clear_line(
    fails, workdir, tmp_path, source, words
):
    file = tmp_path / "mine.py"
    file.write_text(f"from drl_jax.config import default\n{source}\n")
    assert re.search(words, fails(f"--config={file}"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"diffusion__T": 0}, "diffusion.T is 0"),
        ({"diffusion__T": -6}, "diffusion.T is -6"),
        ({"diffusion__T": 502}, "T = 502"),
        ({"mcmc__K": 0}, "mcmc.K is 0"),
        ({"mcmc__sampler": "nuts"}, "mcmc.sampler is 'nuts': use 'langevin' or 'mala'"),
        ({"mcmc__sampler": "normal_approximation"}, "needs .* T = 1000 levels.* T = 6"),
        ({"mcmc__sampler": "hmc", "mcmc__leapfrog": "(1,2)"}, "leapfrog is .*each of the 6"),
        ({"mcmc__leapfrog": "(0,)"}, "leapfrog is .*positive whole"),
        ({"mcmc__sampler": "mala", "mcmc__noise_scale": 0.9}, "noise_scale is 0.9"),
        ({"mcmc__target_acceptance": 1.0}, "target_acceptance is 1.0"),
        ({"mcmc__warmup_steps": 0}, "warmup_steps is 0"),
        ({"train__objective": "denoising"}, "'denoising'.* T = 1000 levels.* T = 6"),
        ({"train__objective": "score"}, "'score': use 'recovery' or 'denoising'"),
        ({"energy__parameterisation": "x"}, "'x': use 'step' or 'noise'"),
        (
            {
                "diffusion__T": 1000,
                "mcmc__sampler": "normal_approximation",
                "mcmc__K": 2,
            },
            "mcmc.K is 2: 'normal_approximation' is one draw",
        ),
        ({"mcmc__b_squared": 0}, "b_squared is 0"),
        ({"mcmc__b_squared": -1e-4}, "b_squared is -0.0001"),
        ({"mcmc__b_squared": "nan"}, "b_squared is nan"),
        ({"optim__learning_rate": "inf"}, "learning_rate is inf"),
        ({"train__batch_size": 0}, "batch_size is 0"),
        ({"train__num_steps": -1}, "num_steps is -1"),
        ({"energy__ch": 2}, "energy.ch is 2"),
        ({"seed": -1}, "seed is -1"),
        ({"data__image_size": 7, "energy__mult": "(1,1)"}, "7x7 cannot be halved"),
        ({"data__image_size": 8, "energy__mult": "(1,1,1,1,1)"}, "8x8 cannot be halved"),
        ({"data__channels": 3}, "channels"),
        ({"data__name": "folder:nonesuch"}, "nonesuch.*no such folder"),
        ({"data__name": "folder:EMPTY"}, "no .png, .jpg or .jpeg"),
        ({"data__name": "folder:BROKEN"}, r"cannot read image .*broken.png"),
        ({"data__name": "nonesuch"}, "nonesuch.*TFDS"),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_it_leaves_a_trace(
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


def test_an_image_that_turns_out_unreadable_is_named(workdir, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(20):
        Image.new("L", (8, 8), i).save(folder / f"{i:02d}.png")
    (folder / "13.png").write_bytes(b"no image")
    assert tiny.main(*tiny.training(workdir, data__name=f"folder:{folder}")) == 1
    assert re.fullmatch(r"error: cannot read image .*13\.png.*\n", capsys.readouterr().err)


def test_help_is_short_quick_and_of_this_program_alone():
    command = "import sys, drl_jax.main as m; s = m.main(['m', '--help']);"
    command += "print('jax' in sys.modules, 'numpy' in sys.modules); sys.exit(s)"
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    *text, imported = done.stdout.splitlines()
    assert imported.startswith("False")
    assert len(text) < 35
    flags = re.findall(r"^ *--(\w+)", done.stdout, re.MULTILINE)
    modes_own = ["num_samples", "pairs", "frames", "level", "completions", "rounds"]
    modes_own += ["num_steps", "num_chains", "images", "levels", "mask", "model", "against"]
    modes_own += ["seed", "distributed", "coordinator_address", "num_processes", "process_id"]
    modes_own += ["timeout", "topology", "tf_checkpoint", "image_size"]
    assert flags == ["config", "mode", "workdir", *modes_own]


def test_the_program_in_a_shell_ends_with_one_line_and_status_1(tmp_path):
    with tiny.start(
        "--config=nonesuch.py", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as p:
        out, _ = p.communicate(timeout=60)
    assert p.returncode == 1
    assert re.fullmatch(rb"error: .*nonesuch.py.*\n", out)


def test_a_workdir_is_picked_and_named_where_none_is_given(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    args = [arg for arg in tiny.training("x", train__num_steps=2) if "workdir" not in arg]
    assert tiny.main(*args) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"digits-\d{8}-\d{6}", folder.name)
    assert f"using runs/{folder.name}" in caplog.text
    assert (folder / "samples.png").exists()


def test_the_cache_of_compiled_programs_is_the_users_if_they_name_one(monkeypatch):
    monkeypatch.setattr(os, "environ", {"XDG_CACHE_HOME": "/mine"})
    main_lib.prepare_jax()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "/mine/drl_jax"
    monkeypatch.setattr(os, "environ", {"JAX_COMPILATION_CACHE_DIR": "/theirs"})
    main_lib.prepare_jax()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "/theirs"


@pytest.mark.parametrize(
    ("given", "number"),
    [
        ({}, "2"),
        ({"JAX_NUM_CPU_DEVICES": "5"}, "5"),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}, None),
    ],
)
def test_the_processors_devices_are_the_users_if_they_say(given, number, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(given))
    main_lib.prepare_jax(cpu_devices=2)
    main_lib.prepare_jax(cpu_devices=2)  # as a second run in the same process does
    assert os.environ.get("JAX_NUM_CPU_DEVICES") == number
    assert os.environ["XLA_FLAGS"].split() == [
        cpu_devices.PATIENCE,
        *given.get("XLA_FLAGS", "").split(),
    ]


def test_jax_has_the_processors_devices():
    program = (
        "from drl_jax import main\n"
        "main.prepare_jax(cpu_devices=3)\n"
        "import jax\n"
        "print(jax.devices('cpu'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tiny.ROOT, capture_output=True, text=True
    )
    assert done.stdout.count("CpuDevice") == 3


@pytest.mark.parametrize("asked", [tiny.STEPS, tiny.STEPS - 1])
def test_training_again_where_all_is_done_only_measures_again(workdir, tree, asked):
    tiny.trained(copy=workdir)
    before = tree(workdir)
    assert tiny.main(*tiny.training(workdir, train__num_steps=asked)) == 0
    after = tree(workdir)
    assert {name for name in after if after[name] != before.get(name)} == {
        "metrics.json",
        "samples.png",
    }
    assert before.keys() == after.keys()
    for name in ("metrics.json", "samples.png"):
        assert before[name][1] == after[name][1]


def test_evaluating_gives_the_numbers_that_training_ended_with(workdir, tree):
    tiny.trained(copy=workdir)
    before = tree(workdir)
    for name in ("metrics.json", "samples.png"):
        (workdir / name).unlink()
    assert tiny.main("--mode=evaluate", f"--workdir={workdir}") == 0
    after = tree(workdir)
    assert before.keys() == after.keys()
    for name in ("metrics.json", "samples.png"):
        assert before[name][1] == after[name][1]
    assert json.loads(after["metrics.json"][1])["step"] == tiny.STEPS


T1K = {
    "diffusion__T": 1000,
    "energy__parameterisation": "noise",
    "mcmc__sampler": "normal_approximation",
    "mcmc__K": 1,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"mcmc__sampler": "hmc", "mcmc__leapfrog": "(1,1,1,1,2,2)", "mcmc__warmup_steps": 30},
        T1K,
        T1K | {"train__objective": "denoising"},
    ],
    ids=["hmc", "t1k_recovery", "t1k_denoising"],
)
def test_every_way_of_training_ends_in_what_evaluating_finds(workdir, tree, changes):
    """With HMC both adapt the steps before they sample, to the acceptance asked for."""
    few = {"train__num_steps": 5, "evaluation__num_samples": 16, "evaluation__num_data": 64}
    assert tiny.main(*tiny.training(workdir, **few, **changes)) == 0
    before = tree(workdir)
    assert tiny.main("--mode=evaluate", f"--workdir={workdir}") == 0
    assert tree(workdir)["metrics.json"][1] == before["metrics.json"][1]
    found = json.loads(before["metrics.json"][1])["levels"]
    assert len(found["level"]) == (10 if "diffusion__T" in changes else 6)
    wanted = 1.0 if "diffusion__T" in changes else 0.65
    np.testing.assert_allclose(found["acceptance"], wanted, atol=0.3)


def samples_of(workdir, n, seed=0):
    assert (
        tiny.main(
            "--mode=sample", f"--workdir={workdir}", f"--num_samples={n}", f"--seed={seed}"
        )
        == 0
    )
    folder = workdir / "samples" / f"step_{tiny.STEPS}_seed_{seed}"
    x = np.load(io.BytesIO((folder / "samples.npy").read_bytes()))
    assert x.shape == (n, 8, 8, 1)
    assert x.dtype == np.float32
    assert sorted(path.name for path in folder.iterdir()) == [
        *(f"{i:06d}.png" for i in range(n)),
        "grid.png",
        "samples.npy",
    ]
    for i in (0, n - 1):
        png = np.asarray(Image.open(io.BytesIO((folder / f"{i:06d}.png").read_bytes())))
        np.testing.assert_allclose(
            png / 127.5 - 1, np.clip(x[i, ..., 0], -1, 1), atol=0.5 / 127
        )
    (folder).rmtree()
    return x


def test_a_sample_is_a_function_of_the_seed_and_its_number(workdir):
    tiny.trained(copy=workdir)
    x = samples_of(workdir, 70)  # a batch of 64 and a rest
    np.testing.assert_array_equal(samples_of(workdir, 70), x)
    assert len(np.unique(x, axis=0)) == 70
    # Another batch size is another program, which may sum in another order. A rectifier
    # that this tips makes another sample of one in many; the rest is equal.
    trained = model.load_run(workdir).model
    other = model.Model(trained.method, trained.params, trained.mesh, batch_size=24)
    for again in (samples_of(workdir, 40), other.sample(jax.random.key(0), 70)):
        error = np.abs(again - x[: len(again)]).max(axis=(1, 2, 3))
        assert np.mean(error < 1e-5) > 0.9
    assert np.abs(samples_of(workdir, 3, seed=1) - x[:3]).max() > 0.1


@pytest.mark.parametrize("sampler", ["mala", "hmc"])
def test_a_trained_model_is_sampled_by_another_sampler_after_a_warm_up(
    workdir, sampler, caplog
):
    tiny.trained(copy=workdir)
    changes = [f"--config.mcmc.sampler={sampler}", "--config.mcmc.warmup_steps=100"]
    assert tiny.main("--mode=sample", f"--workdir={workdir}", "--num_samples=8", *changes) == 0
    acceptances = [float(a) for a in re.findall(r"level \d: .*, acceptance (.*)", caplog.text)]
    np.testing.assert_allclose(acceptances, 6 * [0.65], atol=0.25)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("mcmc.foo=1", "config.mcmc.foo=1: the config has no such field"),
        ("mcmc.sampler=normal_approximation", "small noise of T = 1000 levels.* T = 6"),
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
def test_every_mode_passes_over_a_damaged_checkpoint_in_one_line(workdir, mode, caplog, capsys):
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
    told = [line for line in caplog.messages if "damaged" in line]
    assert len(told) == 1
    assert f"step {tiny.STEPS} is damaged" in told[0]
    assert f"using that of step {tiny.STEPS - 20}" in told[0]
    assert len(capsys.readouterr().err.splitlines()) == len(caplog.messages)
    if mode == "train":  # the steps were made again, to the same end
        reference = (tiny.trained() / "metrics.json").read_text()
        assert (workdir / "metrics.json").read_text() == reference


@pytest.mark.parametrize("mode", ["train", "sample", "evaluate"])
def test_no_mode_goes_on_where_all_checkpoints_are_damaged(workdir, mode, tree, capsys):
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
    assert re.fullmatch(r"error: no checkpoint .*\n", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_samples_that_cannot_be_written_are_one_clear_line(workdir, capsys):
    tiny.trained(copy=workdir)
    (workdir / "samples").write_text("in the way")
    assert tiny.main("--mode=sample", f"--workdir={workdir}") == 1
    assert re.fullmatch(r"error: cannot write to .*\n", capsys.readouterr().err)


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


def test_a_log_hears_how_far_a_long_sampling_is(monkeypatch, caplog):
    class Sampler:
        def sample_batches(self, key, n):
            yield from (np.zeros((40, 1)), np.ones((40, 1)), np.ones((20, 1)))

    monkeypatch.setattr(progress, "SILENCE", 0)
    with caplog.at_level("INFO", logger="drl_jax"):
        assert [len(batch) for batch in common.draw(Sampler(), None, 100)] == [40, 40, 20]
    assert caplog.messages == ["40 of 100 images", "80 of 100 images", "100 of 100 images"]
