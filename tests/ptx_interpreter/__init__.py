# SPDX-License-Identifier: Apache-2.0
"""An interpreter of the PTX that nvcc makes of our CUDA kernels: their test on any machine.

    module = parse(compile.compile_ptx(source, arch="sm_80"))
    launch(module.find("row_sqnorm"), [x, out, rows, columns], grid, block)

It executes what nvcc emitted, inline assembler included, and computes what the hardware would. Each
access is checked besides: bounds, alignment, memory that nobody has written, races (shared memory
between barriers of the block or the warp, global memory between all threads of a launch), cp.async
data that is touched before it has been waited for, barriers and warp-wide instructions that not all
threads reach. Whether a race is found does not depend on the order of execution. An opcode,
modifier, operand or register width that the interpreter does not know is an error, never a guess.

What it says nothing about:

* ptxas: registers, occupancy, bank conflicts, time; and code that runs on the host.
* Bits of mma results. Products and sums are exact to 2^-53 and rounded once; the hardware adds in
  an order and width of its own. Unrounded tf32 operands are cut, as the hardware is known to do.
* Approximate functions (ex2, lg2, sin, rsqrt, .approx): correctly rounded here, not there. NaN
  payloads.
* Memory order beyond barriers: fences are needed in ``shared_buffers`` between a write and another
  block's read, but what else an unlucky order could do there is not explored. Shuffles and votes
  order nothing. bar.warp.sync of a part of a warp orders nothing either, which is too strict.
* Spinning, grid-wide barriers, named barriers, mbarrier, wgmma, TMA, clusters, textures, clocks.
* Functions that are called and memory that is .local: refused, our kernels have neither.

``driver`` launches the same kernels with the same arguments on a GPU, and ``conformance`` compares.
"""

from .arguments import Struct, Uninitialised
from .errors import PtxError
from .launch import launch
from .parser import Module, parse
from .syntax import Kernel

__all__ = ["Kernel", "Module", "PtxError", "Struct", "Uninitialised", "launch", "parse"]
