"""Runs a Python program with the device: ``python tests/cuda_device [OPTION...] train.py --device cuda ...``.

    --gpu NAME      h100 (default), t4, ..., or small
    --memory MIB    of the device
    --fail KERNEL:N the N-th launch of the kernel fails ("any": of all kernels)
    --ptx           kernels run from the PTX that NVRTC makes of them for this GPU, not from their source
    --worst         with --ptx: approximate instructions and sums in mma err as much as hardware may
    --at-once       work is done when it is queued, not when it is waited for
    --trace         what is queued and done, on stderr
    -c CODE or -m MODULE instead of a program's path, as Python has it
"""

import argparse
import pathlib
import runpy
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[2])

from tests import cuda_device  # the path first


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tests/cuda_device", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--memory", type=int, default=cuda_device.MEMORY_BYTES >> 20)
    parser.add_argument("--fail", default="any:0")
    parser.add_argument("--ptx", action="store_true")
    parser.add_argument("--worst", action="store_true")
    parser.add_argument("--at-once", action="store_true")
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("-c", dest="code", action="store_true")
    parser.add_argument("-m", dest="module", action="store_true")
    parser.add_argument("program")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    if options.worst and not options.ptx:
        parser.error("--worst says how kernels run from their PTX: give --ptx too")
    device = cuda_device.install(options.gpu, options.memory << 20, options.at_once, options.trace, options.ptx,
                                 options.worst)
    kernel, _, n = options.fail.rpartition(":")
    device.fail_launch(kernel, int(n))
    try:
        _run(options)
    finally:
        if options.ptx:
            print(f"cuda_device: {device.summary()}", file=sys.stderr)


def _run(options: argparse.Namespace) -> None:
    if options.code:
        sys.argv = ["-c", *options.arguments]
        exec(compile(options.program, "<code>", "exec"), {"__name__": "__main__"})  # noqa: S102
    elif options.module:
        sys.argv = [options.program, *options.arguments]
        runpy.run_module(options.program, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [options.program, *options.arguments]
        runpy.run_path(options.program, run_name="__main__")


if __name__ == "__main__":
    main()
