import json
import subprocess
import sys

import pytest
from helpers import tiny

from drl_jax import config as config_lib
from drl_jax.errors import UserError


def changed(**fields):
    config = config_lib.default()
    config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in fields.items()}
    )
    return config


def test_the_configuration_needs_no_jax():
    program = "import sys, drl_jax.config; print({'jax', 'numpy'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tiny.ROOT, capture_output=True, text=True
    )
    assert done.stdout == "set()\n", done.stderr


def test_the_default_is_valid():
    config_lib.validate(config_lib.default())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 2**32),
        ("data.crop", "middle"),
        ("data.background", "whitish"),
        ("data.background", "#ffffff80"),
        ("data.test_fraction", -0.1),
        ("data.test_fraction", 1.0),
        ("data.test_fraction", float("nan")),
        ("diffusion.T", 0),
        ("energy.ch", 3),
        ("energy.dtype", "float16"),
        ("energy.mult", ()),
        ("energy.mult", (1, 0)),
        ("energy.mult", (1, "2")),
        ("diffusion.schedule", "quadratic"),
        ("mcmc.K", 0),
        ("mcmc.start", "x"),
        ("mcmc.b_squared", 0.0),
        ("mcmc.b_squared", float("nan")),
        ("mcmc.leapfrog", (0,)),
        ("mcmc.noise_scale", -0.1),
        ("mcmc.noise_scale", float("inf")),
        ("mcmc.target_acceptance", 1.0),
        ("mcmc.warmup_steps", 0),
        ("mesh.data", 0),
        ("mesh.data", -2),
        ("optim.adam", "adamw"),
        ("optim.ema_decay", 1.0),
        ("optim.beta1", -0.1),
        ("optim.learning_rate", float("inf")),
        ("optim.warmup_steps", -1),
        ("train.accumulate", 0),
        ("train.energy_limit", 0.0),
        ("checkpoint.keep_last", 0),
        ("evaluation.batch_size", 0),
        ("likelihood.distributions", 0),
        ("likelihood.target_acceptance", 1.0),
    ],
)
def test_an_impossible_value_is_refused_by_name(name, value):
    with pytest.raises(UserError, match=rf"^config\.{name} is [^\n]*: [^\n]*$") as raised:
        config_lib.validate(changed(**{name.replace(".", "__"): value}))
    assert str(value) in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 2**32 - 1),
        ("energy.ch", 4),
        ("mcmc.K", 1),
        ("mcmc.noise_scale", 0.0),
        ("mesh.data", -1),
        ("train.loss_limit", float("inf")),
        ("train.energy_limit", float("inf")),
        ("optim.beta1", 0.0),
        ("optim.warmup_steps", 0),
        ("likelihood.burn_in", 0),
    ],
)
def test_values_at_the_bounds_are_valid(name, value):
    config_lib.validate(changed(**{name.replace(".", "__"): value}))


def test_every_number_of_the_default_is_checked():
    for name, value in config_lib.flatten(config_lib.default()):
        if isinstance(value, int | float) and not isinstance(value, bool):
            with pytest.raises(UserError, match=rf"config\.{name} is -"):
                config_lib.validate(changed(**{name.replace(".", "__"): type(value)(-2)}))


@pytest.mark.parametrize(
    "names",
    [
        config_lib.MINIMUM,
        config_lib.BELOW,
        config_lib.CHOICES,
        config_lib.EARLIER,
        config_lib.REQUIRED_FOR_POINTS,
    ],
)
def test_the_tables_of_checks_name_fields(names):
    assert dict(config_lib.flatten(config_lib.default())).keys() >= names.keys()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mcmc__sampler": "nuts"}, "mcmc.sampler is 'nuts': use 'langevin' or 'mala' or"),
        (
            {"mcmc__sampler": "normal_approximation"},
            "'normal_approximation': .*replaced by --config.mcmc.sampler=langevin "
            "--config.mcmc.start=posterior --config.mcmc.K=0$",
        ),
        ({"mcmc__K": 0}, "mcmc.K is 0: .*config.mcmc.start 'posterior'"),
        ({"mcmc__sampler": "mala", "mcmc__noise_scale": 0.9}, "noise_scale is 0.9: .*'mala'"),
        ({"mcmc__sampler": "hmc", "mcmc__noise_scale": 0.9}, "noise_scale is 0.9: .*'hmc'"),
        (
            {"mcmc__sampler": "mala", "evaluation__dtype": "bfloat16"},
            "evaluation.dtype is 'bfloat16': .*'mala' .*'float32'",
        ),
        ({"energy__attention": (8,)}, r"attention is \(8,\): .*network 'unet' has"),
        ({"energy__patch": 2}, "patch is 2: only .*network 'unet' has patches"),
        ({"energy__dropout": 0.1}, "dropout is 0.1: .*network 'unet', 'image_mlp' or 'mlp'"),
        ({"data__classes": 10}, "classes is 10: .*'resnet' takes no labels; .*'cdrl_resnet'"),
        ({"data__axes": 4}, "axes is 4: it must be 0 or more and less than 4"),
        ({"data__axes": 0}, "axes is 0: .*'resnet' needs 1 .*the network 'mlp'"),
        ({"data__axes": 1}, "flip is True: config.data.axes is 1; use False"),
        (
            {"data__axes": 3, "data__flip": False, "evaluation__inception_weights": "x"},
            "inception_weights is 'x': config.data.axes is 3; use ''",
        ),
        (
            {
                "data__axes": 3,
                "data__flip": False,
                "data__image_size": 8,
                "energy__parameterisation": "gaussians",
            },
            "parameterisation is 'gaussians': .*examples with 1536 values",
        ),
        (
            {"energy__dropout": 0.1, "energy__network": "image_mlp"},
            "dropout is 0.1: .*objective 'denoising'",
        ),
        (
            {"energy__network": "image_mlp", "energy__dtype": "bfloat16"},
            "energy.dtype is 'bfloat16': .*'image_mlp' needs 'float32'",
        ),
        (
            {"energy__network": "mlp", "energy__parameterisation": "uniform"},
            "parameterisation is 'uniform': .*use 'unit'",
        ),
        (
            {"energy__network": "image_mlp", "energy__form": "mixture"},
            "form is 'mixture': .*parameterisation 'uniform'",
        ),
        (
            {"energy__form": "mixture", "energy__parameterisation": "uniform"},
            "form is 'mixture': .*network 'unet' or 'image_mlp'",
        ),
        (
            {"energy__network": "mlp", "energy__parameterisation": "bounded_gaussians"},
            "parameterisation is 'bounded_gaussians': .*use 'unit'",
        ),
        (
            {"energy__parameterisation": "gaussians"},
            "parameterisation is 'gaussians': .*3072 values .*limit: 1024\\); use 'uniform'",
        ),
        ({"diffusion__min_noise": 0.1}, "min_noise is 0.1: .*schedule 'cosine'"),
        ({"optim__decay_steps": 500}, "decay_steps is 500: .*warmup_steps, 1000"),
    ],
)
def test_values_that_do_not_fit_each_other_are_refused(fields, words):
    with pytest.raises(UserError, match=rf"^config\.[^\n]*{words}"):
        config_lib.validate(changed(**fields))


def test_a_run_may_end_during_the_warm_up():
    """Its learning rate would begin to decay only after the end."""
    config_lib.validate(changed(optim__decay_steps=500, train__num_steps=500))


def test_chains_from_the_posterior_may_have_no_steps():
    config_lib.validate(changed(mcmc__K=0, mcmc__start="posterior"))


@pytest.mark.parametrize(
    ("network", "axes", "shape"),
    [
        ("resnet", 1, (32, 3)),
        ("unet", 2, (32, 32, 3)),
        ("image_mlp", 3, (32, 32, 32, 3)),
        ("mlp", 0, (3,)),
        ("mlp", 2, (3,)),
    ],
)
def test_the_shape_of_an_example_follows_from_the_network_and_the_number_of_axes(
    network, axes, shape
):
    config = changed(energy__network=network, data__axes=axes, data__flip=False)
    config_lib.validate(config)
    assert config_lib.example_shape(config) == shape


def test_points_in_the_plane_are_computed_in_float32():
    points = {"energy__network": "mlp", "data__channels": 2, "data__flip": False}
    config_lib.validate(changed(**points))
    with pytest.raises(UserError, match=r"energy\.dtype is 'bfloat16': .* must be 'float32'"):
        config_lib.validate(changed(**points, energy__dtype="bfloat16"))


def test_a_value_of_another_type_is_refused_with_an_example():
    config = config_lib.default()
    with config.ignore_type():
        config.train.batch_size = "many"
    with pytest.raises(UserError, match=r"train\.batch_size is 'many': .* such as 256"):
        config_lib.validate(config)
    with pytest.raises(UserError, match=r"seed is True: .* such as 0"):  # True is an int
        config_lib.validate(changed(seed=True))


def test_whole_numbers_fit_32_bits():
    """Otherwise NumPy and JAX raise errors of their own, hours into a run for some fields."""
    config_lib.validate(changed(train__num_steps=2**31 - 1, seed=2**32 - 1))
    with pytest.raises(UserError, match=r"num_steps is 2147483648: .* less than 2147483648$"):
        config_lib.validate(changed(train__num_steps=2**31))


def test_fields_are_those_of_the_default():
    more, fewer, old = config_lib.default(), config_lib.default(), config_lib.default()
    more.mcmc.warmup_step = 3
    del fewer.mcmc.K
    old.train.parts = 4
    for config, words in (
        (more, r"config\.mcmc\.warmup_step is unknown.* config\.mcmc\.warmup_steps"),
        (fewer, r"config\.mcmc\.K is missing"),
        (old, r"config\.train\.parts .*config\.train\.accumulate"),
    ):
        with pytest.raises(UserError, match=words):
            config_lib.validate(config)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("x = 1", "get_config"),
        ("def get_config(:", "SyntaxError.*mine.py, line 2"),
        ("import nonesuch", "nonesuch"),
        ("def get_config():\n    return undefined", "NameError.*undefined"),
        ("def get_config(x):\n    return x", "mine.py.*missing 1 required"),
        ("def get_config():\n    pass", "NoneType.*ConfigDict"),
        ("def get_config():\n    open('nonesuch.txt')", "nonesuch.txt"),
        ("def get_config():\n    raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("import sys\nsys.exit(0)", "mine.py: SystemExit: 0"),
        ("def get_config():\n    c = default()\n    c.seed = 'a'\n    return c", "seed"),
        ("def get_config():\n    c = default()\n    c.sed = 1\n    return c", "config.sed "),
        ("def get_config():\n    c = default()\n    del c.seed\n    return c", "config.seed "),
    ],
)
def test_a_file_without_a_configuration_is_one_clear_line(tmp_path, source, words):
    file = tmp_path / "mine.py"
    file.write_text(f"from drl_jax.config import default\n{source}\n")
    with pytest.raises(UserError, match=f"^[^\n]*{words}[^\n]*$"):
        config_lib.load(str(file))


@pytest.mark.parametrize("file", ["nonesuch.py", str(tiny.ROOT / "README.md"), str(tiny.ROOT)])
def test_a_file_that_is_not_a_python_file_is_refused(file):
    with pytest.raises(UserError, match=f"^--config={file}: no such Python file"):
        config_lib.load(file)


def test_a_configuration_survives_json():
    config = changed(energy__mult=(1, 2, 3), mcmc__b_squared=0.1)
    config.optim.decay_steps = config.train.get_oneway_ref("num_steps")
    values = json.loads(json.dumps(config_lib.to_json(config)))
    again = config_lib.from_json(values)
    assert dict(config_lib.flatten(again)) == dict(config_lib.flatten(config))
    config_lib.require_resumable(again, config)


def test_the_configuration_of_an_earlier_version_gets_the_new_names_values_and_fields():
    """Fails if the old name of a value is kept."""
    values = config_lib.to_json(config_lib.default())
    del values["train"]["accumulate"], values["likelihood"]["distributions"]
    values["train"]["parts"], values["likelihood"]["rungs"] = 4, 70
    values["train"]["levels"] = "log_noise"
    del values["data"]["crop"], values["data"]["strict"], values["data"]["background"]
    del values["data"]["axes"]
    del values["optim"]["adam"]
    before = json.dumps(values)
    config = config_lib.from_json(values)
    config_lib.validate(config)
    assert (config.train.accumulate, config.likelihood.distributions) == (4, 70)
    assert config.train.levels == "log_snr"
    assert config.data == config_lib.default().data
    assert (config.optim.adam, config_lib.default().optim.adam) == ("optax", "keras")
    assert json.dumps(values) == before


@pytest.mark.parametrize("section", ["mcmc", "guidance"])
def test_the_configuration_of_a_later_version_is_one_clear_line(section):
    values = config_lib.to_json(config_lib.default())
    values.setdefault(section, {})["scale"] = 2
    with pytest.raises(UserError, match=rf"config\.{section}\.scale[^\n]*version[^\n]*$"):
        config_lib.from_json(values)


def test_a_saved_value_of_the_wrong_type_is_one_clear_line():
    values = config_lib.to_json(config_lib.default())
    values["energy"]["ch"] = "many"
    with pytest.raises(UserError, match=r"config\.energy\.ch = 'many': .* such as 128$"):
        config_lib.from_json(values)


def test_a_run_of_an_earlier_version_does_not_resume_with_another_optimiser():
    values = config_lib.to_json(config_lib.default())
    del values["optim"]["adam"]
    saved = config_lib.from_json(values)
    with pytest.raises(UserError, match=r"optim\.adam was 'optax', now 'keras'"):
        config_lib.require_resumable(saved, config_lib.default())
    config_lib.require_resumable(saved, changed(optim__adam="optax"))


def test_new_names_of_fields_are_fields_and_old_names_are_not():
    fields = dict(config_lib.flatten(config_lib.default())).keys()
    assert fields >= {*config_lib.RENAMED.values()}
    assert not fields & config_lib.RENAMED.keys()


def test_the_replacements_of_values_are_valid_and_the_values_are_not():
    for name, values in config_lib.REPLACED_VALUES.items():
        for value, replacements in values.items():
            assert value not in config_lib.CHOICES[name]
            assert name in replacements
            config_lib.validate(
                changed(**{field.replace(".", "__"): v for field, v in replacements.items()})
            )


def test_a_saved_normal_approximation_is_a_draw_from_the_posterior_without_a_chain():
    """Fails if the saved K is kept."""
    values = config_lib.to_json(changed(diffusion__T=1000))
    values["mcmc"] = {"sampler": "normal_approximation", "b_squared": 2e-4, "K": 1}
    del values["diffusion"]["schedule"]
    config = config_lib.from_json(values)
    config_lib.validate(config)
    mcmc = config.mcmc
    assert (mcmc.sampler, mcmc.start, mcmc.K) == ("langevin", "posterior", 0)
    assert config.diffusion.schedule == "linear"


def test_another_run_is_refused_with_every_difference():
    with pytest.raises(UserError) as raised:
        config_lib.require_resumable(changed(), changed(mcmc__K=7, data__flip=False))
    assert "data.flip was True, now False; mcmc.K was 30, now 7" in str(raised.value)
    with pytest.raises(UserError, match=r"data\.test_fraction was 0\.0, now 0\.2"):
        config_lib.require_resumable(changed(), changed(data__test_fraction=0.2))


def test_a_run_may_resume_with_changes_that_no_training_step_depends_on():
    free = changed(
        train__accumulate=7,
        train__num_steps=7,
        train__loss_limit=7.0,
        train__energy_limit=7.0,
        mesh__fsdp=7,
        log__every_steps=7,
        checkpoint__keep_last=7,
        evaluation__batch_size=7,
        likelihood__chains=7,
    )
    config_lib.require_resumable(changed(), free)


def test_a_run_may_resume_with_changes_of_optimiser_seed_sampler_data_and_length_on_request():
    changes = {
        "optim__learning_rate": 0.1,
        "optim__adam": "optax",
        "optim__decay_steps": 5000,
        "seed": 7,
        "mcmc__sampler": "hmc",
        "mcmc__K": 7,
        "energy__dropout": 0.1,
        "data__name": "svhn_cropped",
        "train__batch_size": 128,
        "log__every_steps": 7,
    }
    wanted = changed(**changes)
    assert config_lib.require_resumable(changed(), wanted, with_changes=True) == [
        "data.name was 'cifar10', now 'svhn_cropped'",
        "energy.dropout was 0.0, now 0.1",
        "log.every_steps was 100, now 7",
        "mcmc.K was 30, now 7",
        "mcmc.sampler was 'langevin', now 'hmc'",
        "optim.adam was 'keras', now 'optax'",
        "optim.decay_steps was 0, now 5000",
        "optim.learning_rate was 0.0001, now 0.1",
        "seed was 0, now 7",
        "train.batch_size was 256, now 128",
    ]
    with pytest.raises(UserError, match=r"learning_rate was .*--resume_with_changes"):
        config_lib.require_resumable(changed(), wanted)


@pytest.mark.parametrize(
    "field",
    [
        {"diffusion__T": 7},
        {"energy__ch": 64},
        {"energy__parameterisation": "noise"},
        {"data__image_size": 64},
        {"data__axes": 3},
        {"data__dequantise": 0.1},
        {"mcmc__b_squared": 1e-4},
    ],
    ids=str,
)
def test_no_run_resumes_with_changes_of_what_the_parameters_mean(field):
    ((name, value),) = field.items()
    words = rf"\({name.replace('__', '.')} was [^;]*, now {value!r}\): .*--init_from"
    with pytest.raises(UserError, match=words):
        config_lib.require_resumable(changed(), changed(**field, mcmc__K=7), with_changes=True)


def test_the_step_size_of_other_parameterisations_may_change():
    noise = {"energy__parameterisation": "noise"}
    changes = config_lib.require_resumable(
        changed(**noise), changed(**noise, mcmc__b_squared=1e-4), with_changes=True
    )
    assert changes == ["mcmc.b_squared was 0.0002, now 0.0001"]


def test_a_run_may_resume_where_its_data_have_moved_to():
    """Fails if other data are taken for moved ones."""
    saved = changed(data__name="folder:/a", data__data_dir="/tfds")
    moved = changed(data__name="folder:/b/c/", data__data_dir="/scratch", data__strict=True)
    config_lib.require_resumable(saved, moved)
    with pytest.raises(UserError, match=r"data\.name was 'cifar10', now 'folder:"):
        config_lib.require_resumable(changed(), moved)
    moved.data.background = "black"
    with pytest.raises(UserError, match=r"\(data\.background was 'white', now 'black'\)"):
        config_lib.require_resumable(saved, moved)


def test_a_field_that_one_side_lacks_is_a_difference():
    fewer = config_lib.default()
    del fewer.mcmc.K
    with pytest.raises(UserError, match=r"mcmc\.K was None, now 30"):
        config_lib.require_resumable(fewer, config_lib.default())
