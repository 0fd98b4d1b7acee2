"""Which op set computes: the CPU's (`char_gru.rnn.cpu`) or the GPU's (`char_gru.kernels`)."""

from __future__ import annotations

import sys

from char_gru import kernels
from char_gru.kernels.runtime import ARCHITECTURES, DeviceError, current_executor
from char_gru.rnn import cpu
from char_gru.rnn.config import UserError
from char_gru.rnn.terminal import one_line


def op_set(device: str = "auto", precision: str = "auto"):
    """The op set for a `--device` and a `--precision`; `auto` takes an NVIDIA GPU if CuPy finds one, and says on stderr
    if CuPy is there and cannot be imported.

    Raises: UserError for another device or precision, if the machine lacks the device (the message names what to
    install), or if the device cannot compute in this precision.
    """
    if device not in ("auto", "cuda", "cpu"):
        raise UserError(f"--device is {device!r:.50}, but must be auto, cuda or cpu")
    failure = None if device == "cpu" else _import_failure()
    if failure is not None:
        if device == "cuda":
            raise UserError(f"--device cuda: CuPy cannot be imported ({failure}); mend that, or use --device cpu")
        print(one_line(f"no GPU is used, since CuPy cannot be imported ({failure}); --device cpu does not try"),
              file=sys.stderr)
    elif device != "cpu":
        try:
            return kernels.op_set(precision)
        except DeviceError as error:
            if device == "cuda":
                raise UserError(f"--device cuda: {error}; or use --device cpu") from None
        except ValueError as error:
            raise UserError(f"--{error}; use another --precision") from None
    if precision not in ("auto", "fp32", "tf32", "bf16"):
        raise UserError(f"--precision is {precision!r:.50}, but must be auto, fp32, tf32 or bf16")
    if precision not in ("auto", "fp32"):
        raise UserError(f"--precision {precision} needs an NVIDIA GPU; the CPU computes in fp32")
    return cpu


def _import_failure() -> Exception | None:
    """Why CuPy cannot be imported, be it a home folder that it cannot write; None if it can, or is not installed."""
    try:
        import cupy  # noqa: F401
    except Exception as error:  # noqa: BLE001 whatever it is, no GPU can be used
        return None if isinstance(error, ImportError) and error.name == "cupy" else error
    return None


def untested_gpu(ops) -> str | None:
    """What to say before work on an op set of a GPU that is newer than the kernels, or otherwise none of those that
    they are compiled for in the tests; None on every other device."""
    if ops is cpu:
        return None
    gpu = current_executor().gpu
    if f"sm_{gpu.capability}" in ARCHITECTURES:
        return None
    return (f"{gpu.name} has compute capability {gpu.capability / 10}, for which no kernel has been compiled in the "
            "tests: let `python -m char_gru.kernels --check` compare its results with the reference first")
