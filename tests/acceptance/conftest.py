"""What the acceptance tests share: commands as a user types them, their scores, and adapters."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmdlm.model import MultimodalDLM

ROOT = Path(__file__).parents[2]
KEPT = ("HOME", "LANG", "PATH", "TMPDIR")
"""Environment variables that a command gets; its number of threads is left to it."""


@dataclass(frozen=True)
class Ran:
    """A command that ended with status 0.

    Args:
        out: what it printed on stdout.
        err: what it printed on stderr.
        seconds: wall time.
        processor_seconds: user and system time of all its processes.
    """

    out: str
    err: str
    seconds: float
    processor_seconds: float


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter folder beside the model it was merged into.

    Args:
        share: parameters of the adapter in relation to those of its base.
        peft: largest difference between outputs of peft's model and the merged model (logits, and
            features of an image and a clip), in float64: sums in float32 would differ by as much.
        load: the same for the adapter given to `mmdlm.load`.
    """

    share: float
    peft: float
    load: float


def used() -> float:
    """Processor seconds of all processes that were started here and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run(folder: Path, *words: str | Path) -> Ran:
    """Runs `mmdlm WORDS` in a folder, in a new process with a clean environment.

    Raises:
        AssertionError: the exit status is not 0.
    """
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "mmdlm", *map(str, words)]
    begin, before = time.perf_counter(), used()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    seconds, processor = time.perf_counter() - begin, used() - before
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    print(f"{seconds:.0f} s, {processor:.0f} processor seconds: mmdlm {' '.join(command[3:])}")
    print(done.stderr)
    return Ran(done.stdout, done.stderr, seconds, processor)


@dataclass(frozen=True)
class Tuned:
    """A run of `mmdlm fit`.

    Args:
        ran: the command.
        use: words of the command that fit prints at its end, to use what it trained.
        model: options among them that name the model, for other commands.
        before: share of exact held-out answers before training, as printed.
        after: the same after training.
    """

    ran: Ran
    use: list[str]
    model: list[str]
    before: float
    after: float


def fit(folder: Path, config: str, data: str | Path, *options: str | Path) -> Tuned:
    """Runs `mmdlm fit -c CONFIG --source tiny --data DATA` and reads what it prints.

    Args:
        folder: where the command runs.
        config: name of a config.
        data: file or folder.
        options: further ones.
    """
    out = ("--out", folder / config.replace("/", "_"))
    ran = run(folder, "fit", "-c", config, "--source", "tiny", "--data", data, *out, *options)
    printed = ran.err.partition("Use it:")[2].strip().splitlines()[0]
    program, *use = shlex.split(printed)
    assert program == "mmdlm", printed
    scores = re.search(r"exact\W+([\d.]+)%\W+([\d.]+)%", ran.err)
    before, after = (float(share) / 100 for share in scores.groups())
    return Tuned(ran, use, use[use.index("--model") :], before, after)


def exact(folder: Path, data: str | Path, *options: str | Path) -> float:
    """Share of exact answers that `mmdlm eval` reports, in [0, 1].

    Args:
        folder: where the command runs.
        data: file or folder of questions with their answers.
        options: such as `--model MODEL --adapter FOLDER`.
    """
    ran = run(folder, "eval", "--data", data, "--metrics", "exact", "--json", *options)
    scores = [json.loads(line) for line in ran.out.splitlines()]
    return next(one["value"] for one in scores if one["part"] == "all")


def compare(adapter: Path, merged: Path, source: str = "tiny") -> Adapter:
    """Opens an adapter in peft and in `mmdlm.load`, and compares both with the merged model.

    Args:
        adapter: folder that `mmdlm fit -c finetune/lora` wrote.
        merged: folder that `mmdlm export SOURCE --adapter ADAPTER` wrote.
        source: the model that the adapter was trained on.
    """
    peft = pytest.importorskip("peft")
    import mmdlm
    from mmdlm.training.vocabulary import grow

    whole = mmdlm.load(merged, device="cpu")
    loaded = mmdlm.load(source, device="cpu", adapter=adapter)
    base = mmdlm.load(source, device="cpu", pack=False)
    total = sum(weight.numel() for weight in base.parameters())
    grow(base, whole.tokenizer.words or ())
    theirs = peft.PeftModel.from_pretrained(base, str(adapter)).eval()
    share = sum(w.numel() for name, w in theirs.named_parameters() if is_trained(name)) / total
    want, *found = (outputs(model.double()) for model in (whole, theirs.base_model.model, loaded))
    return Adapter(share, *(float((each - want).abs().max()) for each in found))


def outputs(model: MultimodalDLM) -> Tensor:
    """Logits of random tokens, and features of the examples of all encoders, as one vector."""
    vocab = model.spec.transformer.vocab
    tokens = torch.randint(3, vocab, (4, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = [model.logits(tokens)]
        for kind, encoder in model.encoders.items():
            item = encoder.prepare(encoder.example())
            found += model.encode(kind, [replace(item, tensor=item.tensor.double())])
    return torch.cat([each.flatten() for each in found])


def is_trained(name: str) -> bool:
    """Whether a parameter of peft's model is one of an adapter."""
    return ".lora_" in name or ".trainable_tokens_delta." in name


@pytest.fixture(scope="session")
def command() -> Callable[..., Ran]:
    """`command(folder, *words)`: see `run`."""
    return run


@pytest.fixture(scope="session")
def tune() -> Callable[..., Tuned]:
    """`tune(folder, config, data, *options)`: see `fit`."""
    return fit


@pytest.fixture(scope="session")
def score() -> Callable[..., float]:
    """`score(folder, data, *options)`: see `exact`."""
    return exact


@pytest.fixture(scope="session")
def adapted() -> Callable[..., Adapter]:
    """`adapted(adapter, merged)`: see `compare`."""
    return compare
