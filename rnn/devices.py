"""Which op set computes: the CPU's (`char_gru.rnn.cpu`) or the GPU's (`char_gru.kernels`)."""

from __future__ import annotations

from char_gru import kernels
from char_gru.kernels.runtime import DeviceError
from char_gru.rnn import cpu
from char_gru.rnn.config import UserError


def op_set(device: str = "auto", precision: str = "auto"):
    """The op set for a `--device` and a `--precision`; `auto` takes an NVIDIA GPU if CuPy finds one.

    Raises: UserError if the machine lacks the device (the message names what to install), or if the device cannot
    compute in this precision.
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
    return cpu
