"""Device memory through which an op hands partial results from one of its launches to the next."""

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np

from char_gru.kernels import runtime

_arrays: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_thread = threading.local()  # unkept: whether this thread's arrays are its callers' alone


def scratch(op: str, shape: tuple[int, ...], dtype: Any = np.float32, zeros: bool = False) -> Any:
    """The array for an op, shape, dtype and thread: made at the first call and kept, at one address, as long as the
    executor, so that a captured CUDA graph may go on using it. zeros: filled with zeros when it is made; else its
    content is undefined. Inside `unkept`, each call makes an array that is not kept.

    Launches that share the array have to follow one another on one stream, as the launches of one thread do. So only
    the thread that captured a graph may replay it. A new thread may get the number of a thread that has ended, and its
    arrays with it: there are at most as many sets of arrays as threads that ever ran at once.
    """
    make = runtime.zeros if zeros else runtime.empty
    if getattr(_thread, "unkept", False):
        return make(shape, dtype)
    arrays = _arrays.setdefault(runtime.current_executor(), {})
    key = threading.get_ident(), op, shape, np.dtype(dtype)
    if key not in arrays:
        arrays[key] = make(shape, dtype)
    return arrays[key]


@contextlib.contextmanager
def unkept() -> Iterator[None]:
    """A block in which this thread's scratch arrays are given back as soon as an op has made its launches. For a caller
    that launches on streams and captures graphs of its own, and whose allocator gives memory that was given back to
    later work of the same stream only."""
    before, _thread.unkept = getattr(_thread, "unkept", False), True
    try:
        yield
    finally:
        _thread.unkept = before
