# SPDX-License-Identifier: Apache-2.0
"""Builds peak.cpp in a temporary folder and measures the machine's float32 peak with it."""

import ctypes
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

ISA = ("generic", "avx2", "avx512")
SOURCE = Path(__file__).with_name("peak.cpp")


@dataclass(frozen=True)
class Peak:
    """Measured peak.

    Attributes:
        isa: ``"generic"``, ``"avx2"`` or ``"avx512"``.
        threads: Threads that ran at once.
        gflops: Billions of floating-point operations per second, all threads together.
    """

    isa: str
    threads: int
    gflops: float


class PeakMeter:
    """Measures the rate of register-only multiply-adds, as often as asked."""

    def __init__(self) -> None:
        """Compiles the probe with the system's C++ compiler.

        Raises:
            OSError: No compiler, or it fails; the text says which.
        """
        compiler = shutil.which(os.environ.get("CXX", "c++"))
        if compiler is None:
            raise OSError("no C++ compiler (c++, or $CXX) to build the peak probe")
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "peak.so"
            command = [compiler, "-std=c++17", "-O3", "-ffp-contract=fast", "-shared", "-fPIC"]
            command += ["-pthread", str(SOURCE), "-o", str(library)]
            built = subprocess.run(command, capture_output=True, text=True)
            if built.returncode:
                raise OSError(f"the peak probe does not compile: {built.stderr.strip()[-400:]}")
            # The mapping stays valid after the folder is gone.
            self._library = ctypes.CDLL(str(library))
        self._library.flashmetric_peak.restype = ctypes.c_double
        self._library.flashmetric_peak.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_double)
        self.isa = ISA[self._library.flashmetric_peak_isa()]

    def measure(self, threads: int, seconds: float = 0.1, isa: str | None = None) -> Peak:
        """Runs the probe.

        Args:
            threads: Threads at once.
            seconds: CPU time of each thread; the best burst counts.
            isa: Instruction set, by default the widest one.

        Returns:
            The peak.
        """
        isa = isa or self.isa
        rate = self._library.flashmetric_peak(ISA.index(isa), threads, seconds)
        return Peak(isa, threads, rate / 1e9)
