"""Kernels that are written in PTX, and a launch of one of them."""

import ctypes

from tests import host_cuda, host_ptx

__all__ = ["HEAD", "kernel", "run"]

HEAD = """
.version 8.0
.target sm_90
.address_size 64
"""


def kernel(lines: str, shared: str = "", name: str = "kernel") -> str:
    """A kernel on two arrays, whose addresses are in %rd0 and %rd1; %r0 is 1."""
    return f"""
.visible .entry {name}(.param .u64 p0, .param .u64 p1)
{{
.reg .pred %p<4>;
.reg .b32 %r<12>;
.reg .b64 %rd<12>;
{shared}
ld.param.u64 %rd0, [p0];
ld.param.u64 %rd1, [p1];
mov.u32 %r0, 1;
{lines}
ret;
}}"""


def run(text: str, *args, worst: bool = False, threads: int = 32, blocks: int = 1, shared_bytes: int = 0,
        architecture: str = "sm_90", name: str = "kernel") -> None:
    """Runs a kernel of a PTX text."""
    built = host_ptx.build_ptx(HEAD + text, architecture, worst)
    grid, block = (ctypes.c_uint32 * 3)(blocks, 1, 1), (ctypes.c_uint32 * 3)(threads, 1, 1)
    request = host_cuda.Request(name.encode(), grid, block, shared_bytes)
    host_ptx.run(built, request, list(args))
