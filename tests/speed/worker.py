"""A process that runs one system and stays alive: `python -m tests.speed.worker`.

It reads one JSON request per line from its input and answers each with one line. Systems measured
in processes of their own share neither an allocator nor its warm memory.
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
    """The other end: starts such a process and asks it.

    Args:
        name: for messages.
        threads: of torch in the process, from its start on.
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

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            RuntimeError: the process failed at it, or ended.
        """
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.errors.seek(0)
            said = self.errors.read().strip().splitlines()[-1:] or ["nothing"]
            status = self.process.wait()
            raise RuntimeError(
                f"the process of {self.name} ended with status {status} and said {said[0]!r}; "
                "if it was killed, memory was short: take a smaller shape"
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
    """What a function gives, and what it cost.

    Args:
        run: called once.
        device: waited for before and after.
    Returns:
        its result, and seconds (wall), cpu_seconds (of all threads), peak_extra_mb (most memory
        at once beyond what was held before: of the GPU's, or of the process's; None where the
        system does not tell), and on a GPU reserved_mb.
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
    """Bytes of this process in memory: now, restarting the high-water mark, or that mark.

    None where Linux' /proc is not there or refuses.
    """
    try:
        if reset:
            _trim()
            CLEAR.write_text("5")  # proc(5): sets the peak to the present
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    key = "VmRSS:" if reset else "VmHWM:"
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(key)), None)


def _trim() -> None:
    """Gives freed memory back, or a run that reuses what the last one freed would look lean."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


class Desk:
    """Answers requests; keeps the latest model.

    The first run of a shape in a mode also says how long its set-up took.
    """

    def __init__(self) -> None:
        self.kept: tuple[Any, Any] = (None, None)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """One answer; the request's "do" names the method."""
        do = request.pop("do")
        return {"decode": self.decode, "encode": self.encode, "rates": self.rates}[do](**request)

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
            self.kept = (None, None)  # not two at once
            model = synthetic(what.transformer, seed, device, getattr(torch, dtype))
            if compiled and system == OURS:
                model.compile()
            self.kept = (key, model)
        run = runner(system, self.kept[1], what, mode, seed)
        setup = time.perf_counter() - begin
        found, cost = measured(run, self.kept[1].device)
        digest = hashlib.sha256(json.dumps(found.tokens).encode()).hexdigest()[:16]
        said = {"tokens": found.tokens, "forwards": found.forwards, "tokens_sha": digest}
        return {**cost, "setup_s": setup, **said}

    def encode(self, shape: str, device: str, dtype: str, seed: int) -> dict[str, Any]:
        """One timed pass of an encoder."""
        from tests.speed.encoder_shapes import ENCODERS

        key, begin = (shape, seed, device, dtype), time.perf_counter()
        if self.kept[0] != key:
            self.kept = (None, None)
            self.kept = (key, ENCODERS[shape].build(seed, device, getattr(torch, dtype)))
        setup = time.perf_counter() - begin
        tokens, cost = measured(self.kept[1], torch.device(device))
        return {**cost, "setup_s": setup, "new_tokens": tokens}

    def rates(self, device: str, dtype: str) -> dict[str, Any]:
        """What the device can do."""
        from tests.speed.roofline import rates

        return vars(rates(device, getattr(torch, dtype)))


def main() -> None:
    """Answers until its input ends."""
    # What libraries print must not mix with the answers.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    desk = Desk()
    for line in sys.stdin:
        try:
            answer = desk.answer(json.loads(line))
        except (ValueError, TypeError, KeyError, RuntimeError, ImportError, OSError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(answer) + "\n")
        out.flush()
        if not gc.get_freeze_count():
            gc.freeze()  # else each collection before a run walks through all of torch


if __name__ == "__main__":
    main()
