"""A process that runs one system: `python -m tests.speed.worker`.

It reads one JSON request per line from stdin and writes one line of JSON for each. Systems in
separate processes share neither the allocator nor its cached memory.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Worker:
    """Client: starts such a process and sends requests.

    Args:
        name: name in errors.
        threads: number of torch threads of the process.
    """

    def __init__(self, name: str, threads: int) -> None:
        self.name = name
        root = str(Path(__file__).parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        count = {key: str(threads) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        self.errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.speed.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=os.environ | count | {"PYTHONPATH": os.pathsep.join(paths)},
        )

    def request(self, **fields: Any) -> dict[str, Any]:
        """Sends a request and returns the result.

        Raises:
            RuntimeError: the request failed, or the process ended.
        """
        try:
            self.process.stdin.write(json.dumps(fields) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.errors.seek(0)
            output = self.errors.read().strip().splitlines()[-1:] or ["no output"]
            status = self.process.wait()
            raise RuntimeError(
                f"the process of {self.name} ended with status {status}: {output[0]}; "
                "if it was killed, memory was insufficient: use a smaller shape"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.errors.close()


def measured(run: Callable[[], Any], device: torch.device) -> tuple[Any, dict[str, float | None]]:
    """Runs a function and measures its cost.

    Args:
        run: called once.
        device: synchronized before and after.
    Returns:
        the result, and seconds (wall), cpu_seconds (all threads), peak_extra_mb (peak memory of the
        GPU or the process above the memory before; None if the system does not report it), and on
        a GPU reserved_mb.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
    else:
        before = _resident(reset=True)
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    cost = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    if device.type == "cuda":
        cost["peak_extra_mb"] = (torch.cuda.max_memory_allocated(device) - before) / 1e6
        cost["reserved_mb"] = torch.cuda.max_memory_reserved(device) / 1e6
    else:
        peak = _resident(reset=False)
        cost["peak_extra_mb"] = None if None in (before, peak) else max(0.0, (peak - before) / 1e6)
    return result, cost


def _resident(reset: bool) -> int | None:
    """Resident memory of this process in bytes, or its peak since the last reset.

    None where /proc (Linux) is not available.
    """
    try:
        if reset:
            _trim()
            CLEAR.write_text("5")  # proc(5): resets the peak
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    key = "VmRSS:" if reset else "VmHWM:"
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(key)), None)


def _trim() -> None:
    """Returns freed memory to the system, so that a run cannot reuse it unnoticed."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


class Server:
    """Processes requests and keeps the last model.

    Records contain the time of the set-up.
    """

    def __init__(self) -> None:
        self.kept: tuple[Any, Any] = (None, None)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Processes one request; its "do" names the method."""
        do = request.pop("do")
        known = (self.decode, self.ask, self.encode, self.train, self.rates)
        return {method.__name__: method for method in known}[do](**request)

    def decode(
        self,
        system: str,
        shape: str,
        mode: str,
        device: str,
        dtype: str,
        seed: int,
        compiled: bool = False,
    ) -> dict[str, Any]:
        """One timed decode."""
        from tests.speed.shapes import find, synthetic
        from tests.speed.systems import OURS, runner

        what = find([shape])[0]
        key = (what.transformer, seed, device, dtype, compiled)
        begin = time.perf_counter()
        if self.kept[0] != key:
            self.kept = (None, None)  # free the old one first
            model = synthetic(what.transformer, seed, device, getattr(torch, dtype))
            if compiled and system == OURS:
                model.compile()
            self.kept = (key, model)
        run = runner(system, self.kept[1], what, mode, seed)
        setup = time.perf_counter() - begin
        return _run(run, self.kept[1].device, setup)

    def ask(
        self,
        system: str,
        shape: str,
        mode: str,
        device: str,
        dtype: str,
        seed: int,
        compiled: bool = False,
    ) -> dict[str, Any]:
        """Timed answers to the questions about one image."""
        import mmdlm
        from tests.speed.answer_shapes import find, write
        from tests.speed.answer_systems import runner

        what = find([shape])[0]
        key, begin = (system, shape, mode, seed, device, dtype), time.perf_counter()
        if self.kept[0] != key:
            self.kept = (None, None)
            kept = tempfile.TemporaryDirectory()
            folder = write(what, Path(kept.name), seed)
            model = mmdlm.load(folder, device=device, dtype=dtype)
            self.kept = (key, (kept, model.device, runner(system, model, folder, what, mode)))
        _, place, run = self.kept[1]
        return _run(run, place, time.perf_counter() - begin)

    def encode(self, shape: str, device: str, dtype: str, seed: int) -> dict[str, Any]:
        """One timed forward of an encoder."""
        from tests.speed.encoder_shapes import ENCODERS

        key, begin = (shape, seed, device, dtype), time.perf_counter()
        if self.kept[0] != key:
            self.kept = (None, None)
            self.kept = (key, ENCODERS[shape].build(seed, device, getattr(torch, dtype)))
        setup = time.perf_counter() - begin
        tokens, cost = measured(self.kept[1], torch.device(device))
        return {**cost, "setup_s": setup, "new_tokens": tokens}

    def train(self, system: str, shape: str, device: str, dtype: str, seed: int) -> dict[str, Any]:
        """One timed training step, after those before."""
        from tests.speed.shapes import synthetic
        from tests.speed.train_shapes import find, trainer

        what = find([shape])[0]
        key, begin = (system, shape, seed, device, dtype), time.perf_counter()
        if self.kept[0] != key:
            self.kept = (None, None)
            model = synthetic(what.transformer, seed, device, getattr(torch, dtype))
            self.kept = (key, trainer(system, model, what, seed))
        setup = time.perf_counter() - begin
        step, exact = self.kept[1]
        wanted = None if exact is None else exact()
        (loss, parts), cost = measured(step, torch.device(device))
        loss = loss if wanted is None else wanted
        return {**cost, "setup_s": setup, "loss": loss, "parts": parts}

    def rates(self, device: str, dtype: str) -> dict[str, Any]:
        """Rates of the device."""
        from tests.speed.roofline import rates

        return vars(rates(device, getattr(torch, dtype)))


def _run(run: Callable[[], Any], device: torch.device, setup: float) -> dict[str, Any]:
    """One timed run of a system, with its tokens."""
    found, cost = measured(run, device)
    digest = hashlib.sha256(json.dumps(found.tokens).encode()).hexdigest()[:16]
    result = {"tokens": found.tokens, "forwards": found.forwards, "tokens_sha": digest}
    return {**cost, "setup_s": setup, **result}


def main() -> None:
    """Processes requests until stdin is closed."""
    # Output of libraries must not mix with the results.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    server = Server()
    for line in sys.stdin:
        try:
            answer = server.answer(json.loads(line))
        except (ValueError, TypeError, KeyError, RuntimeError, ImportError, OSError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(answer) + "\n")
        out.flush()
        if not gc.get_freeze_count():
            gc.freeze()  # else each collection before a run traverses all of torch


if __name__ == "__main__":
    main()
