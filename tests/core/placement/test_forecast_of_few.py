"""A first window of few tokens: a server that has just started."""

import numpy as np

from gimbal.core.placement.forecast import observe, predict


def test_a_place_that_nobody_held_is_not_forecast_to_explode():
    few, many = np.zeros((2, 8)), np.arange(8.0, 24.0).reshape(2, 8)
    few[:, 0] = 3.0
    state = observe(observe(None, few), many)
    assert (state.share == 0.0).any()
    forecast = predict(state, many)
    assert np.isfinite(forecast.factor).all()
    assert forecast.factor.max() < 10.0
