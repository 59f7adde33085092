"""Results are computed ahead in threads: in order, with bounded memory, and errors come in their place."""

import threading

import pytest

from sparselora_jax.runtime.ahead import map_ahead


@pytest.mark.parametrize('threads', [1, 4])
def test_results_come_in_the_order_of_the_items(threads):
    # The later an item, the sooner it could be done.
    pauses = threading.Event()

    def square(number):
        pauses.wait(0.01 / (1 + number))
        return number**2

    assert list(map_ahead(square, range(20), ahead=5, threads=threads)) == [number**2 for number in range(20)]
    assert list(map_ahead(square, [], ahead=5, threads=threads)) == []


def test_one_thread_computes_in_order():
    begun = []
    assert list(map_ahead(begun.append, range(50), ahead=7)) == [None] * 50
    assert begun == list(range(50))


def test_threads_work_at_once():
    # Each of the two waits until the other one is there, so one after the other they would break the barrier.
    barrier = threading.Barrier(2, timeout=30)
    assert sorted(map_ahead(lambda item: barrier.wait(), range(2), ahead=1, threads=2)) == [0, 1]


def test_no_more_results_are_held_than_were_asked_for():
    begun = []
    results = map_ahead(lambda item: begun.append(item) or item, iter(range(100)), ahead=3, threads=2)
    for done, result in enumerate(results, start=1):
        assert result == done - 1
        assert len(begun) <= done + 3


@pytest.mark.parametrize('threads', [1, 3])
def test_an_error_comes_in_its_place_and_later_items_are_dropped(threads):
    begun = []

    def fail_at_five(item):
        begun.append(item)
        if item == 5:
            raise ValueError('item 5')
        return item

    results = map_ahead(fail_at_five, range(1000), ahead=10, threads=threads)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match='item 5'):
        next(results)
    assert len(begun) <= 5 + 1 + 10


def test_a_caller_that_stops_leaves_no_thread():
    before = threading.active_count()
    results = map_ahead(abs, range(100), ahead=10, threads=4)
    assert next(results) == 0
    assert threading.active_count() > before
    results.close()
    assert threading.active_count() == before
