"""The cost model: identities on dyadic numbers, where float64 is exact; values by hand; the paper's figures.

Every quantity drawn is a multiple of 1/8 below 2^7, rates, periods and lengths are powers of two or such
multiples, so products and sums fit in 53 bits and `==` is meant.
"""

from dataclasses import replace
from fractions import Fraction
from io import BytesIO
from math import inf, nan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nab.sim.cost import (
    Engine,
    Machine,
    Model,
    break_even,
    choosing_time,
    forward_time,
    overhead,
    round_time,
    single_time,
)
from nab.sim.studies import cost as study

sizes = st.integers(1, 1023).map(lambda k: k / 8)
rates = st.integers(-3, 3).map(lambda k: 2.0**k)
machines = st.builds(Machine, bandwidth=rates, peak=rates | st.just(inf), launch=st.just(0.0) | sizes)
models = st.builds(Model, weights=sizes, flops=sizes, kv=sizes, layers=st.integers(1, 64))
engines = st.builds(
    Engine,
    machine=machines,
    target=models,
    drafter=models,
    draft_len=st.integers(0, 16),
    context=sizes,
    update=st.just(0.0) | sizes,
    period=st.sampled_from([1, 2, 4, 8, 16]),
    batched=st.booleans(),
    hidden=st.booleans(),
)
lengths = st.integers(8, 136).map(lambda k: k / 8)
pools = st.integers(1, 1000)

BY_HAND = Engine(
    Machine(bandwidth=4.0, peak=8.0, launch=0.5),
    target=Model(weights=40.0, flops=8.0, kv=0.5, layers=2),
    drafter=Model(weights=4.0, flops=2.0, kv=0.0625, layers=1),
    draft_len=3,
    context=64.0,
)
"""Target: 72 bytes take 18 s, 4 tokens 4 s, launches 1 s; drafter: 8 bytes 2 s, a token 1/4 s, launch 1/2."""
LIMIT = Engine(Machine(bandwidth=1.0), Model(16e9), Model(0.76e9), draft_len=0)


# The roofline


@given(models, rates, sizes, sizes, sizes)
def test_limits_of_the_roofline(model, rate, launch, tokens, context):
    read = model.weights + context * model.kv
    assert forward_time(Machine(rate), model, tokens, context) == read / rate
    assert forward_time(Machine(inf, peak=rate), model, tokens, context) == tokens * model.flops / rate
    assert forward_time(Machine(inf, launch=launch), model, tokens, context) == model.layers * launch
    assert forward_time(Machine(inf), model, tokens, context) == 0


@given(machines, models, sizes, sizes)
def test_a_forward_is_at_least_what_it_reads_and_computes_and_at_most_their_sum(
    machine, model, tokens, context
):
    launches = model.layers * machine.launch
    reading = forward_time(replace(machine, peak=inf), model, tokens, context) - launches
    computing = forward_time(replace(machine, bandwidth=inf), model, tokens, context) - launches
    both = forward_time(machine, model, tokens, context) - launches
    assert both == max(reading, computing) <= reading + computing


def test_rounds_by_hand():
    assert forward_time(BY_HAND.machine, BY_HAND.target, [4, 36, 72], 64).tolist() == [19, 37, 73]
    assert single_time(BY_HAND) == 3 * 2.5 + 19
    assert choosing_time(BY_HAND, [1, 2, 4], 2.0).tolist() == [2.5, 5, 10]
    assert choosing_time(replace(BY_HAND, update=0.25), 4, 2.0) == 10.25
    assert round_time(BY_HAND, 4, 2.0) == 36.5
    assert overhead(BY_HAND, 4, 2.0) == 10 / 26.5
    # reads as much, launches once
    assert choosing_time(replace(BY_HAND, batched=True), 4, 2.0) == 8.5
    # 16 tokens take 4 s to compute, twice what reading takes
    assert choosing_time(replace(BY_HAND, period=8), 4, 2.0) == 4 * 4.5 / 8
    # reads 104 bytes with the target's; of its four launches two hide behind the target's
    assert choosing_time(replace(BY_HAND, hidden=True), 4, 2.0) == 26 + 4 * 0.5 - 19
    assert choosing_time(replace(BY_HAND, hidden=True, batched=True), 4, 2.0) == 26 + 2 * 0.5 - 19


# What choosing adds


@given(engines, pools, lengths)
def test_more_drafters_cost_more(engine, n, length):
    one, some, more = choosing_time(engine, [1, n, n + 1], length)
    assert engine.update <= one <= some <= more
    assert round_time(engine, n, length) == single_time(engine) + some


@given(engines, pools, lengths)
def test_one_forward_costs_at_most_a_loop_and_hiding_at_most_either(engine, n, length):
    def time(n, batched, hidden):
        return choosing_time(replace(engine, batched=batched, hidden=hidden), n, length)

    assert time(n, True, False) <= time(n, False, False)
    assert time(n, True, True) <= time(n, True, False)
    assert time(n, False, True) <= time(n, False, False)
    assert time(1, True, False) == time(1, False, False)


@given(engines, pools, lengths)
def test_at_the_bandwidth_limit_nothing_hides_and_batching_saves_nothing(engine, n, length):
    limit = replace(engine, machine=Machine(engine.machine.bandwidth))
    times = {
        float(choosing_time(replace(limit, batched=batched, hidden=hidden), n, length))
        for batched in (False, True)
        for hidden in (False, True)
    }
    assert len(times) == 1


@given(engines, pools, lengths)
def test_at_the_launch_limit_what_is_shorter_than_the_target_hides(engine, n, length):
    machine = Machine(inf, launch=1.0)
    hidden = replace(engine, machine=machine, hidden=True, batched=False)
    beyond = max(n * engine.drafter.layers - engine.target.layers, 0)
    assert choosing_time(hidden, n, length) == beyond / engine.period + engine.update


# Lazy evaluation


def divides(engine, n, length, periods):
    """Whether lazy evaluation costs exactly one over the period of eager evaluation."""
    eager = choosing_time(replace(engine, period=1), n, length)
    return [choosing_time(replace(engine, period=m), n, length) == eager / m for m in periods]


@given(engines, pools, lengths)
def test_lazy_evaluation_divides_by_the_period_while_computing_is_free(engine, n, length):
    free = replace(engine, machine=replace(engine.machine, peak=inf), update=0.0)
    assert all(divides(free, n, length, [2, 16, 2**20]))


@given(engines, pools, lengths)
def test_as_the_period_grows_nothing_is_left_but_the_update_and_computing(engine, n, length):
    engine = replace(engine, hidden=False)
    computing = n * length * engine.drafter.flops / engine.machine.peak
    free = replace(engine, machine=replace(engine.machine, peak=inf), period=1, update=0.0)
    for period in (1, 2**8, 2**16):
        left = choosing_time(replace(engine, period=period), n, length) - engine.update
        assert computing <= left <= computing + choosing_time(free, n, length) / period


def test_division_ends_where_computing_takes_longer():
    # one drafter, 2 tokens a round: 2 s to read, half a second a round to compute
    assert divides(replace(BY_HAND, batched=True), 1, 2.0, [1, 2, 4, 8]) == [True, True, True, False]
    assert not any(divides(replace(BY_HAND, update=0.25), 1, 2.0, [2, 4]))


# Break-even


def inverts(engine, n, length, alone):
    """Whether n drafters, if any, cost less than they gain, and n + 1 do not; in rational numbers."""

    def pays(count):
        share = Fraction(float(choosing_time(engine, count, length))) / Fraction(single_time(engine))
        return share < Fraction(length) / Fraction(alone) - 1

    return (n == 0 or pays(n)) and not pays(n + 1)


@given(engines, lengths, lengths)
def test_the_break_even_inverts_the_overhead(engine, length, alone):
    n = int(break_even(engine, length, alone))
    assert inverts(engine, n, length, alone)
    assert not inverts(engine, n + 1, length, alone)
    assert n == 0 or not inverts(engine, n - 1, length, alone)


@given(engines, lengths, lengths)
def test_the_break_even_of_a_loop_in_closed_form(engine, length, alone):
    engine = replace(engine, hidden=False, batched=False, update=0.0)
    each, single = Fraction(float(choosing_time(engine, 1, length))), Fraction(single_time(engine))
    budget = single * (Fraction(length) / Fraction(alone) - 1)
    assert break_even(engine, length, alone) == max(-(-budget // each) - 1, 0)


@given(engines, lengths, lengths)
def test_waiting_longer_never_lowers_the_break_even(engine, length, alone):
    engine = replace(engine, hidden=False)
    found = [break_even(replace(engine, period=m), length, alone) for m in (1, 2, 4, 8, 16)]
    assert found == sorted(found)


def test_hidden_computing_is_better_spread_over_rounds():
    # reading takes 18 s and verifying 4 s, so 8 drafters that only compute fit in between; 16 rounds' do not
    spread = replace(BY_HAND, drafter=Model(0.0, flops=4.0, layers=1), hidden=True, batched=True)
    assert choosing_time(spread, 8, 1.0) == 0
    assert choosing_time(replace(spread, period=16), 8, 1.0) == (4 + 16 * 4 - 18) / 16


def test_break_even_at_its_ends():
    machine = Machine(inf, launch=1.0)
    stacked = Engine(machine, Model(1.0, layers=32), Model(1.0), 0, batched=True)
    # one launch whatever n: a gain of 1/32 is not above it, one of 1/16 is
    assert break_even(stacked, [33, 34], 32).tolist() == [0, inf]
    assert break_even(stacked, 4.0, 4.0) == 0
    assert break_even(stacked, 3.0, 4.0) == 0
    assert break_even(replace(stacked, batched=False), 34, 32) == 1
    assert break_even(LIMIT, np.full((2, 1), 5.0), np.full(3, 4.0)).shape == (2, 3)


# Bad input


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Machine(0.0), "bandwidth"),
        (lambda: Machine(nan), "bandwidth"),
        (lambda: Machine(1.0, peak=-1.0), "peak"),
        (lambda: Machine(1.0, launch=inf), "launch"),
        (lambda: Model(-1.0), "weights"),
        (lambda: Model(1.0, flops=nan), "flops"),
        (lambda: Model(1.0, kv=-1.0), "kv"),
        (lambda: Model(1.0, layers=-1), "layers"),
        (lambda: replace(LIMIT, draft_len=-1), "draft_len"),
        (lambda: replace(LIMIT, draft_len=1.5), "draft_len"),
        (lambda: replace(LIMIT, period=0), "period"),
        (lambda: replace(LIMIT, context=-1.0), "context"),
        (lambda: replace(LIMIT, update=-1.0), "update"),
        (lambda: replace(LIMIT, target=Model(0.0)), "target"),
        (lambda: forward_time(LIMIT.machine, LIMIT.target, -1), "tokens"),
        (lambda: forward_time(LIMIT.machine, LIMIT.target, 1, -1.0), "context"),
        (lambda: choosing_time(LIMIT, 0, 2.0), "n must"),
        (lambda: overhead(LIMIT, [1, 1.5], 2.0), "n must"),
        (lambda: round_time(LIMIT, 1, 0.5), "length"),
        (lambda: break_even(LIMIT, nan, 2.0), "length"),
        (lambda: break_even(LIMIT, 2.0, 0.5), "alone"),
    ],
)
def test_bad_input_is_named(make, named):
    with pytest.raises(ValueError, match=named):
        make()


# The paper's figures (Liu et al. 2025), as docs/costs.md gives them


def percent(engine, **changes):
    return round(100 * float(overhead(replace(engine, **changes), study.POOL, study.LENGTH)), 2)


def test_a_third_more_at_the_bandwidth_limit():
    assert overhead(LIMIT, 7, 7.15) == 7 * 0.76 / 16 == 0.3325
    assert [float(overhead(replace(LIMIT, period=m), 7, 7.15)) for m in (2, 4, 16)] == [
        0.3325 / m for m in (2, 4, 16)
    ]
    a100 = study.ENGINES["bandwidth limit"]
    read = study.DRAFTER.weights / study.A100.bandwidth
    assert round(read * study.A100.peak / study.DRAFTER.flops) == 153
    assert percent(a100) == 33.25
    assert percent(a100, context=8192) == 32.53
    assert percent(a100, draft_len=8) == 24.09
    # an A100 computes 153 tokens while it reads: 21 rounds of 7.15
    shares = [percent(a100, period=m) for m in (21, 22, 64)]
    assert shares == [1.58, 1.55, 1.55]
    assert [break_even(replace(a100, period=m), study.LENGTH, study.ALONE) for m in (1, 2, 4, 16)] == [
        5,
        10,
        21,
        86,
    ]
    assert break_even(replace(a100, draft_len=8), study.LENGTH, study.ALONE) == 7


def test_rounds_that_the_tables_imply():
    table = study.measure().query("source == 'implied'").set_index(["target", "method"])
    assert table.round_ms.round(1).to_dict() == {
        ("Llama-3.1-8B", "EAGLE-3"): 76.6,
        ("Llama-3.1-8B", "UCBSpec"): 73.9,
        ("Llama-3.1-8B", "EXP3Spec"): 74.5,
        ("Llama-3.1-8B", "HedgeSpec"): 79.1,
        ("Qwen3-8B", "EAGLE-3"): 89.1,
        ("Qwen3-8B", "HedgeSpec"): 91.8,
        ("Qwen3-32B", "EAGLE-3"): 138.5,
        ("Qwen3-32B", "UCBSpec"): 135.5,
        ("Qwen3-32B", "EXP3Spec"): 137.0,
        ("Qwen3-32B", "HedgeSpec"): 153.7,
    }
    assert (100 * table.overhead.dropna()).round(1).tolist() == [3.3, 7.1, 6.1, 3.1, 11.0, 13.4, 12.2]
    known = table.dropna(subset=["overhead"])
    assert ((known.low < known.overhead) & (known.overhead < known.high)).all()
    assert (known.high - known.low).max() < 2 * 0.0075


def test_what_their_measured_times_predict():
    loop, batched, hidden = (study.ENGINES[f"measured, {how}"] for how in ("loop", "batched", "hidden"))
    assert single_time(loop) == pytest.approx(75.7e-3, rel=1e-15)
    assert choosing_time(loop, 7, 7.15) == pytest.approx(7 * 2.5e-3 + 0.413e-3, rel=1e-15)
    assert [percent(e) for e in (loop, batched, hidden)] == [23.66, 3.85, 0.55]
    assert [percent(e, draft_len=8) for e in (loop, batched, hidden)] == [18.72, 3.04, 0.43]
    low, high = (100 * share for share in study.REPORTED)
    explains = [
        [m for m in range(1, 100) if low <= percent(engine, period=m) <= high]
        for engine in (loop, batched, hidden)
    ]
    assert explains == [list(range(16, 36)), [3, 4, 5], []]
    assert [break_even(e, study.LENGTH, study.ALONE) for e in (loop, batched, hidden)] == [7, inf, 37]


def test_a_layer_takes_as_long_in_the_target_as_in_a_drafter():
    reading = study.TARGET.weights / study.A100.bandwidth
    assert round(1e3 * study.LAUNCH, 2) == 2.13
    assert round(1e3 * (study.TARGET_SECONDS - reading) / study.TARGET.layers, 2) == 2.12
    drafting = 8 * study.DRAFTER_SECONDS
    assert round(1e3 * (study.TARGET_SECONDS - drafting - reading) / study.TARGET.layers, 2) == 1.5
    slower = 1.555e12  # the A100 with 40 GB
    assert round(1e3 * (study.TARGET_SECONDS - study.TARGET.weights / slower) / 32, 2) == 2.04
    assert round(1e3 * (study.DRAFTER_SECONDS - study.DRAFTER.weights / slower), 2) == 2.01
    assert round(1e3 * single_time(study.EAGER), 1) == 75.9
    machine = study.EAGER.machine
    qwen = [Model(2 * 8.2e9, layers=36), Model(2 * 32.8e9, layers=64)]
    assert [round(1e3 * float(forward_time(machine, model, 1)), 1) for model in qwen] == [84.6, 168.3]
    loop, batched = study.ENGINES["loop"], study.ENGINES["batched"]
    assert [percent(e) for e in (loop, batched, replace(loop, hidden=True))] == [23.59, 6.78, 3.98]
    for engine, pays in ((loop, [7, 30, 122]), (batched, [45, 198, 812])):
        assert [break_even(replace(engine, period=m), study.LENGTH, study.ALONE) for m in (1, 4, 16)] == pays


def test_the_table_and_its_picture():
    table = study.measure(scale=0.1, seed=1)
    assert table.equals(study.measure())
    assert len(table) == 6 * 2 * 6 * 64 + 1 + 10
    picture = study.figure(table)
    assert [axes.get_title() for axes in picture.axes] == list(study.DRAWN.values())
    picture.savefig(BytesIO(), format="png")
