"""Every option that is a number refuses what is none, in the configuration and in control."""

import dataclasses
import math

import pytest

from gimbal.core import config
from gimbal.core.errors import InputError
from gimbal.core.options import parse_options


def owners():
    """Name and dataclass of each section and of each built-in policy that has options."""
    sections = (config.DispatchConfig, config.QueueConfig, config.PlacementConfig)
    yield from ((s.__name__, s) for s in (*sections, config.FeedbackConfig, config.GimbalConfig))
    for _, _, registry in config.NAMED:
        for name in registry._targets:
            declared = getattr(registry.load(name), "Options", None)
            if declared is not None:
                yield f"{registry.kind} {name}", declared


NUMBERS = [
    pytest.param(options, field.name, type(field.default), id=f"{owner}.{field.name}")
    for owner, options in owners()
    for field in dataclasses.fields(options)
    if type(field.default) in (int, float)
]
BAD = {float: (math.inf, -math.inf, math.nan, "1e400"), int: (10**24, -1, 1.5, math.inf)}


@pytest.mark.parametrize(("options", "name", "kind"), NUMBERS)
def test_a_number_out_of_range_is_refused_in_one_line(options, name, kind):
    for bad in BAD[kind]:
        with pytest.raises(InputError) as error:
            parse_options(options, {name: bad}, "here")
        assert str(error.value).startswith(f"here.{name}: ")
        assert "\n" not in str(error.value)
