import numpy as np
import pytest
from scipy import stats

from llem_ray.energy import metrics


def test_by_hand():
    assert metrics.joules_per_output_token(120.0, 40) == 3.0
    assert metrics.joules_per_input_token(120.0, 60) == 2.0
    assert metrics.joules_per_total_token(120.0, 60, 40) == 1.2
    assert metrics.joules_per_successful_query(120.0, 4) == 30.0
    assert metrics.output_tokens_per_joule(120.0, 60) == 0.5
    assert metrics.avg_total_gpu_power_w(120.0, 2.0) == 60.0
    assert metrics.avg_power_w(120.0, 2.0, 4) == 15.0
    assert metrics.energy_delay_product_js(120.0, 2.0) == 240.0


def test_missing_stays_missing():
    assert metrics.joules_per_output_token(None, 40) is None
    assert metrics.joules_per_output_token(120.0, None) is None
    assert metrics.joules_per_output_token(120.0, 0) is None
    assert metrics.joules_per_total_token(120.0, None, 40) is None
    assert metrics.output_tokens_per_joule(0.0, 40) is None
    assert metrics.avg_total_gpu_power_w(None, 2.0) is None
    assert metrics.avg_power_w(120.0, 2.0, 0) is None
    assert metrics.energy_delay_product_js(None, 2.0) is None
    assert metrics.t_interval([]) is None


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 10, 30, 101, 1000])
@pytest.mark.parametrize("p", [0.01, 0.4, 0.5, 0.6, 0.95, 0.975, 0.9995])
def test_t_quantile_is_scipys(p, degrees):
    assert metrics.t_quantile(p, degrees) == pytest.approx(stats.t.ppf(p, degrees), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("p", "degrees"), [(0.0, 3), (1.0, 3), (0.5, 0)])
def test_t_quantile_refuses(p, degrees):
    with pytest.raises(ValueError, match="no t quantile"):
        metrics.t_quantile(p, degrees)


def test_t_interval():
    values = [3.1, 2.9, 3.3, 3.0, 2.7]
    result = metrics.t_interval(values)
    low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    assert (result.mean - result.half_width, result.mean + result.half_width) == pytest.approx((low, high))
    assert result.n == 5
    assert metrics.t_interval([3.0]) == metrics.Interval(3.0, None, 1)


def test_t_interval_covers_as_stated():
    rng = np.random.default_rng(1)
    inside = 0
    for sample in rng.normal(10.0, 2.0, (2000, 5)):
        result = metrics.t_interval(sample.tolist())
        inside += abs(result.mean - 10.0) <= result.half_width
    assert 0.935 <= inside / 2000 <= 0.965
