from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from llem_ray.core.energy import PhaseSpan
from llem_ray.core.errors import TilingError
from llem_ray.energy.edge import counter_near
from llem_ray.energy.estimator import edge_margin_s
from llem_ray.energy.ledger import DeviceLedger, check_tiling
from llem_ray.testing.sensor import SensorModel

PHASES = ("startup", "load", "warmup", "guard", "measured", "guard", "gap", "warmup", "guard", "measured", "guard", "shutdown")


def spans_over(begin_ns, end_ns, *, seed=0):
    shares = np.sort(np.random.default_rng(seed).uniform(size=len(PHASES) - 1))
    cuts = [begin_ns, *(begin_ns + round(share * (end_ns - begin_ns)) for share in shares), end_ns]
    return [PhaseSpan(phase=p, begin_ns=a, end_ns=b) for p, a, b in zip(PHASES, cuts[:-1], cuts[1:], strict=True)]


def ledger_of(one, **changes):
    arguments = {
        "device": one.device,
        "calibration": one.model.calibration(one.device.uuid),
        "sample_period_s": one.model.poll_s,
        "begin_ns": one.window.begin_ns,
    }
    return DeviceLedger(**{**arguments, **changes})


def feed(ledger, one, spans, *, at_once=1, trace=None):
    """Slices of the trace, each just as long as the estimator needs."""
    margin_ns = round(edge_margin_s(ledger.calibration, ledger.sample_period_s) * 1e9)
    parts = []
    for i in range(0, len(spans), at_once):
        some = spans[i : i + at_once]
        whole = one.trace if trace is None else trace
        parts += ledger.add(whole.between(some[0].begin_ns - margin_ns, some[-1].end_ns + margin_ns), some)
    return parts


@pytest.mark.parametrize("load", ["prefill_decode", "midstream", "poisson_bursts"])
@pytest.mark.parametrize("at_once", [1, 3, 12])
def test_phases_add_up_to_the_whole(case, load, at_once):
    for seed in range(5):
        one = case(load, 30.0, seed=seed)
        ledger = ledger_of(one)
        spans = spans_over(one.window.begin_ns, one.window.end_ns, seed=seed)
        parts = feed(ledger, one, spans, at_once=at_once)
        reading, whole = one.read(), ledger.whole()
        assert sum(part.energy_j for part in parts) == pytest.approx(reading.energy_j, abs=1e-5)
        assert whole.energy_j == pytest.approx(reading.energy_j, abs=1e-5)
        assert whole.u_j == pytest.approx(reading.u_j, rel=1e-6)
        assert sum(total.energy_j for total in ledger.phases().values()) == pytest.approx(whole.energy_j, abs=1e-6)
        assert sum(total.spans for total in ledger.phases().values()) == len(spans)
        assert min(part.energy_j for part in parts) >= 0
        assert ledger.end_ns == one.window.end_ns


@pytest.mark.parametrize("load", ["prefill_decode", "midstream", "poisson_bursts"])
def test_each_phase_is_true_within_its_u(case, load):
    """Boundaries at random, no guards: what the load does at an edge is hidden inside one tick, most of all in short bursts."""
    inside, errors = [], []
    for seed in range(30):
        one = case(load, 30.0, seed=seed)
        for part in feed(ledger_of(one), one, spans_over(one.window.begin_ns, one.window.end_ns, seed=seed), at_once=12):
            error_j = part.energy_j - one.load.energy_j(part.span.begin_ns / 1e9, part.span.end_ns / 1e9)
            inside.append(abs(error_j) <= 2 * part.u_j)
            errors.append(error_j)
    assert np.mean(inside) >= (0.85 if load == "poisson_bursts" else 0.95)
    assert np.sqrt(np.mean(np.square(errors))) <= (10.0 if load == "poisson_bursts" else 6.0)


def test_slicing_does_not_matter(case):
    one = case("midstream", 30.0, seed=3)
    spans = spans_over(one.window.begin_ns, one.window.end_ns, seed=3)
    ways = [feed(ledger_of(one), one, spans, at_once=n) for n in (1, 5, 12)]
    for parts in zip(*ways, strict=True):
        assert np.ptp([part.energy_j for part in parts]) < 1e-6


def test_u_of_adjoining_spans_of_a_phase_comes_from_their_outer_edges(case):
    one = case("midstream", 10.0, seed=1)
    cuts = np.linspace(one.window.begin_ns, one.window.end_ns, 101).astype(np.int64).tolist()
    spans = [PhaseSpan(phase="measured", begin_ns=a, end_ns=b) for a, b in pairwise(cuts)]
    ledger = ledger_of(one)
    parts = feed(ledger, one, spans, at_once=7)
    total = ledger.phases()["measured"]
    assert total.u_j == pytest.approx(ledger.whole().u_j)
    assert total.u_j == pytest.approx(one.read().u_j, rel=1e-6)
    assert np.sqrt(sum(part.u_j**2 for part in parts)) > 3 * total.u_j


def test_spans_far_shorter_than_a_tick(case):
    for seed in range(5):
        one = case("prefill_decode", 2.0, seed=seed)
        cuts = np.linspace(one.window.begin_ns, one.window.end_ns, 401).astype(np.int64).tolist()
        spans = [PhaseSpan(phase="gap", begin_ns=a, end_ns=b) for a, b in pairwise(cuts)]
        ledger = ledger_of(one)
        parts = feed(ledger, one, spans, at_once=50)
        assert min(part.energy_j for part in parts) >= 0
        assert ledger.whole().energy_j == pytest.approx(one.true_j, rel=0.02)


def test_the_ledger_keeps_no_samples(case):
    one = case("constant", 30.0)
    ledger = ledger_of(one)
    feed(ledger, one, spans_over(one.window.begin_ns, one.window.end_ns))
    held = [getattr(ledger, name) for name in ledger.__slots__]
    assert not any(isinstance(value, np.ndarray) or type(value).__name__ == "Trace" for value in held)


def test_without_a_counter_the_power_integral_adds_up_too(case, device):
    one = case("prefill_decode", 20.0, device=device(method="measured_power_integral", counter_quantum_mj=None))
    trace = replace(one.trace, energy_mj=one.trace.energy_mj * np.nan)
    calibration = replace(one.model.calibration("GPU-sim"), tick_period_s=None)
    spans = spans_over(one.window.begin_ns, one.window.end_ns)
    totals = []
    for at_once in (1, 4):
        ledger = ledger_of(one, calibration=calibration)
        parts = feed(ledger, one, spans, at_once=at_once, trace=trace)
        assert {part.method for part in parts} == {"measured_power_integral"}
        totals.append(sum(part.energy_j for part in parts))
        assert ledger.whole().energy_j == pytest.approx(totals[-1])
    assert totals == pytest.approx([one.true_j] * 2, rel=0.03)
    assert totals[0] == pytest.approx(totals[1], rel=2e-3)


def test_a_reset_spoils_only_its_own_span(case):
    one = case("constant", 20.0)
    spans = spans_over(one.window.begin_ns, one.window.end_ns)
    longest = max(spans, key=lambda span: span.end_ns - span.begin_ns)
    after = one.trace.t_ns >= (longest.begin_ns + longest.end_ns) // 2
    energy_mj = np.where(after, one.trace.energy_mj - one.trace.energy_mj[after][0], one.trace.energy_mj)
    ledger = ledger_of(one)
    parts = feed(ledger, one, spans, trace=replace(one.trace, energy_mj=energy_mj))
    fallen = [part for part in parts if part.method != "measured_counter"]
    assert [part.span for part in fallen] == [longest]
    assert "counter_reset" in fallen[0].notes["counter"]
    assert ledger.whole().energy_j == pytest.approx(one.true_j, rel=0.02)


def test_a_dead_sampler_leaves_a_reason_not_a_zero(case):
    one = case("constant", 20.0)
    spans = spans_over(one.window.begin_ns, one.window.end_ns)
    ledger = ledger_of(one)
    dead_ns = spans[6].begin_ns
    parts = feed(ledger, one, spans, trace=one.trace.between(0, dead_ns))
    assert parts[0].energy_j > 0
    last = parts[-1]
    assert (last.energy_j, last.u_j) == (None, None)
    assert last.reason
    whole = ledger.whole()
    assert whole.energy_j is None
    assert whole.known_j > 0
    assert whole.reason


def test_shared_and_unavailable_devices(case, device):
    one = case("constant", 5.0)
    spans = spans_over(one.window.begin_ns, one.window.end_ns)
    for changed, words in (
        (device(shared=True), "attribution=shared"),
        (device(method="unavailable", reason="masked"), "masked"),
    ):
        parts = feed(ledger_of(one, device=changed), one, spans)
        assert all(part.energy_j is None and words in part.reason for part in parts)


def test_estimates_keep_their_label(case, device):
    model = SensorModel(power_tick_s=1.0, instant_window_s=1.0, poll_s=1.0, poll_jitter_s=0.001)
    one = case("constant", 20.0, model=model, device=device(method="estimated_model", scope="host"))
    ledger = ledger_of(one)
    parts = feed(ledger, one, spans_over(one.window.begin_ns, one.window.end_ns), at_once=12)
    assert {part.method for part in parts} == {"estimated_model"}
    assert ledger.whole().energy_j == pytest.approx(one.true_j, rel=0.1)


def tiled():
    return [PhaseSpan(phase="load", begin_ns=0, end_ns=10), PhaseSpan(phase="measured", begin_ns=10, end_ns=30, trial_id="t1")]


def test_tiling_holds():
    check_tiling(tiled(), 0, 30)
    check_tiling(reversed(tiled()), 0, 30)
    check_tiling([], 5, 5)


@pytest.mark.parametrize(
    ("index", "change", "words"),
    [
        (1, {"begin_ns": 8}, r"measured of t1 \[8, 30\] overlaps load \[0, 10\] by 2 ns"),
        (1, {"begin_ns": 13}, r"hole of 3 ns between load \[0, 10\] and measured of t1"),
        (0, {"begin_ns": 1}, "hole of 1 ns between the begin and load"),
        (0, {"begin_ns": -1}, "overlaps the begin by 1 ns"),
        (1, {"end_ns": 29}, "hole of 1 ns between measured of t1 .* and the end"),
        (1, {"end_ns": 31}, "overlaps the end by 1 ns"),
        (1, {"end_ns": 9}, "ends before it begins"),
    ],
)
def test_overlaps_and_holes_are_found(index, change, words):
    spans = tiled()
    spans[index] = replace(spans[index], **change)
    with pytest.raises(TilingError, match=words):
        check_tiling(spans, 0, 30)


def test_the_ledger_refuses_a_hole_between_slices(case):
    one = case("constant", 10.0)
    ledger = ledger_of(one)
    begin_ns = one.window.begin_ns
    ledger.add(one.trace, [PhaseSpan(phase="load", begin_ns=begin_ns, end_ns=begin_ns + 10**9)])
    with pytest.raises(TilingError, match="hole of 1 ns"):
        ledger.add(one.trace, [PhaseSpan(phase="gap", begin_ns=begin_ns + 10**9 + 1, end_ns=begin_ns + 2 * 10**9)])
    with pytest.raises(TilingError, match="overlaps"):
        ledger.add(one.trace, [PhaseSpan(phase="gap", begin_ns=begin_ns + 10**9 - 1, end_ns=begin_ns + 2 * 10**9)])
    assert ledger.add(one.trace, []) == ()
    assert ledger.whole().spans == 1


@pytest.mark.parametrize("load", ["prefill_decode", "midstream", "poisson_bursts"])
def test_cheap_boundaries_inside_a_phase_cancel(case, load):
    inside = []
    for seed in range(5):
        one = case(load, 30.0, seed=seed)
        ledger = ledger_of(one)
        begin_ns, end_ns = one.window.begin_ns, one.window.end_ns
        cuts = [begin_ns + (end_ns - begin_ns) * i // 12 for i in range(13)]
        spans = [PhaseSpan(phase="unleased", begin_ns=a, end_ns=b) for a, b in pairwise(cuts)]
        margin_ns = round(edge_margin_s(ledger.calibration, ledger.sample_period_s) * 1e9)
        parts = []
        for span in spans:
            trace = one.trace.between(span.begin_ns - margin_ns, span.end_ns + margin_ns)
            parts += ledger.add(trace, [span], goes_on=span is not spans[-1])
        assert ledger.whole().energy_j == pytest.approx(one.read().energy_j, abs=1e-5)
        assert ledger.whole().u_j == pytest.approx(one.read().u_j, rel=1e-6)
        errors_j = [part.energy_j - one.load.energy_j(part.span.begin_ns / 1e9, part.span.end_ns / 1e9) for part in parts]
        inside += [abs(error_j) <= 2 * part.u_j for error_j, part in zip(errors_j, parts, strict=True)]
    assert np.mean(inside) >= 0.9


def test_a_cheap_boundary_needs_new_values_on_both_sides(case):
    one = case("midstream", 10.0)
    trace, middle_ns = one.trace, (one.window.begin_ns + one.window.end_ns) // 2
    edge = counter_near(trace, middle_ns)
    assert edge is not None
    assert edge.u_j > 0
    assert counter_near(trace, int(trace.t_ns[0])) is None
    assert counter_near(trace, int(trace.t_ns[-1]) + 10**9) is None
    assert counter_near(replace(trace, energy_mj=trace.energy_mj[::-1]), middle_ns) is None
    assert counter_near(replace(trace, energy_mj=np.full(len(trace), np.nan)), middle_ns) is None
