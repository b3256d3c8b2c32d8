"""The speed commands: `mmdlm bench decode`, `action`, `encode`, `roofline` and `compare`.

Libraries are imported inside the functions, so that help is there at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.table import Table

    from mmdlm.benchmarks.decode_speed import Setting


@dataclass(frozen=True)
class Timing:
    """Where and how often something is timed.

    Args:
        device: "cpu", "cuda" or "auto".
        dtype: "float32", "bfloat16" or "float16"; "auto" is float32 on a CPU, bfloat16 on a GPU.
        threads: of torch; more than one only on an idle machine.
        rounds: timed turns of each system; by default 3 on a CPU, 10 on a GPU.
        warmup: turns before that, which do not count; by default 1 on a CPU, 3 on a GPU.
        seed: of the drawn weights and prompts.
        compile: compile our model, as one would on a GPU; what it then keeps between decodes is
            not counted as extra memory.
        json: file for one JSON line per run; what it held is replaced.
    """

    device: str = "cpu"
    dtype: str = "auto"
    threads: int = 1
    rounds: int | None = None
    warmup: int | None = None
    seed: int = 0
    compile: bool = False
    json: Path | None = None

    def setting(self) -> Setting:
        """The same, checked."""
        from mmdlm.benchmarks.decode_speed import Setting

        places = (self.device, self.dtype, self.threads)
        return Setting(*places, self.rounds, self.warmup, self.seed, self.compile)

    def finish(self, records: list[dict[str, Any]], *tables: Table) -> int:
        """Prints tables, what they were measured on, and keeps the records."""
        from mmdlm.benchmarks.decode_speed import write
        from mmdlm.benchmarks.report import machine, terminal

        console, about = terminal(), machine()
        is_gpu = self.setting().device.startswith("cuda")
        for table in tables:
            console.print(table)
        console.print(
            f"{about['date']}  {about['gpu'] if is_gpu else about['cpu']}, "
            f"{self.threads} threads, torch {about['versions']['torch']}, mmdlm "
            f"{about['versions']['mmdlm']}",
            style="dim",
        )
        if self.json is not None:
            console.print(f"written to {write(self.json, records)}", markup=False)
        failed = [r for r in records if r.get("gate") is False and not r["warmup"]]
        if failed:
            console.print("gate: false: tokens or forwards differ, so these speeds do not count")
        return int(bool(failed))


def decode(
    timing: Timing, shape: list[str] = ("cap256",), mode: list[str] = ("none", "prefix", "dual")
) -> int:
    """Races our decode against the published samplers' way, on equal weights and prompts.

    mmdlm bench decode --shape tiny                           half a minute, to see how it works
    mmdlm bench decode --shape cap256,cap256v126 --mode none,dual,prefix-lm --json speed.jsonl

    Both run in processes of their own that take turns, with weights drawn from a seed and no
    checkpoint. "CPU time 2.00x, 1.90-2.10" says: in the median round the plain sampler took twice
    the processor time, 1.9 to 2.1 times over all rounds. On a machine others use as well, trust CPU
    time. A speed counts if the tokens are the same and the forwards not more, else the last column
    says "gate: false" and the exit status is 1.

    Modes: none recomputes everything in every step; prefix and dual are Fast-dLLM's caches;
    prefix-lm has a prompt that does not see the answer; prompt-once is prefix that never recomputes
    the prompt: its tokens may differ from those of prefix, and the share of equal ones is told.

    Shapes: tiny, cap256 (a caption, small picture), cap768 (one full picture), cap256v126 (LLaDA's
    vocabulary), thr256 (threshold), bat4 and bat4r (four rows; the plain sampler takes them one by
    one); for GPUs llada8b-499, -793, -3709 and -3709-keep25, the first three also with -b8.

    Args:
        timing: where and how often.
        shape: what is decoded.
        mode: what is recomputed.
    """
    from mmdlm.benchmarks import decode_speed, shapes, systems

    found = shapes.find(shape, shapes.DECODES)
    modes = systems.check_modes(list(mode))
    records = decode_speed.race(found, modes, timing.setting(), on_record=_progress())
    return timing.finish(records, decode_speed.table(records))


def action(
    timing: Timing,
    shape: list[str] = ("act178",),
    mode: list[str] = ("none", "dual", "prefix-lm"),
) -> int:
    """Races chunks of 8 robot actions, 56 tokens, and tells the latency of a query.

    mmdlm bench action --shape act178-4,act178-4-ids256 --mode none,dual
    mmdlm bench action --shape act562 --json actions.jsonl

    act178 stands for two pictures of 64 tokens and 50 of text, act562 for 256 per picture; -1 and
    -4 are denoising steps, and with -ids256 the head scores the 256 action ids only. A name without
    its end stands for all its variants. For GPUs: dream7b-178 and dream7b-562, -b16 for a batch.

    Args:
        timing: where and how often; each round is a query.
        shape: what is decoded.
        mode: what is recomputed, see mmdlm bench decode --help.
    """
    from mmdlm.benchmarks import decode_speed, shapes, systems

    found = shapes.find(shape, shapes.ACTIONS)
    modes = systems.check_modes(list(mode))
    records = decode_speed.race(found, modes, timing.setting(), "action", on_record=_progress())
    return timing.finish(records, decode_speed.table(records), decode_speed.latencies(records))


def encode(timing: Timing, shape: list[str] = ("whisper-s-30s",)) -> int:
    """Times encoders of published sizes with random weights.

    mmdlm bench encode --shape vit-64x1
    mmdlm bench encode --shape siglip-384x5,whisper-s-30s --threads 8

    Shapes: vit-64x1 (the default ViT), siglip-384x5 (five views; a minute per round on one core),
    whisper-s-30s. Preparing the raw picture or clip is not counted.

    Args:
        timing: where and how often.
        shape: encoders with their inputs.
    """
    from mmdlm.benchmarks import encode_speed, encoder_shapes

    found = encoder_shapes.find(shape)
    records = encode_speed.time_encoders(found, timing.setting(), _progress())
    return timing.finish(records, encode_speed.table(records))


def roofline(
    timing: Timing,
    shape: list[str] = ("cap256",),
    mode: list[str] = ("none", "prefix", "dual", "prefix-lm"),
    rates: Literal["measured", "h200"] = "measured",
) -> int:
    """Tells the least time a decode can take here, and how near ours comes.

    mmdlm bench roofline --shape cap256,act178-4 --mode none,dual
    mmdlm bench roofline --shape llada8b-793 --rates h200        floors only; nothing is run

    The floor is the longer of arithmetic and memory traffic, summed over the forwards, at the copy
    bandwidth and matrix rate measured here first (two seconds). Nothing can be faster; on a CPU a
    small matrix product is far below that rate, so half the floor's speed is good.

    Args:
        timing: where and how often.
        shape: what is decoded, of those of mmdlm bench decode and action.
        mode: what is recomputed, see mmdlm bench decode --help.
        rates: measured here, or those of an H200 in bfloat16.
    """
    from mmdlm.benchmarks import floors, shapes, systems
    from mmdlm.benchmarks.report import terminal

    found = shapes.find(shape)
    modes = systems.check_modes(list(mode))
    if rates == "h200":
        terminal().print(floors.known(found, modes))
        return 0
    records, table = floors.measured(found, modes, timing.setting(), _progress())
    return timing.finish(records, table)


def compare(first: Path, second: Path) -> int:
    """Compares two files of records, pairing shape, mode and round.

    mmdlm bench compare before.jsonl after.jsonl

    Above 1x, the second one is faster or leaner.

    Args:
        first: written with --json.
        second: written with --json.
    """
    from mmdlm.benchmarks import compare as files
    from mmdlm.benchmarks.report import terminal

    terminal().print(files.table(files.read(first), files.read(second)))
    return 0


def _progress() -> Callable[[dict[str, Any]], None]:
    """A function that says on stderr what is running, if somebody watches."""
    from rich.console import Console

    console = Console(stderr=True)

    def show(record: dict[str, Any]) -> None:
        if console.is_terminal:
            when = "warm-up" if record["warmup"] else f"round {record['round'] + 1}"
            names = f"{record['shape']} {record['mode']} {record['system']}"
            console.print(f"{names}, {when}: {record['seconds']:.2f} s", style="dim")

    return show
