# SPDX-License-Identifier: Apache-2.0
"""Everything that is asked of the GPU itself: clocks, memory, graphs, profiles, peaks."""

import gc
import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.gpu.cases import GpuCase

Call = Callable[[], object]
FALLBACK_L2_BYTES = 64 * 2**20
PEAK_SIZE = 8192
PEAK_CALLS = 10
REPLAYS = 20
SMI_FIELDS = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"


class CudaDevice:
    """The current CUDA device; ``bench.gpu.fake`` has a double of it for machines without one."""

    dry_run = False
    compile_backend = "inductor"

    def __init__(self) -> None:
        """Takes the current device and a buffer of twice its second-level cache."""
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.properties = torch.cuda.get_device_properties(self.device)
        self.l2_bytes = int(getattr(self.properties, "L2_cache_size", 0)) or FALLBACK_L2_BYTES
        self._flush = torch.empty(2 * self.l2_bytes, dtype=torch.uint8, device=self.device)

    def facts(self) -> dict[str, str]:
        """What the report says about the device."""
        major, minor = torch.cuda.get_device_capability(self.device)
        facts = {
            "gpu": self.properties.name,
            "compute capability": f"{major}.{minor}",
            "multiprocessors": str(self.properties.multi_processor_count),
            "memory": f"{self.properties.total_memory / 2**30:.1f} GiB",
            "L2 cache": f"{self.l2_bytes / 2**20:.0f} MiB",
            "CUDA of torch": str(torch.version.cuda),
        }
        query = ["nvidia-smi", f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return facts
        values = done.stdout.strip().splitlines()
        if done.returncode == 0 and values:
            pairs = zip(SMI_FIELDS.split(","), values[0].split(","), strict=False)
            facts["nvidia-smi"] = ", ".join(f"{key} {value.strip()}" for key, value in pairs)
        return facts

    def shrink(self, case: GpuCase) -> GpuCase:
        """The size at which a case is really run: its own."""
        return case

    def free_bytes(self) -> int:
        """Memory that a call could use: what the driver has and what the allocator keeps."""
        free, _ = torch.cuda.mem_get_info(self.device)
        held = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return int(free + held)

    def release(self) -> None:
        """Hands cached memory back to the driver."""
        gc.collect()
        torch.cuda.empty_cache()

    def synchronize(self) -> None:
        """Waits for the device; raises what an earlier kernel did wrong."""
        torch.cuda.synchronize(self.device)

    def time_calls(self, call: Call, reset: Call, count: int) -> list[float]:
        """Times single calls by events on the stream, with a cold second-level cache.

        The write that flushes the cache runs while Python prepares the call, so that a call of
        few launches is not charged with the way of its first launch to the device.

        Args:
            call: What is timed.
            reset: Runs before each call, untimed.
            count: Number of timed calls; one more comes first, untimed, if there are several.

        Returns:
            Seconds of each call.
        """
        events = []
        gc.collect()
        gc.disable()
        try:
            for _ in range(count + (count > 1)):
                reset()
                self._flush.zero_()
                start = torch.cuda.Event(enable_timing=True)
                end = torch.cuda.Event(enable_timing=True)
                start.record()
                call()
                end.record()
                events.append((start, end))
            self.synchronize()
        finally:
            gc.enable()
        return [start.elapsed_time(end) / 1e3 for start, end in events[-count:]]

    def extra_memory(self, call: Call) -> int:
        """Bytes by which PyTorch's allocations grew at the peak of a call, its results included."""
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    def replay(self, call: Call, reset: Call, count: int) -> list[float]:
        """Times a call as a captured graph: device time, without the host that launches it.

        Args:
            call: What is captured; it must not wait for the device.
            reset: Runs before the capture, so that the graph owns its results.
            count: Number of figures; each is the mean of some replays.

        Returns:
            Seconds of one replay.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                reset()
                call()
        torch.cuda.current_stream().wait_stream(side)
        self.synchronize()
        reset()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        for _ in range(REPLAYS):
            graph.replay()
        seconds = []
        for _ in range(count):
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(REPLAYS):
                graph.replay()
            end.record()
            self.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3 / REPLAYS)
        reset()
        return seconds

    def trace(self, call: Call, reset: Call, count: int) -> dict[str, Any]:
        """Profiles calls and returns the trace, in the format of Chrome's trace viewer."""
        from torch.profiler import ProfilerActivity, profile

        def run() -> Any:
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                for _ in range(count):
                    reset()
                    call()
                self.synchronize()
            return profiler

        run()  # the first profile of a process may miss the kernels of its beginning
        profiler = run()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            return json.loads(path.read_text())

    def peaks(self) -> dict[str, float]:
        """Measures what the machine can do, in the very run whose figures are held against it.

        Returns:
            FLOP/s of a large product by precision, and bytes/s of a large copy as ``"copy"``.
        """
        rates = {}
        for name, dtype, matmul in (
            ("bfloat16", torch.bfloat16, "highest"),
            ("float16", torch.float16, "highest"),
            ("float32", torch.float32, "highest"),
            ("float32 high", torch.float32, "high"),
        ):
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision(matmul)
            try:
                # Random numbers: on zeros the chip draws less power and runs faster.
                a = torch.randn(PEAK_SIZE, PEAK_SIZE, device=self.device).to(dtype)
                b = torch.randn(PEAK_SIZE, PEAK_SIZE, device=self.device).to(dtype)
                out = torch.empty(PEAK_SIZE, PEAK_SIZE, device=self.device, dtype=dtype)
                seconds = self._median(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
            finally:
                torch.set_float32_matmul_precision(before)
            rates[name] = 2.0 * PEAK_SIZE**3 / seconds
        source = torch.empty(2**30, dtype=torch.uint8, device=self.device).random_()
        target = torch.empty_like(source)
        rates["copy"] = 2 * source.numel() / self._median(lambda: target.copy_(source))
        return rates

    def _median(self, call: Call) -> float:
        for _ in range(3):
            call()
        return sorted(self.time_calls(call, lambda: None, PEAK_CALLS))[PEAK_CALLS // 2]
