"""Which op set computes: the CPU's (`rnn.reference`) or the GPU's (`kernels`)."""

from __future__ import annotations

from char_gru import kernels
from char_gru.kernels.runtime import DeviceError
from char_gru.rnn import reference
from char_gru.rnn.config import UserError


def op_set(device: str = "auto", precision: str = "auto"):
    """The op set for a `--device` and a `--precision`; `auto` takes an NVIDIA GPU if CuPy finds one.

    Raises: UserError if the device is not there, naming what to install, or cannot compute in that precision.
    """
    if device != "cpu":
        try:
            return kernels.op_set(precision)
        except DeviceError as error:
            if device == "cuda":
                raise UserError(f"--device cuda: {error}; or use --device cpu") from None
        except ValueError as error:
            raise UserError(f"--{error}; use another --precision") from None
    if precision not in ("auto", "fp32"):
        raise UserError(f"--precision {precision} needs an NVIDIA GPU; the CPU computes in fp32")
    return reference
