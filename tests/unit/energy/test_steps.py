import numpy as np
import pytest

from llem_ray.energy.steps import energy_inside, guarded
from llem_ray.testing.loads import Segment, SegmentLoad

TICK_S = 0.1


def rates_w(*steps, ticks=10):
    """Mean power of ten ticks, and the true energy since tick 4 for any time after it."""
    load = SegmentLoad([Segment(t_s, power_w) for t_s, power_w in steps])
    counter_j = load.cumulative_j(TICK_S * np.arange(ticks + 1))
    return np.diff(counter_j) / TICK_S, np.full(ticks, TICK_S), lambda x_s: load.energy_j(4 * TICK_S, 4 * TICK_S + x_s)


def inside(rate_w, dt_s, x_s):
    return energy_inside(rate_w, dt_s, 4, x_s, noise_rel=0.0, limit_w=910.0)


@pytest.mark.parametrize("powers_w", [(400.0, 620.0), (620.0, 400.0), (120.0, 640.0), (640.0, 120.0)])
@pytest.mark.parametrize("at_s", [0.42, 0.45, 0.48])
@pytest.mark.parametrize("x_s", [0.01, 0.03, 0.05, 0.07, 0.09])
def test_one_step_between_steady_powers_is_found(powers_w, at_s, x_s):
    rate_w, dt_s, true_j = rates_w((0.0, powers_w[0]), (at_s, powers_w[1]))
    found = inside(rate_w, dt_s, x_s)
    assert found.energy_j == pytest.approx(true_j(x_s), abs=1.0)
    assert abs(found.energy_j - true_j(x_s)) <= 2 * found.variance_j2**0.5 + 0.1


def test_a_step_in_the_tick_before_does_not_bend_a_steady_one():
    rate_w, dt_s, true_j = rates_w((0.0, 150.0), (0.35, 630.0))
    found = inside(rate_w, dt_s, 0.06)
    assert found.energy_j == pytest.approx(true_j(0.06), abs=0.5)


def test_two_steps_in_the_tick_are_not_known_but_covered():
    for at_s in (0.405, 0.42, 0.44):
        rate_w, dt_s, true_j = rates_w((0.0, 400.0), (at_s, 650.0), (at_s + 0.05, 400.0))
        found = inside(rate_w, dt_s, 0.05)
        assert found.variance_j2**0.5 > 1.0
        assert abs(found.energy_j - true_j(0.05)) <= 2 * found.variance_j2**0.5


def test_energy_stays_between_the_ticks():
    rng = np.random.default_rng(5)
    for _ in range(200):
        rate_w, x_s = rng.uniform(0.0, 700.0, 10), float(rng.uniform(0.0, TICK_S))
        found = inside(rate_w, np.full(10, TICK_S), x_s)
        assert -1.0 <= found.energy_j <= rate_w[4] * TICK_S + 1.0
        assert np.isfinite(found.variance_j2)


def looks_guarded(steps, x_s):
    return guarded(rates_w(*steps)[0], 4, x_s=x_s, y_s=TICK_S - x_s, slack_s=2e-3, ceiling_w=700.0)


def test_quiet_ticks_below_a_busy_side_are_a_guard():
    assert looks_guarded(((0.0, 90.0), (0.46, 650.0), (0.55, 400.0)), 0.06)
    assert looks_guarded(((0.0, 400.0), (0.46, 90.0)), 0.06)


def test_no_guard_without_contrast_or_where_the_step_cannot_be_at_the_edge():
    assert not looks_guarded(((0.0, 300.0), (0.46, 400.0)), 0.06)
    assert not looks_guarded(((0.0, 150.0), (0.42, 650.0)), 0.06)
