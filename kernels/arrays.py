"""Arrays of the device, and copies between them and the host that training need not wait for."""

import collections
import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, SupportsFloat

import numpy as np

from char_gru.kernels import runtime

PINNED_BYTES = 1 << 20
"""Larger arrays than a step's data are copied without pinned memory, which CuPy never gives back."""

_in_flight: collections.deque = collections.deque()  # (event, memory) of copies that may not have ended
_in_flight_changes = threading.Lock()


def empty(shape: tuple[int, ...], dtype=np.float32) -> Any:
    """An array for parameters, states and scalars."""
    return runtime.empty(shape, dtype)


def empty_activations(shape: tuple[int, ...], dtype=np.float32) -> Any:
    """An array for sequences and tables; one memory order serves all kernels."""
    return runtime.empty(shape, dtype)


def copy_in(destination, source) -> None:
    """Copy an array of the host to one of the device, converting its dtype; the source may change at once.

    Raises: ValueError for a source of another shape (nothing is broadcast) and for a destination with strides.
    """
    if destination.shape != np.shape(source) or not destination.flags.c_contiguous:
        raise ValueError(f"destination: expected a C-contiguous array of the source's shape {np.shape(source)}, "
                         f"got {destination.shape} with strides {destination.strides}")
    if isinstance(destination, np.ndarray):
        destination[...] = source
        return
    if destination.nbytes > PINNED_BYTES:
        _set_large(destination, np.ascontiguousarray(source, destination.dtype))
        return
    _prefetch(destination, source)


def copy(destination, source) -> None:
    """Copy between arrays of the device, of equal dtype and shape."""
    for name, array in (("destination", destination), ("source", source)):
        runtime.check(name, array, destination.dtype, destination.shape)
    runtime.current_executor().copy(destination, source)


def to_host(array) -> np.ndarray:
    """A contiguous NumPy copy of an array of the device."""
    return runtime.to_host(array)


def read(array) -> Callable[[], np.ndarray]:
    """The content of an array as it is now, given by a call at any later time, which alone waits for it."""
    if isinstance(array, np.ndarray) or array.nbytes > PINNED_BYTES:
        content = to_host(array)
        return lambda: content
    content = _pinned(array)
    try:
        array.get(out=content, blocking=False)
    finally:  # Ctrl-C may come in between, and the memory that is copied to must not be freed
        arrived = _end_of_copy(content)

    def arrived_content() -> np.ndarray:
        arrived.synchronize()
        return content

    return arrived_content


def read_scalar(array) -> SupportsFloat:
    """The value of a one-element array as it is now, for `float()` at any later time, which alone waits for it."""
    return _Scalar(read(array))


def peak_memory_mib() -> float:
    """The most memory that arrays of the device have taken so far, in MiB."""
    return runtime.peak_memory_mib()


class _Scalar(NamedTuple):
    """A number on its way from the device."""

    content: Callable[[], np.ndarray]

    def __float__(self) -> float:
        return self.content().item()


def _prefetch(destination, source) -> None:
    """Copy through pinned memory to a buffer of the device, on a stream of its own, and from there, on the stream that
    computes, to the destination: the slow way is gone while the step before is still computed."""
    import cupy

    staging = _pinned(destination)
    staging[...] = source
    with _copy_stream():
        buffer = cupy.empty(destination.shape, destination.dtype)
        try:
            buffer.set(staging)
        finally:  # Ctrl-C may come in between, as in read()
            arrived = _end_of_copy(staging, buffer)
    cupy.cuda.get_current_stream().wait_event(arrived)
    try:
        destination.data.copy_from_device_async(buffer.data, buffer.nbytes)
    finally:
        _end_of_copy(buffer)


@functools.cache
def _copy_stream() -> Any:
    import cupy

    return cupy.cuda.Stream(non_blocking=True)  # else it would wait for the null stream, on which steps may run


def _set_large(destination, source: np.ndarray) -> None:
    """Copy and wait, since memory that is not pinned could be freed too early."""
    import cupy

    destination.set(source)
    cupy.cuda.get_current_stream().synchronize()


def _pinned(array) -> np.ndarray:
    """Memory of the host for an asynchronous copy of a CuPy array."""
    import cupyx

    return cupyx.empty_pinned(array.shape, array.dtype)


def _end_of_copy(*memory: Any) -> Any:
    """The event that follows the copy just started; until then, `memory` does not go back to CuPy's pools."""
    import cupy

    event = cupy.cuda.Event(disable_timing=True)
    event.record(cupy.cuda.get_current_stream())
    with _in_flight_changes:
        while _in_flight and _in_flight[0][0].done:
            _in_flight.popleft()
        _in_flight.append((event, memory))
    return event
