"""Law 2: a step is a set of samples; shapes, batch size and processes only decide how it is cut."""

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qflux.data.order import Order, permuted
from qflux.randomness import Purpose, draw_seed, uniform

SHAPES = [((64, 64),), ((64, 96),), ((96, 64), (64, 64))]


def shape_of(index):
    return SHAPES[index % 3]


def make(count=40, **options):
    defaults = {"seed": 3, "batch": 8, "batch_size": 4, "window": 16}
    return Order(count, options.pop("shape_key", shape_of), **defaults | options)


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_permutation_is_one(count, key):
    assert sorted(permuted(p, count, key) for p in range(count)) == list(range(count))


def test_permutation_mixes():
    values = [permuted(p, 1000, draw_seed(1, Purpose.ORDER, 0)) for p in range(1000)]
    assert sum(a == b for a, b in enumerate(values)) < 10
    assert abs(sum(values[:100]) / 100 - 499.5) < 100
    assert values != [permuted(p, 1000, draw_seed(1, Purpose.ORDER, 1)) for p in range(1000)]


def test_large_set_is_computed_position_by_position():
    order = make(10**9, batch=4, shape_key=lambda index: ((64, 64),))
    assert len(set(order.samples(123_456_789))) == 4


@pytest.mark.parametrize("window", [1, 7, 16, 1000])
@pytest.mark.parametrize("batch", [1, 3, 8, 56])
def test_every_epoch_has_every_sample_once_and_steps_are_full(window, batch):
    order = make(40, batch=batch, window=window)
    steps = [order.samples(k) for k in range(3 * 40 // batch + 1)]
    assert all(len(step) == batch for step in steps)
    flat = list(itertools.chain.from_iterable(steps))
    for epoch in range(2):
        seen = sorted(index for e, index in flat if e == epoch)
        assert seen == list(range(40))


def test_the_window_alone_decides_the_arrangement():
    flat = {
        (batch, size, processes): [order.at(p) for p in range(120)]
        for batch, size, processes in [(8, 4, 1), (4, 1, 1), (16, 2, 4)]
        for order in [make(batch=batch, batch_size=size, processes=processes)]
    }
    assert len({tuple(value) for value in flat.values()}) == 1
    assert [make(window=8).at(p) for p in range(40)] != [make(window=40).at(p) for p in range(40)]


def test_windows_keep_shapes_together():
    runs = [len(list(group)) for _, group in itertools.groupby(make(300, window=300).at(p)[1] % 3 for p in range(300))]
    assert runs == [100, 100, 100]


@given(st.integers(1, 30), st.integers(1, 24), st.integers(1, 6), st.integers(1, 5), st.integers(0, 5))
@settings(max_examples=80, deadline=None)
def test_cut_into_micro_batches(count, batch, batch_size, processes, number):
    orders = [make(count, batch=batch, batch_size=batch_size, processes=processes, rank=r) for r in range(processes)]
    steps = [order.step(number) for order in orders]
    assert len({len(step.micros) for step in steps}) == 1, "all processes run the same number of forwards"
    seen = []
    for micro in itertools.chain.from_iterable(step.micros for step in steps):
        assert 1 <= len(micro.positions) <= batch_size
        assert len({shape_of(index) for _, index in micro.positions}) == 1
        if micro.share:
            assert micro.share == pytest.approx(len(micro.positions) * processes / batch)
            seen += micro.positions
    assert sorted(seen) == sorted(orders[0].samples(number))


@pytest.mark.parametrize("processes", [1, 2, 4, 4096])
@pytest.mark.parametrize(("batch", "batch_size"), [(4096, 1), (8192, 4)])
def test_any_number_of_processes_makes_the_same_step(processes, batch, batch_size):
    """Each process computes its own part alone; together they weigh each sample of the one-process step alike."""
    options = {"batch": batch, "batch_size": batch_size, "window": 1024}
    order = make(5000, processes=processes, **options)
    micros = order.micros(1)
    for rank in {0, 1, processes // 2, processes - 1} & set(range(processes)):
        alone = make(5000, processes=processes, rank=rank, **options).step(1)
        order.rank, order.micros = rank, lambda number: micros
        assert order.step(1) == alone
    weights = Counter()
    forwards = set()
    for order.rank in range(processes):  # every process sees the same micro-batches: made once here, it takes no time
        step = order.step(1)
        forwards.add(len(step.micros))
        for micro in step.micros:
            weights.update({position: micro.share / len(micro.positions) / processes for position in micro.positions})
    assert len(forwards) == 1
    assert weights.keys() == set(make(5000, **options).samples(1))
    assert list(weights.values()) == pytest.approx([1 / batch] * batch)


def test_resume_is_a_start_at_a_later_step():
    straight = list(itertools.islice(make().steps(), 12))
    assert list(itertools.islice(make().steps(7), 5)) == straight[7:]


def test_draws_depend_on_every_argument_and_nothing_else():
    base = draw_seed(1, Purpose.NOISE, 2, 3)
    others = [draw_seed(2, Purpose.NOISE, 2, 3), draw_seed(1, Purpose.SIGMA, 2, 3), draw_seed(1, Purpose.NOISE, 3, 2)]
    assert base == draw_seed(1, Purpose.NOISE, 2, 3)
    assert len({base, *others}) == 4
    values = [uniform(0, Purpose.DROPOUT, 0, i) for i in range(4000)]
    assert 0.48 < sum(values) / 4000 < 0.52
    assert 0 <= min(values) <= max(values) < 1
