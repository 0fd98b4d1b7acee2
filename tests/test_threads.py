"""Threads that use the kernels at the same time do not disturb each other."""

import threading

import numpy as np

from char_gru.kernels import runtime
from char_gru.kernels.scratch import scratch
from tests.helpers.texts import text_case, written_on_device


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
