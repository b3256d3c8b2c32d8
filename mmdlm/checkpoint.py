"""Checkpoints: any source to a model that runs, and a model back to a folder.

A folder is either in a published layout (a `Family` of `mmdlm.backbones` reads it) or in ours:

    config.json         format, spec, and how to build the encoders and adapters
    model.safetensors   every weight, under backbone., encoders. and adapters.
    tokenizer.json      when the model has a tokenizer
    statistics.json     when it drives a robot: action ids and normalisation
    decoding.yaml       default strategies by task, when it has some
    README.md           what it was trained on, and its scores
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from encoders.rebuild import Rebuildable, rebuild
from mmdlm import discover, preset
from mmdlm.backbones.family import Family, Spec
from mmdlm.backbones.transformer import Transformer, TransformerConfig
from mmdlm.keymap import (
    FLOATS,
    Place,
    Report,
    allocate,
    expand,
    prefix_of,
    resolve,
    shapes,
    tensors,
    views,
)
from mmdlm.model import MultimodalDLM
from mmdlm.shards import Stored, copy, read_json, some, survey, write, write_json
from mmdlm.text import Tokenizer

if TYPE_CHECKING:
    from adapters.robot import Robot

FORMAT = "mmdlm-1"
MODELS = Path(__file__).parent / "models"
FAMILIES = "mmdlm.backbones"
# Everything else of a hub repository (code, pickles, other runtimes' weights) stays there.
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "decoding.yaml", "README.md"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    source: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    family: str | None = None,
) -> MultimodalDLM:
    """The model of a checkpoint, ready to use (eval mode); `model.report` says what was read.

    Weights go from the file straight into the model, tensor by tensor, in the asked type.

    Args:
        source: name of a bundled model ("tiny"), folder, or hub id ("GSAI-ML/LLaDA-8B-Instruct").
        device: "auto" is the GPU if there is one.
        dtype: "float32", "bfloat16" or "float16"; "auto" is the checkpoint's on a GPU and float32
            on a CPU.
        family: family of a published checkpoint whose config.json does not tell, e.g. "llada".

    Raises:
        FileNotFoundError: there is no such model, or files of it are missing.
        ValueError: the checkpoint is damaged, of no known family, or its tensors do not fit.
    """
    folder = find(source)
    config = read_json(folder / "config.json")
    stored = survey(folder)
    target = _device(device)
    if "format" in config:
        if family is not None:
            raise ValueError(
                f"family={family!r} has no effect on {folder}, which is in our own layout; "
                "leave it out"
            )
        model = _own(folder, config)
        places, report = resolve(stored, expand(None, shapes(model)))
    else:
        model, places, report = _published(folder, config, stored, family)
    embedding = next(stored[n] for n, p in places.items() if p.ours == "backbone.embed.weight")
    kind = _dtype(dtype, target, FLOATS.get(embedding.dtype, torch.float32))
    allocate(model.backbone, target, kind, _kept(model.spec.family))
    model.encoders.to(target, kind)
    model.adapters.to(target, kind)
    copy(stored, views(model, places))
    model.report = report
    rows = model.spec.transformer.vocab
    if model.tokenizer is not None and len(model.tokenizer) > rows:
        raise ValueError(
            f"{folder}: tokenizer.json has {len(model.tokenizer)} tokens, the embedding {rows} "
            "rows; they are of different checkpoints"
        )
    return model.eval()


def save(
    model: MultimodalDLM,
    folder: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    card: str | None = None,
) -> None:
    """Writes a model as a folder in our own layout; an earlier save there is replaced.

    Args:
        model: the model.
        folder: made when it does not exist.
        dtype: type of the weights in the file ("bfloat16" halves float32); None for the model's.
        card: text of README.md; None leaves the file alone.

    Raises:
        ValueError: the backbone is not what the spec says; such a folder could not be loaded.
    """
    _check(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kind = None if dtype is None else _dtype(dtype, model.device, model.dtype)
    weights = tensors(model)
    fixed = {name for name in weights if name.endswith(_kept(model.spec.family))}
    write(folder, weights, _types(weights, kind, fixed))
    config = {
        "format": FORMAT,
        "spec": dataclasses.asdict(model.spec),
        "encoders": {name: _recipe(part) for name, part in model.encoders.items()},
        "adapters": {name: _recipe(part) for name, part in model.adapters.items()},
    }
    write_json(folder / "config.json", config)
    # What the model no longer has must not be found by the next load.
    for name in ("tokenizer.json", "statistics.json", "decoding.yaml"):
        (folder / name).unlink(missing_ok=True)
    if model.tokenizer is not None:
        model.tokenizer.save(folder)
    if model.robot is not None:
        write_json(folder / "statistics.json", model.robot.to_dict())
    if model.preset:
        preset.write(folder / "decoding.yaml", model.preset)
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")


def save_published(
    model: MultimodalDLM,
    folder: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    shard_bytes: float = 5e9,
) -> None:
    """Writes a text model in the published layout of its family.

    Args:
        model: the model.
        folder: made when it does not exist.
        dtype: type of the weights in the files; None for the model's.
        shard_bytes: most bytes per file; more than one file comes with an index.

    Raises:
        ValueError: the layout has no place for the model's encoders, or cannot say its spec.
    """
    if len(model.encoders):
        raise ValueError(
            f"the published layout of {model.spec.family} holds text models only, this one has "
            f"encoders ({', '.join(model.encoders)}); use save"
        )
    _check(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = discover.find(FAMILIES, model.spec.family, Family)
    kind = _dtype(dtype or model.dtype, model.device, model.dtype)
    config = chosen.write(model.spec) | {"torch_dtype": str(kind).removeprefix("torch.")}
    places = expand(chosen.KEYS, shapes(model.backbone), _rows(model.spec.transformer))
    weights = views(model.backbone, places)
    fixed = {name for name, place in places.items() if place.ours.endswith(chosen.FLOAT32)}
    write(folder, weights, _types(weights, kind, fixed), shard_bytes)
    write_json(folder / "config.json", config)
    if model.tokenizer is not None:
        model.tokenizer.save(folder)


def _check(model: MultimodalDLM) -> None:
    """Raises unless the backbone has the tensors its spec says."""
    with torch.device("meta"):
        expected = shapes(Transformer(model.spec.transformer))
    has = shapes(model.backbone)
    differ = sorted(n for n in {*has, *expected} if has.get(n) != expected.get(n))
    if differ:
        raise ValueError(
            f"the backbone's {some(differ)} differ from what its spec says; merge adapters such as "
            "LoRA, and save the model itself rather than its compiled form"
        )


def find(source: str | Path) -> Path:
    """The folder of a source, downloaded when it is a hub id.

    Args:
        source: see `load`. A bundled name comes before a folder of that name; write "./tiny" for
            the folder.

    Raises:
        FileNotFoundError: there is nothing of that name.
    """
    names = bundled()
    if isinstance(source, str) and source in names:
        return MODELS / source
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise FileNotFoundError(
            f"{source} is a file; give the folder with config.json and *.safetensors"
        )
    if isinstance(source, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        return _download(source)
    beside = [f.name for f in folder.parent.iterdir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, [*names, *beside], 3)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    raise FileNotFoundError(
        f"there is no checkpoint {str(source)!r}{hint} Give a bundled model "
        f"({', '.join(names) or 'none in this installation'}), a folder, or a hub id (owner/name)"
    )


def bundled() -> list[str]:
    """Names of the models inside the package, sorted."""
    return sorted(file.parent.name for file in MODELS.glob("*/config.json"))


def _download(source: str) -> Path:
    """The local copy of a hub repository."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(source, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"{source!r} is no folder here, and the hub did not give it: {error}. Bundled models: "
            f"{', '.join(bundled()) or 'none'}"
        ) from error


def _family(config: dict[str, Any], names: set[str], name: str | None) -> type[Family]:
    """The family that reads a published checkpoint."""
    if config.get("quantization_config"):
        raise ValueError("quantised checkpoints are not read; take the bfloat16 one")
    if name is not None:
        return discover.find(FAMILIES, name, Family)
    known = discover.classes(FAMILIES, Family)
    fitting = [family for family in known.values() if family.matches(config, names)]
    if len(fitting) == 1:
        return fitting[0]
    supported = ", ".join(discover.names(FAMILIES, Family))
    seen = (
        f"architectures {config.get('architectures')}, model_type {config.get('model_type')!r}, "
        f"tensors such as {', '.join(sorted(names)[:3])}"
    )
    if fitting:
        both = " and ".join(family.__name__ for family in fitting)
        raise ValueError(f"{both} both fit {seen}; choose with family=, one of {supported}")
    raise ValueError(
        f"no family fits {seen}. Supported: {supported}; if it is one of these under another "
        "name, give it as family="
    )


def _published(
    folder: Path, config: dict[str, Any], stored: dict[str, Stored], name: str | None
) -> tuple[MultimodalDLM, dict[str, Place], Report]:
    """The model of a published folder on the meta device, and where its tensors go."""
    family = _family(config, set(stored), name)
    spec = family.read(config, set(stored))
    tokenizer = Tokenizer.from_folder(folder)
    with torch.device("meta"):
        model = MultimodalDLM(spec, tokenizer=tokenizer)
    ours = {f"backbone.{name}": shape for name, shape in shapes(model.backbone).items()}
    keys = {key if to is None else f"backbone.{key}": to for key, to in family.KEYS.items()}
    places = expand(keys, ours, _rows(spec.transformer))
    unused = {}
    if spec.transformer.tied and isinstance(head := family.KEYS.get("out.weight"), str):
        unused[head] = "the head is tied to the embedding, which wins"
    prefix = prefix_of(stored, str(family.KEYS["embed.weight"]))
    return model, *resolve(stored, places, keys, prefix, unused)


def _own(folder: Path, config: dict[str, Any]) -> MultimodalDLM:
    """The model of a folder in our layout, its backbone on the meta device."""
    if config["format"] != FORMAT:
        raise ValueError(
            f"{folder}: config.json has format {config['format']!r}, expected {FORMAT!r}; a newer "
            "mmdlm may have written it"
        )
    missing = {"spec", "encoders", "adapters"} - set(config)
    if missing:
        raise ValueError(f"{folder}: config.json lacks {sorted(missing)}; export it again")
    given = dict(config["spec"])
    given["transformer"] = _build(TransformerConfig, given.get("transformer", {}), folder)
    given["stop_ids"] = tuple(given.get("stop_ids", ()))
    spec = _build(Spec, given, folder)
    # Their random weights are overwritten, and must not move the caller's random numbers.
    with torch.random.fork_rng(devices=[]):
        encoders = {name: rebuild(recipe) for name, recipe in config["encoders"].items()}
        adapters = {name: rebuild(recipe) for name, recipe in config["adapters"].items()}
    tokenizer = Tokenizer.from_folder(folder)
    robot = _robot(folder)
    with torch.device("meta"):
        model = MultimodalDLM(spec, encoders, adapters, tokenizer, robot)
    if (folder / "decoding.yaml").exists():
        model.preset = preset.read(folder / "decoding.yaml")
    return model


def _build(kind: type, given: dict[str, Any], folder: Path) -> Any:
    """A dataclass from its dictionary."""
    known = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(given) - set(known))
    missing = [n for n, f in known.items() if f.default is dataclasses.MISSING and n not in given]
    if unknown or missing:
        raise ValueError(
            f"{folder}: {kind.__name__} in config.json has unknown {unknown} and lacks {missing}; "
            "a newer mmdlm may have written it"
        )
    return kind(**given)


def _robot(folder: Path) -> Robot | None:
    file = folder / "statistics.json"
    if not file.exists():
        return None
    from adapters.robot import Robot

    return Robot.from_dict(read_json(file))


def _recipe(part: Rebuildable) -> dict[str, Any]:
    """How to build an encoder or adapter again; its weights are in the checkpoint."""
    recipe = part.recipe()
    if "pretrained" in recipe["init_args"]:
        recipe["init_args"]["pretrained"] = False
    return recipe


def _rows(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Lengths of stacked parts that are not equal."""
    q, kv = config.heads * config.head_width, config.keys_heads * config.head_width
    return {"attn.qkv.": (q, kv, kv)}


def _kept(family: str) -> tuple[str, ...]:
    """Ends of backbone names that stay float32; none for a family of no file."""
    if family not in discover.names(FAMILIES, Family):
        return ()
    return discover.find(FAMILIES, family, Family).FLOAT32


def _types(
    weights: dict[str, Tensor], dtype: torch.dtype | None, fixed: set[str]
) -> dict[str, torch.dtype]:
    """Type of each tensor in a file."""
    return {
        name: dtype if dtype and weight.is_floating_point() and name not in fixed else weight.dtype
        for name, weight in weights.items()
    }


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = torch.device(device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r}, but torch finds no GPU; use device='cpu'")
    return chosen


def _dtype(dtype: str | torch.dtype, device: torch.device, own: torch.dtype) -> torch.dtype:
    """The type of weights on a device; `own` is the checkpoint's."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else own
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}, expected auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]
