"""Command line of the speed laboratory: `python -m tests.speed COMMAND`, at the repository root."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mmdlm.benchmarks.report import machine, terminal
from tests.speed import (
    answer_shapes,
    answer_systems,
    compare,
    decode_speed,
    encode_speed,
    encoder_shapes,
    floors,
    shapes,
    systems,
    train_shapes,
    train_speed,
)
from tests.speed.decode_speed import Record, Setting

DECODE = """Time our decode against the published samplers' way, with equal weights and prompts.

  python -m tests.speed decode --shape tiny                    half a minute, to try it
  python -m tests.speed decode --shape cap256,cap256v126 --mode none,dual,prefix-lm

Each runs in a separate process, in alternating rounds, with weights drawn from a seed and no
checkpoint. "CPU time 2.00x, 1.90-2.10": in the median round the plain sampler took twice the
processor time, 1.9 to 2.1 times over all rounds. On a shared machine, trust CPU time. A speed
counts only if the tokens are equal and the forwards not more. Otherwise the last column reads
"gate: false" and the exit status is 1.

Modes: none recomputes everything in every step; prefix and dual are Fast-dLLM's caches; prefix-lm
has a prompt that does not attend to the answer; prompt-once is prefix without recomputing the
prompt, so the share of equal tokens is reported instead of the gate.

Shapes: tiny, cap256 (a caption, small image), cap768 (one full image), cap256v126 (LLaDA's
vocabulary), thr256 (threshold), bat4 and bat4r (four rows; the plain sampler decodes them one by
one). Chunks of 8 robot actions, 56 tokens, with the latency of a query: act178 (two images of 64
tokens and 50 of text) and act562 (256 tokens per image); -1 and -4 are denoising steps, and with
-ids256 the head scores the 256 action ids only. A name without its end means all its variants.
For GPUs: llada8b-499, -793, -3709 and -3709-keep25, dream7b-178 and -562, also with -b8 or -b16."""
LAVIDA = """Time whole answers about an image against LaViDa's published inference.

  python -m tests.speed lavida --shape lavida-tiny              a few seconds, to try it
  python -m tests.speed lavida --shape lavidav126,lavidav126-x3

Both systems read one checkpoint folder in LaViDa's layout with random weights, an image file of
640x480 pixels (five views of 384) and a question, and fill 32 tokens in 16 steps (shift 0.33).
Modes: prefix-lm computes the prompt once, none in every step. As above, a speed counts only if the
tokens are equal.

Shapes: lavida-tiny; lavida, a language model of 8 blocks of width 512 and 32,768 ids with a tower
of 6 blocks of width 384; lavidav126, the same with LLaDA's 126,464 ids. With -x2 or -x3 that many
questions about the image are answered in one call, with -again a question about an image whose
features were kept; the published inference answers one by one and keeps nothing."""
ENCODE = """Time encoders of published sizes with random weights.

  python -m tests.speed encode --shape siglip-384x5,whisper-s-30s --threads 8

Shapes: vit-64x1 (the default ViT), siglip-384x5 (five views; a minute per round on one core),
whisper-s-30s. Preprocessing of the raw image or clip is not counted."""
TRAIN = """Time our training step against the published trainers' way, with equal weights and masks.

  python -m tests.speed train --shape train-tiny                a second, to try it
  python -m tests.speed train                                   all four; half an hour on one core

Each runs in a separate process, in alternating rounds. A step is forward, backward and AdamW, and
its memory is what it takes above weights and moments: gradients, activations, logits. A speed
counts only if the losses of a round are equal to 1e-5. A second table names where our time goes.

Shapes: four rows, 8 blocks of width 512. answer64: 256 tokens of prompt and 64 of answer; all512:
512 tokens that may all be masked; -v126 has LLaDA's vocabulary of 126,464, the others 32,768.
For conversations of different lengths, in buckets and packed: mmdlm bench train."""
ROOFLINE = """Print the least time a decode can take here, and the share of it that ours reaches.

  python -m tests.speed roofline --shape cap256,act178-4 --mode none,dual
  python -m tests.speed roofline --shape llada8b-793 --rates h200    floors only; nothing is run

The floor is the longer of arithmetic and memory traffic, summed over the forwards, at the copy
bandwidth and matrix rate measured here first (two seconds)."""
COMPARE = """Compare two files of records, paired by shape, mode and round.

  python -m tests.speed compare before.jsonl after.jsonl

Above 1x, the second one is faster or uses less memory."""


def main(argv: Items[str] | None = None) -> int:
    """Runs a command; returns 0, or 1 if a speed does not count, or 2 for invalid arguments."""
    given = parser().parse_args(argv)
    try:
        return given.run(given)
    except (ValueError, OSError) as error:
        print(f"tests.speed: error: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    timing = argparse.ArgumentParser(add_help=False)
    add = timing.add_argument
    add("--device", default="cpu", help="cpu, cuda or auto")
    add("--dtype", default="auto", help="float32, bfloat16 or float16; auto: by the device")
    add("--threads", type=int, default=1, help="of torch; more than one on an idle machine only")
    add("--rounds", type=int, help="timed rounds (default: 3 on a CPU, 10 on a GPU)")
    add("--warmup", type=int, help="untimed rounds before (default: 1 on a CPU, 3 on a GPU)")
    add("--seed", type=int, default=0, help="of the drawn weights and prompts")
    add("--compile", action="store_true", help="compile our model, as one would on a GPU")
    add("--json", type=Path, help="file for one JSON line per run; it is overwritten")
    top = argparse.ArgumentParser(prog="python -m tests.speed", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, about: str, **more: Any) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=about.partition("\n")[0],
            description=about,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **more,
        )
        added.set_defaults(run=run)
        return added

    modes = {"type": _listed, "default": ["none", "prefix", "dual", "prefix-lm"]}
    cap256 = {"type": _listed, "default": ["cap256"], "help": "names, separated by commas"}
    one = command("decode", decode, DECODE, parents=[timing])
    one.add_argument("--shape", **cap256)
    one.add_argument("--mode", **modes, help="what is recomputed, separated by commas")
    one = command("lavida", lavida, LAVIDA, parents=[timing])
    one.add_argument("--shape", **cap256 | {"default": ["lavidav126", "lavidav126-again"]})
    one.add_argument("--mode", **modes | {"default": ["prefix-lm"]}, help="prefix-lm or none")
    one = command("encode", encode, ENCODE, parents=[timing])
    one.add_argument("--shape", **cap256 | {"default": ["whisper-s-30s"]})
    one = command("train", train, TRAIN, parents=[timing])
    four = [name for name in train_shapes.TRAININGS if name != "train-tiny"]
    one.add_argument("--shape", **cap256 | {"default": four})
    one = command("roofline", roofline, ROOFLINE, parents=[timing])
    one.add_argument("--shape", **cap256)
    one.add_argument("--mode", **modes, help="see decode --help")
    one.add_argument("--rates", choices=("measured", "h200"), default="measured")
    one = command("compare", compare_files, COMPARE)
    one.add_argument("first", type=Path)
    one.add_argument("second", type=Path)
    return top


def decode(given: argparse.Namespace) -> int:
    """See `DECODE`."""
    chosen, modes = shapes.find(given.shape), systems.check_modes(given.mode)
    records = decode_speed.race(chosen, modes, _setting(given), on_record=_progress)
    tables = [decode_speed.table(records)]
    queries = [record for record in records if "queries_per_s" in record]
    return _finish(given, records, *tables, *([decode_speed.latencies(queries)] if queries else []))


def lavida(given: argparse.Namespace) -> int:
    """See `LAVIDA`."""
    if given.compile:
        raise ValueError("--compile is not supported here; leave it out")
    chosen, modes = answer_shapes.find(given.shape), answer_systems.check_modes(given.mode)
    setting = _setting(given)
    records = decode_speed.race(chosen, modes, setting, "answer", on_record=_progress, do="ask")
    return _finish(given, records, decode_speed.table(records))


def encode(given: argparse.Namespace) -> int:
    """See `ENCODE`."""
    chosen = encoder_shapes.find(given.shape)
    records = encode_speed.time_encoders(chosen, _setting(given), _progress)
    return _finish(given, records, encode_speed.table(records))


def train(given: argparse.Namespace) -> int:
    """See `TRAIN`."""
    if given.compile:
        raise ValueError("--compile has no effect on a training step; leave it out")
    chosen = train_shapes.find(given.shape)
    records = train_speed.race(chosen, _setting(given), on_record=_progress)
    return _finish(given, records, train_speed.table(records), train_speed.parts(records))


def roofline(given: argparse.Namespace) -> int:
    """See `ROOFLINE`."""
    chosen, modes = shapes.find(given.shape), systems.check_modes(given.mode)
    if given.rates == "h200":
        terminal().print(floors.known(chosen, modes))
        return 0
    records, table = floors.measured(chosen, modes, _setting(given), _progress)
    return _finish(given, records, table)


def compare_files(given: argparse.Namespace) -> int:
    """See `COMPARE`."""
    terminal().print(compare.table(compare.read(given.first), compare.read(given.second)))
    return 0


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _setting(given: argparse.Namespace) -> Setting:
    names = ("device", "dtype", "threads", "rounds", "warmup", "seed", "compile")
    return Setting(**{name: getattr(given, name) for name in names})


def _finish(given: argparse.Namespace, records: list[Record], *tables: Table) -> int:
    """Prints tables and the machine, writes the records, returns the exit status."""
    console, about = terminal(), machine()
    for table in tables:
        console.print(table)
    is_gpu = _setting(given).device.startswith("cuda")
    versions = about["versions"]
    console.print(
        f"{about['date']}  {about['gpu'] if is_gpu else about['cpu']}, {given.threads} threads, "
        f"torch {versions['torch']}, mmdlm {versions['mmdlm']}",
        style="dim",
    )
    if given.json is not None:
        console.print(f"written to {decode_speed.write(given.json, records)}", markup=False)
    failed = [r for r in records if r.get("gate") is False and not r["warmup"]]
    if failed:
        what = "losses" if failed[0]["mode"] == train_speed.MODE else "tokens or forwards"
        console.print(f"gate: false: {what} differ, so these speeds do not count")
    return int(bool(failed))


def _progress(record: Record) -> None:
    """Reports a finished run on stderr if that is a terminal."""
    console = Console(stderr=True)
    if console.is_terminal:
        when = "warm-up" if record["warmup"] else f"round {record['round'] + 1}"
        names = f"{record['shape']} {record['mode']} {record['system']}"
        console.print(f"{names}, {when}: {record['seconds']:.2f} s", style="dim")


if __name__ == "__main__":
    sys.exit(main())
