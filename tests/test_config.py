import json

import pytest

from drl_jax import config as config_lib
from drl_jax.errors import UserError


def changed(**fields):
    config = config_lib.default()
    config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in fields.items()}
    )
    return config


def test_the_default_is_possible():
    config_lib.validate(config_lib.default())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 2**32),
        ("data.crop", "middle"),
        ("diffusion.T", 0),
        ("energy.ch", 3),
        ("energy.dtype", "float16"),
        ("energy.mult", ()),
        ("energy.mult", (1, 0)),
        ("energy.mult", (1, "2")),
        ("mcmc.b_squared", float("nan")),
        ("mcmc.noise_scale", -0.1),
        ("optim.ema_decay", 1.0),
        ("optim.beta1", -0.1),
        ("optim.learning_rate", float("inf")),
        ("optim.warmup_steps", -1),
        ("train.energy_limit", 0.0),
        ("checkpoint.keep_last", 0),
        ("evaluation.batch_size", 0),
    ],
)
def test_an_impossible_value_is_refused_by_name(name, value):
    with pytest.raises(UserError, match=rf"^config\.{name} is [^\n]*$"):
        config_lib.validate(changed(**{name.replace(".", "__"): value}))


def test_points_in_the_plane_are_computed_in_float32():
    points = {"energy__network": "mlp", "data__channels": 2, "data__flip": False}
    config_lib.validate(changed(**points))
    with pytest.raises(UserError, match=r"energy\.dtype is 'bfloat16': .* must be 'float32'"):
        config_lib.validate(changed(**points, energy__dtype="bfloat16"))


def test_every_number_of_the_default_is_checked():
    for name, value in config_lib.flatten(config_lib.default()):
        if isinstance(value, int | float) and not isinstance(value, bool):
            with pytest.raises(UserError, match=rf"config\.{name} is -"):
                config_lib.validate(changed(**{name.replace(".", "__"): type(value)(-2)}))


def test_a_value_of_another_type_is_refused_with_an_example():
    config = config_lib.default()
    with config.ignore_type():
        config.train.batch_size = "many"
    with pytest.raises(UserError, match=r"train\.batch_size is 'many': .* such as 256"):
        config_lib.validate(config)


def test_fields_are_those_of_the_default():
    more, fewer = config_lib.default(), config_lib.default()
    more.mcmc.steps = 3
    del fewer.mcmc.K
    with pytest.raises(UserError, match=r"config\.mcmc\.steps is unknown"):
        config_lib.validate(more)
    with pytest.raises(UserError, match=r"config\.mcmc\.K is missing"):
        config_lib.validate(fewer)


def test_a_configuration_survives_json():
    config = changed(energy__mult=(1, 2, 3), mcmc__b_squared=0.1)
    values = json.loads(json.dumps(config_lib.to_json(config)))
    again = config_lib.from_json(values)
    assert dict(config_lib.flatten(again)) == dict(config_lib.flatten(config))
    config_lib.require_resumable(again, config)


def test_another_run_is_refused_with_every_difference():
    with pytest.raises(UserError) as raised:
        config_lib.require_resumable(changed(), changed(mcmc__K=7, data__flip=False))
    assert "data.flip was True, now False; mcmc.K was 30, now 7" in str(raised.value)


def test_what_changes_no_step_may_change():
    free = changed(
        train__num_steps=7,
        train__loss_limit=7.0,
        train__energy_limit=7.0,
        log__every_steps=7,
        checkpoint__keep_last=7,
        evaluation__batch_size=7,
    )
    config_lib.require_resumable(changed(), free)


def test_a_field_that_one_side_lacks_is_a_difference():
    fewer = config_lib.default()
    del fewer.mcmc.K
    with pytest.raises(UserError, match=r"mcmc\.K was None, now 30"):
        config_lib.require_resumable(fewer, config_lib.default())
