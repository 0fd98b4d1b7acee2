"""Device memory through which an op hands partial results from one of its launches to the next."""

import threading
import weakref
from typing import Any

import numpy as np

from char_gru.kernels import runtime

_arrays: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def scratch(op: str, shape: tuple[int, ...], dtype: Any = np.float32, zeros: bool = False) -> Any:
    """The array of this op, shape and thread: made at the first call, alive and in place as long as the executor in
    use, so that a captured CUDA graph may go on using it. Its content is undefined, or zeros when it is made.

    Launches that share the array have to follow one another, on one stream, as the launches of a thread do. So a graph
    that uses it is for the thread that captured it. A thread that starts after another's end may take over its arrays
    with its number: there are as many sets of arrays as threads that ever ran at once.
    """
    arrays = _arrays.setdefault(runtime.current_executor(), {})
    key = threading.get_ident(), op, shape, np.dtype(dtype)
    if key not in arrays:
        arrays[key] = (runtime.zeros if zeros else runtime.empty)(shape, dtype)
    return arrays[key]
