"""Threads that use the kernels at the same time do not disturb each other."""

import threading

import numpy as np

from char_gru.kernels import runtime
from char_gru.kernels.scratch import scratch, unkept
from tests.helpers.recurrence import assert_equal_bits, on_device
from tests.helpers.texts import text_case, written_on_device
from tests.test_gru_persistent import Cut


def in_another_thread(function):
    """The result of the function, called in another thread."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    (result,) = results
    return result


def test_a_thread_has_its_own_scratch_and_keeps_it(executor):
    def own():
        return scratch("test", (3,), np.int32)

    assert own() is own()
    assert in_another_thread(lambda: own() is own())
    ours, theirs = own(), in_another_thread(own)
    assert theirs is not ours and theirs.shape == ours.shape


def test_scratch_that_is_not_kept_is_made_for_each_call_of_its_thread(executor):
    def own():
        return scratch("test", (3,), np.int32, zeros=True)

    kept = own()
    with unkept():
        with unkept():
            first, second = own(), own()
        assert len({id(array) for array in (kept, first, second, own())}) == 4
        runtime.current_executor().copy(first, runtime.to_device(np.ones(3, np.int32)))
        assert not runtime.to_host(own()).any() and in_another_thread(lambda: own() is own())
    assert own() is kept


def test_windows_with_scratch_that_is_not_kept_have_the_same_bits(executor):
    size = Cut(T=3, B=17, H=6, V=3, M=2, groups=2, rows=16, units=4, units_back=6, splits=2)
    expected = on_device(size.case, "fp32", size.plans("fp32"))
    with unkept():
        for _ in range(2):
            assert_equal_bits(on_device(size.case, "fp32", size.plans("fp32")), expected)


def test_texts_written_at_once_are_those_written_one_by_one(executor, monkeypatch):
    """Another thread writes a whole text with another model of the same sizes, before each launch of this thread's."""
    ours, theirs = (text_case(2, H=9, V=11, layers=2, scale=scale) for scale in (0.7, 0.5))
    expected = written_on_device(ours, 4)
    their_text = written_on_device(theirs, 4)
    this_thread, launch = threading.get_ident(), runtime.launch

    def interrupted(*arguments, **options):
        if threading.get_ident() == this_thread:
            for array, right in zip(in_another_thread(lambda: written_on_device(theirs, 4)), their_text):
                np.testing.assert_array_equal(array, right)
        launch(*arguments, **options)

    monkeypatch.setattr(runtime, "launch", interrupted)
    for array, right in zip(written_on_device(ours, 4), expected):
        np.testing.assert_array_equal(array, right)
