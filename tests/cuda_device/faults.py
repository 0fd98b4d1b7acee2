"""Faults planted in kernels/runtime.py and kernels/arrays.py, each of which a test has to catch.

    python -m tests.cuda_device.faults [NAME...]   # all, or some; exit status 1 where one is not caught
"""

import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[2]
_TESTS_FAILED = 1  # pytest's exit status


class Fault(NamedTuple):
    """A text of a file that becomes another, and the tests that catch it."""

    file: str
    old: str
    new: str
    tests: str  # -k of pytest
    module: str = "tests/test_cupy.py"


RUNTIME, ARRAYS = "kernels/runtime.py", "kernels/arrays.py"

FAULTS = {
    # Streams, events, waits
    "no stream of its own": Fault(
        RUNTIME, "self._stream.__enter__()", "pass", "keeps_a_stream_of_its_own"),
    "capture on a blocking stream": Fault(
        RUNTIME, "self._cupy.cuda.Stream(non_blocking=True)", "self._cupy.cuda.Stream()",
        "null_stream_captures_too or other_threads_launch"),
    "capture on the stream that computes": Fault(
        RUNTIME, "            with stream:\n                stream.begin_capture()",
        "            if True:\n                stream.begin_capture()", "a_capture_does_nothing"),
    "no wait for the copied data": Fault(
        ARRAYS, "    cupy.cuda.get_current_stream().wait_event(arrived)\n", "", "copies_move_what_was_there"),
    "another stream waits for the copied data": Fault(
        ARRAYS, "get_current_stream().wait_event(arrived)", "Stream(non_blocking=True).wait_event(arrived)",
        "copies_move_what_was_there"),
    "event never recorded": Fault(
        ARRAYS, "    event.record(cupy.cuda.get_current_stream())\n", "", "copies_move_what_was_there"),
    "event before the copy": Fault(
        ARRAYS, "        try:\n            buffer.set(staging)\n"
                "        finally:  # Ctrl-C may come in between, as in read()\n"
                "            arrived = _end_of_copy(staging, buffer)\n",
        "        arrived = _end_of_copy(staging, buffer)\n        buffer.set(staging)\n",
        "copies_move_what_was_there"),
    "copies wait for the null stream": Fault(
        ARRAYS, "cupy.cuda.Stream(non_blocking=True)", "cupy.cuda.Stream()", "does_not_wait_for_steps"),
    "copies on the stream that computes": Fault(
        ARRAYS, "    with _copy_stream():\n", "    if True:\n", "reaches_the_device_while or still_reads"),
    "buffer from the pool of the stream that computes": Fault(
        ARRAYS, "    with _copy_stream():\n        buffer = cupy.empty(destination.shape, destination.dtype)\n",
        "    buffer = cupy.empty(destination.shape, destination.dtype)\n    with _copy_stream():\n", "still_reads"),
    "straight to the destination": Fault(
        ARRAYS, "        buffer = cupy.empty(destination.shape, destination.dtype)\n", "        buffer = destination\n",
        "reaches_the_device_while"),
    "end of a copy on another stream": Fault(
        ARRAYS, "event.record(cupy.cuda.get_current_stream())", "event.record(_copy_stream())", "reading_waits"),
    "no wait for what is read": Fault(ARRAYS, "        arrived.synchronize()\n", "", "reading_waits"),
    "no wait for a large copy": Fault(
        ARRAYS, "    cupy.cuda.get_current_stream().synchronize()\n", "", "large_arrays_are_copied"),
    "copy on the null stream": Fault(
        RUNTIME, "copy_from_device_async(source.data, source.nbytes)",
        "copy_from_device_async(source.data, source.nbytes, self._cupy.cuda.Stream.null)",
        "replayable_function_is_run"),
    # What is kept alive
    "staging memory not kept": Fault(
        ARRAYS, "_end_of_copy(staging, buffer)", "_end_of_copy(buffer)", "not_used_again_before_its_end"),
    "buffer not kept": Fault(
        ARRAYS, "        _end_of_copy(buffer)", "        _end_of_copy()", "reaches_the_device_while"),
    "what is read to not kept": Fault(
        ARRAYS, "arrived = _end_of_copy(content)", "arrived = _end_of_copy()", "not_used_again_before_its_end"),
    "staging memory free at Ctrl-C": Fault(
        ARRAYS, "        finally:  # Ctrl-C may come in between, as in read()\n"
                "            arrived = _end_of_copy(staging, buffer)\n"
                "    cupy.cuda.get_current_stream().wait_event(arrived)\n",
        "        finally:\n            arrived = cupy.cuda.Event(disable_timing=True)\n            arrived.record()\n"
        "    cupy.cuda.get_current_stream().wait_event(arrived)\n    _end_of_copy(staging, buffer)\n",
        "interrupted_copy"),
    "memory kept for ever": Fault(
        ARRAYS, "            _in_flight.popleft()\n", "            break\n", "that_ended_is_given_back"),
    "memory given back too early": Fault(
        ARRAYS, "while _in_flight and _in_flight[0][0].done:", "while _in_flight:", "not_used_again_before_its_end"),
    # Captures
    "graph not launched at its capture": Fault(
        RUNTIME, "        graph.launch()\n\n    return replayed", "            return\n        graph.launch()\n\n"
                                                                  "    return replayed", "replayable_function_is_run"),
    "captured at the first call": Fault(
        RUNTIME, "            function(*arguments)\n            graphs[thread] = None\n            return\n",
        "            graphs[thread] = None\n", "replayable_function_is_run"),
    "one graph for all threads": Fault(
        RUNTIME, "        thread = threading.get_ident()\n", "        thread = 0\n", "from_another_thread"),
    "capture left open": Fault(
        RUNTIME, "                        stream.end_capture()\n                    raise",
        "                        pass\n                    raise", "error_of_the_function_ends_the_capture"),
    "wait inside a capture": Fault(
        RUNTIME, "                    function()\n                except BaseException",
        "                    function()\n                    self._cupy.cuda.runtime.deviceSynchronize()\n"
        "                except BaseException", "a_capture_does_nothing"),
    "array made in a capture": Fault(
        RUNTIME, "        self._thread.captures = True", "        self._thread.captures = False", "made_in_a_capture"),
    "our error renamed": Fault(
        RUNTIME, "        except (cuda.runtime.CUDARuntimeError, cuda.driver.CUDADriverError) as error:\n"
                 "            if error.status not in _CAPTURE_ERRORS:  # such as the failure of a launch before\n"
                 "                raise\n",
        "        except RuntimeError as error:\n", "stays_what_it_is"),
    "failed launch blamed on the capture": Fault(
        RUNTIME, "            if error.status not in _CAPTURE_ERRORS:", "            if False:",
        "during_a_capture_is_not_blamed"),
    # Launches
    "scalar of the wrong width": Fault(
        RUNTIME, "function(grid, block, tuple(args), shared_mem=shared_bytes)\n            return",
        "function(grid, block, tuple(float(a) if isinstance(a, np.float32) else a for a in args),\n"
        "                     shared_mem=shared_bytes)\n            return", "width_of_the_parameter"),
    "cooperative launch as any other": Fault(
        RUNTIME, "enable_cooperative_groups=cooperative)", "enable_cooperative_groups=False)",
        "limited_by_the_occupancy or blocks_of_a_cooperative"),
    "grid shrunk with a warning": Fault(
        RUNTIME, '            warnings.filterwarnings("error", "The grid size will be reduced")', "            pass  #",
        "limited_by_the_occupancy"),
    "occupancy of one multiprocessor": Fault(
        RUNTIME, "per_multiprocessor * self.gpu.multiprocessors", "per_multiprocessor", "limited_by_the_occupancy"),
    "shared memory not asked for": Fault(
        RUNTIME, "        if total > SHARED_BYTES_WITHOUT_ASKING:", "        if False:", "asked_for_and_never_lowered"),
    "shared memory asked for without the static": Fault(
        RUNTIME, "        if total > SHARED_BYTES_WITHOUT_ASKING:",
        "        if shared_bytes > SHARED_BYTES_WITHOUT_ASKING:",
        "asked_for_and_never_lowered"),
    "shared memory lowered": Fault(
        RUNTIME, "max(shared_bytes, function.max_dynamic_shared_size_bytes)", "shared_bytes",
        "asked_for_and_never_lowered"),
    "limit of shared memory without the static": Fault(
        RUNTIME, "        if total > limit:", "        if shared_bytes > limit:", "asked_for_and_never_lowered"),
    "zeros not written": Fault(
        RUNTIME, "return self._cupy.zeros(shape, dtype)", "return self._cupy.empty(shape, dtype)", "arrays_are_made"),
}


def caught(fault: Fault) -> bool:
    """Whether the fault's tests fail in a copy of the project that has it.

    Raises: ValueError where the text is not there, or no longer once.
    """
    text = (ROOT / fault.file).read_text()
    if text.count(fault.old) != 1:
        raise ValueError(f"{fault.file} has {text.count(fault.old)} times: {fault.old}")
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder, "copy")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "__pycache__", "results", "runs", ".*cache"))
        (copy / fault.file).write_text(text.replace(fault.old, fault.new))
        done = subprocess.run([sys.executable, "-m", "pytest", "--cuda-device", "-q", "-x", "-p", "no:cacheprovider",
                               "-k", fault.tests, fault.module], cwd=copy, check=False, capture_output=True, text=True)
    if done.returncode not in (0, _TESTS_FAILED):
        raise ValueError(f"pytest ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.returncode == _TESTS_FAILED


def main(names: list[str]) -> int:
    missed = 0
    for name in names or FAULTS:
        found = caught(FAULTS[name])
        missed += not found
        print(f"{'caught' if found else 'MISSED':8}{name}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
