"""Which op set computes."""

from __future__ import annotations

import importlib.util

from rnn import reference
from rnn.config import UserError


def op_set(device: str = "auto", precision: str = "auto"):
    """The op set for a `--device` and a `--precision`.

    Raises: UserError if the device is not there, naming what to install, or cannot compute in that precision.
    """
    if device == "cuda":
        if importlib.util.find_spec("cupy") is None:
            raise UserError("--device cuda needs CuPy; install it with pip install 'char-gru[cuda13]' "
                            "(or [cuda12], for a driver of CUDA 12), or use --device cpu")
        import cupy

        if not cupy.is_available():
            raise UserError("--device cuda finds no NVIDIA GPU with a working driver; use --device cpu")
        raise UserError("--device cuda is not in this version; use --device cpu")
    if precision not in ("auto", "fp32"):
        raise UserError(f"--precision {precision} needs an NVIDIA GPU; the CPU computes in fp32")
    return reference
