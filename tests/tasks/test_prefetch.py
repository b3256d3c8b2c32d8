import threading
import time

import pytest

from mmdlm.tasks.prefetch import cores, prefetch


def test_results_come_in_the_order_of_the_items():
    def slow_first(item):
        time.sleep(0.02 if item % 3 == 0 else 0)
        return item * 10

    found = [(item, future.result()) for item, future in prefetch(slow_first, range(20), 6, 4)]
    assert found == [(item, item * 10) for item in range(20)]


def test_calls_run_side_by_side():
    together = threading.Barrier(3, timeout=10)
    assert [future.result() >= 0 for _, future in prefetch(lambda _: together.wait(), "abc", 3, 3)]


def test_number_of_items_ahead_is_bounded():
    started = []
    ready = prefetch(started.append, range(1000), 5, 2)
    next(ready)
    time.sleep(0.1)
    assert len(started) == 6
    ready.close()
    assert len(started) == 6


def test_an_error_is_raised_at_its_item_and_others_are_unaffected():
    found = []
    for item, future in prefetch(lambda item: 1 // item, [2, 0, 1], 2, 2):
        found.append((item, type(future.exception())))
    assert found == [(2, type(None)), (0, ZeroDivisionError), (1, type(None))]


def stop_after_one(started: list) -> None:
    for _ in prefetch(lambda item: started.append(item) or time.sleep(0.05), range(1000), 50, 2):
        raise KeyboardInterrupt


def test_a_stopped_loop_cancels_what_has_not_started():
    started: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        stop_after_one(started)
    time.sleep(0.2)
    assert len(started) < 10
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("mmdlm-prefetch")]


def test_cores_follow_the_affinity_of_the_process(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3, 5}, raising=False)
    assert cores() == 2
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert cores() == 1
