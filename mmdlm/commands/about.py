"""What there is to choose from, and what a checkpoint is."""

from __future__ import annotations

import ast
import inspect
import shutil
import textwrap
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from encoders.features import Prepared
    from mmdlm.backbones.config import TransformerConfig
    from mmdlm.model import MultimodalDLM

PACKAGES = {
    "systems": "mmdlm.systems",
    "families": "mmdlm.backbones",
    "encoders": "encoders",
    "adapters": "adapters",
    "strategies": "mmdlm.decoding",
    "objectives": "mmdlm.objectives",
    "data": "mmdlm.data",
}
# Bytes per weight. Those of the integer types are an estimate: scales and norms come on top.
SIZES = {"float32": 4, "bfloat16 or float16": 2, "int8": 1, "int4": 0.5}
COLUMNS = {
    "decoding": ("name", "what it is", "made of"),
    "strategies": ("name", "what it does", "decides", "answer", "from", "not with", "rules out"),
}
STRATEGIES = (
    "In a preset: class_path: mmdlm.decoding.NAME. The answer is the same as without the strategy, "
    "or its own. Everything composes that is not under 'not with'; 'rules out' lists what others "
    "then cannot rely on. Without a strategy that decides "
    "it: plan opens the model's own blocks or all, refresh recomputes exactly what may have "
    "changed, pick takes the best token, score its probability, select one position per step."
)
WHAT = Literal[
    *("all", "models", "decoding", "strategies", "systems", "families", "encoders", "adapters"),
    *("objectives", "data", "simulators", "configs"),
]


def list_names(what: WHAT = "all") -> int:
    """Lists what there is to choose from, a line each.

    mmdlm list decoding

    Args:
        what: models (bundled), decoding (presets for --decoding, and the strategies they are made
            of: what each decides, where it is from, what it cannot be combined with), strategies
            (alone), systems (published checkpoints with encoders), families (published text
            checkpoints), encoders, adapters, objectives, data, simulators, configs (for mmdlm fit
            -c).
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    kinds = ("models", *PACKAGES, "simulators", "configs")
    shown = {"all": kinds, "decoding": ("decoding", "strategies")}.get(what, (what,))
    console = Console()
    for kind in shown:
        # The long table of strategies imports torch, so the overview has a short one.
        is_long = kind in COLUMNS and what != "all"
        columns = COLUMNS[kind] if is_long else ("name", "what it is")
        table = Table(*columns, title=kind, title_justify="left")
        rows = {"decoding": presets, "strategies": strategies}[kind]() if is_long else names(kind)
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
        if kind == "strategies":
            console.print(STRATEGIES if is_long else "Details: mmdlm list strategies")
    return 0


def presets() -> list[tuple[str, str, str]]:
    """Name, strategies and one line of each decoding preset."""
    from mmdlm.decoding import preset

    found = []
    for name in preset.names():
        parts = [repr(strategy) for strategy in preset.strategies(name)]
        comment = takewhile(
            lambda line: line.startswith("#"), preset.find(name).read_text().splitlines()
        )
        found.append((name, " ".join(line[1:].strip() for line in comment), ", ".join(parts)))
    return found


def strategies() -> list[tuple[str, ...]]:
    """The columns of `COLUMNS` for each strategy."""
    from mmdlm import discover
    from mmdlm.decoding.strategy import PROPERTIES, Strategy, denied

    found = []
    for name, kind in discover.classes(PACKAGES["strategies"], Strategy).items():
        decides = kind.hooks()
        alone = [hook for hook in decides if hook in Strategy.ONE_OWNER]
        others = [f"others that decide {' or '.join(alone)}"] if alone else []
        others += [f"what rules out {PROPERTIES[name]}" for name in sorted(kind.requires)]
        lacks = [PROPERTIES[name] for name in sorted(denied(kind))]
        path = f"{kind.__module__.removeprefix('mmdlm.decoding.')}.{name}"
        answer = "same" if kind.exact else "its own"
        decided = ", ".join(decides) or "begin"
        says = (_line(kind), decided, answer, kind.paper, ", ".join(others), ", ".join(lacks))
        found.append((path, *says))
    return found


def names(kind: str) -> list[tuple[str, str]]:
    """Name and one line of each thing of a kind."""
    if kind in PACKAGES:
        from mmdlm import discover

        return [(path, _docstring(path)) for path in discover.paths(PACKAGES[kind]).values()]
    if kind == "models":
        from mmdlm.files import MODELS, bundled

        return [(name, _first(MODELS / name / "README.md")) for name in bundled()]
    if kind == "simulators":
        from mmdlm import discover
        from mmdlm.simulators.simulator import simulator_class

        found = {name: simulator_class(name) for name in discover.names("mmdlm.simulators")}
        return [(name + "/TASK" * bool(kind.TASKS), _line(kind)) for name, kind in found.items()]
    package = Path(__file__).parents[1]
    roots = (Path("configs"), package / "configs", package.parent / "configs")
    found = {
        str(path.relative_to(root).with_suffix("")): path
        for root in reversed(roots)
        for path in root.glob("train/*.yaml")
    }
    return [(name, _first(path)) for name, path in sorted(found.items())]


def info(checkpoint: str, image: Path | None = None) -> int:
    """Shows what a checkpoint is and can do; its weights stay on disk.

    mmdlm info tiny --image cat.jpg

    Args:
        checkpoint: bundled name, folder, or hub id (owner/name).
        image: an image file; shows how many positions of the prompt it takes.
    """
    from mmdlm.checkpoint import load

    model = load(checkpoint, device="meta")
    found = facts(model)
    if image is not None:
        found[f"image {image.name}"] = image_tokens(model, image)
    left = max(map(len, found)) + 2
    width = max(40, shutil.get_terminal_size().columns)
    print(checkpoint)
    for name, value in found.items():
        first = f"  {name:{left}}"
        print(textwrap.fill(value, width, initial_indent=first, subsequent_indent=" " * len(first)))
    return 0


def facts(model: MultimodalDLM) -> dict[str, str]:
    """What a model is and can do, in words, by name."""
    spec = model.spec
    sizes, count = spec.transformer, sum(p.numel() for p in model.parameters())
    blocks = f", blocks of {spec.block_size}" if spec.block_size else ""
    reach = "no limit" if spec.reach is None else f"{spec.reach:,} tokens of prompt and answer"
    found = {
        "family": spec.family,
        "backbone": f"{sizes.layers} layers of width {sizes.width}, {sizes.heads} heads, "
        f"{sizes.keys_heads} of keys and values, vocabulary {sizes.vocab}",
        "parameters": f"{count:,}",
        **_experts(sizes, count),
        "memory": ", ".join(f"{kind} {_bytes(count * size)}" for kind, size in SIZES.items())
        + " (weights only)",
        "KV cache": _cache(model),
        "context": reach,
        "attention": f"{spec.attention}{blocks}",
        "rows score": "the next token (undone inside)" if spec.shift else "their own token",
        "special ids": ", ".join(_specials(model)),
        "chat template": _template(model),
        "takes": ", ".join(["text", *model.encoders]),
    }
    for kind, encoder in model.encoders.items():
        found[f"{kind} encoder"] = (
            f"{type(encoder).__name__}, {sum(p.numel() for p in encoder.parameters()):,} "
            f"parameters, then {type(model.adapters[kind]).__name__}"
        )
    for task, entry in model.preset.items():
        found[f"task {task}"] = _task(entry)
    if not model.preset:
        found["tasks"] = "no defaults; give --prompt"
    if model.drawing is not None:
        wide, high = model.drawing.size
        found["draws"] = f"images of {wide} x {high} pixels, {model.drawing.count:,} codes"
    if model.robot is not None:
        robot = model.robot
        found["robot"] = f"chunks of {robot.chunk} actions of {robot.action_size} numbers"
    if model.tokenizer is None:
        found["tokenizer"] = "none: token methods only"
    elif model.tokenizer.words is not None:
        words = sorted(w for w in model.tokenizer.words if not w.startswith("<"))
        found[f"its {len(words)} words"] = " ".join(words)
    return found


def image_tokens(model: MultimodalDLM, image: Path) -> str:
    """How many tokens an image takes, alone and among several, without the weights.

    Args:
        model: on the meta device.
        image: an image file.
    Raises:
        ValueError: the model takes no images, or the file is not valid.
    """
    counts = {}
    for several in (False, True):
        item = model.processor.prepare("image", image, several)
        views = len(item.tensor) if item.tensor.ndim == 4 else 1
        count = len(_embedded(model, item))
        counts[several] = f"{count} tokens" + (f" of {views} views" if views > 1 else "")
    height, width = item.size
    more = "" if counts[True] == counts[False] else f"; {counts[True]} beside other images"
    return f"{width} x {height} pixels, {counts[False]}{more}"


def _embedded(model: MultimodalDLM, item: Prepared) -> Tensor:
    """Embeddings [N D] of an image, whose numbers mean nothing."""
    import copy
    from dataclasses import replace

    import torch

    from encoders.features import Features

    encoder, adapter = model.encoders["image"], model.adapters["image"]
    adapter = copy.deepcopy(adapter).to_empty(device="cpu")
    with torch.inference_mode():
        try:
            on_meta = encoder([replace(item, tensor=item.tensor.to("meta"))])
            mask = torch.ones(on_meta.mask.shape, dtype=torch.bool)
            features = Features(torch.zeros(on_meta.tokens.shape), mask, on_meta.sizes)
        except (NotImplementedError, RuntimeError):  # it reads numbers
            features = copy.deepcopy(encoder).to_empty(device="cpu")([item])
        return adapter.to(features.tokens.dtype).embed(features, [item])[0].tokens


def doctor() -> int:
    """Checks what of this installation works on this machine, and what to do about the rest."""
    from mmdlm.commands.doctor import print_report

    return print_report()


def _experts(sizes: TransformerConfig, count: int) -> dict[str, str]:
    """The numbers of a mixture of experts, where the backbone is one."""
    moe = sizes.moe
    if moe is None:
        return {}
    sparse = sizes.layers - len(moe.dense)
    idle = sparse * (moe.experts - moe.top) * 3 * sizes.width * moe.inner
    shared = f", one of width {moe.shared} for all tokens" if moe.shared else ""
    return {
        "experts": f"{moe.experts} of width {moe.inner} in {sparse} layers, {moe.top} per token"
        f"{shared}; {count - idle:,} parameters at work on a token"
    }


def _cache(model: MultimodalDLM) -> str:
    """Size of the keys and values of one token, and of a full context."""
    spec = model.spec
    sizes = spec.transformer
    one = 2 * sizes.layers * sizes.keys_heads * sizes.head_width
    full = "" if spec.reach is None else f", {_bytes(2 * one * spec.reach)} for the whole context"
    return f"per token {4 * one:,} bytes in float32, {2 * one:,} in bfloat16{full}"


def _specials(model: MultimodalDLM) -> list[str]:
    """The special ids, each with the files that give it, where it was read from a published one."""
    spec, report = model.spec, getattr(model, "report", None)
    sources = None if report is None else report.sources
    ids = [
        ("mask", "mask_id", spec.mask_id),
        ("end", "eos_id", spec.eos_id),
        ("padding", "pad_id", spec.pad_id),
        *(("also end", "eos_id", number) for number in spec.stop_ids),
    ]
    if sources is None:
        return [f"{role} {_token(model, number)}" for role, _, number in ids]
    usual = f"not in these files, published for {spec.family}"
    same = {("pad_id", spec.eos_id): "not in these files, the end is used"}
    found = same | sources
    return [
        f"{role} {_token(model, number)} ({found.get((name, number), usual)})"
        if number is not None
        else f"{role} unknown (not in these files, give load({name}=...))"
        for role, name, number in ids
    ]


def _token(model: MultimodalDLM, number: int | None) -> str:
    """An id with its text, where there is a tokenizer."""
    if number is None:
        return "unknown"
    if model.tokenizer is None:
        return str(number)
    return f"{number} {model.tokenizer.backend.id_to_token(number) or 'without a text'}"


def _template(model: MultimodalDLM) -> str:
    from mmdlm.chat import find

    tokenizer, name = model.tokenizer, model.spec.template
    if tokenizer is None and name != "plain":
        return f"the family's, {name}, of no use without a tokenizer"
    if find(tokenizer, name) is None:
        return "none: text is taken as it is"
    whose = f"the family's, {name}" if tokenizer.template is None else "the checkpoint's own"
    return whose + (", for text without media only on request" if len(model.encoders) else "")


def _task(entry: dict[str, Any]) -> str:
    strategies = entry.get("strategies") or []
    ways = ", ".join(str(each["class_path"]).rpartition(".")[2] for each in strategies)
    prompt = entry.get("prompt")
    said = "the question is the prompt" if prompt is None else repr(prompt)
    return f"{said}, {entry.get('length')} tokens, {ways or 'one token per step'}"


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _docstring(path: str) -> str:
    """The first line of the docstring of a class of ours, read without importing its file.

    Args:
        path: dotted path, such as "encoders.vit.ViT".
    """
    module, _, name = path.rpartition(".")
    file = Path(__file__).parents[2].joinpath(*module.split(".")).with_suffix(".py")
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return (ast.get_docstring(node) or "").split("\n")[0]
    raise LookupError(f"{file} defines no class {name}")


def _line(kind: type) -> str:
    return (inspect.getdoc(kind) or "").split("\n")[0]


def _first(file: Path) -> str:
    """The first line of a comment or text file that says something."""
    if not file.is_file():
        return ""
    lines = (line.strip("#- \n") for line in file.read_text(encoding="utf-8").splitlines())
    return next((line for line in lines if line), "")
