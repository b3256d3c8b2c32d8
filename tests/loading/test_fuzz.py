"""Damaged and hostile files of every kind of checkpoint folder.

Each case changes one file of a folder that loads. It must still load, or fail with one of our
errors that names the folder or the file, in bounded time and memory. `-m slow` runs many more.
"""

import json
import os
import random
import shutil
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

import mmdlm
from mmdlm.checkpoint import load, save
from mmdlm.commands.about import facts
from mmdlm.decoding import preset
from mmdlm.export import export
from mmdlm.loading.ckpt import ENTRY, PREFIX, entry
from mmdlm.model import MultimodalDLM

resource = pytest.importorskip("resource", reason="memory limits need a Unix system")

GOLDEN = Path(__file__).parents[1] / "golden"
SECONDS, MEMORY = 2.0, 300 * 2**20
OURS = (ValueError, TypeError, FileNotFoundError, ImportError)
# Words of errors that Python and torch raise, which say neither the file nor the remedy.
THEIRS = (
    "object is not",
    "object has no attribute",
    "not supported between",
    "unsupported operand",
    "invalid literal",
    "must be real number",
)
FAST, SLOW = 12, 150  # cases per kind of folder
DEEP = "[" * 100_000
VALUES: tuple[Any, ...] = (
    *(0, -1, 1, 2, 3, 7, 1e308, -1e308, 1e-300, 0.5, float("nan"), float("inf"), 2**31, 2**63),
    *(10**12, 10**30, 10**400, True, False, None, "", "a", "1e9", [], {}, [None], [[]], {"a": {}}),
    *([0] * 50, ["a", 1], {"class_path": "os.system", "init_args": {}}, "\ud800", "\0", "../x"),
    *([1, [2, [3, [4]]]], {"": 0}, "{{ 1/0 }}", "{% for i in range(10**9) %}a{% endfor %}"),
)
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}"
    "{% endfor %}{{ '<|im_start|>assistant\n' }}"
)


def text(folder: Path) -> None:
    """A text model in shards, with every file a tokenizer may have."""
    shutil.copytree(GOLDEN / "backbones" / "llada", folder)
    config = json.loads((folder / "config.json").read_text())
    special = ["<|pad|>", "<|end|>", "<|mask|>", "<|im_start|>", "<|im_end|>"]
    first = config["embedding_size"] - len(special)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:first]
    backend = Backend(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    backend.save(str(folder / "tokenizer.json"))
    roles = ("pad", "eos", "mask")
    config |= {f"{role}_token_id": first + i for i, role in enumerate(roles)}
    (folder / "config.json").write_text(json.dumps(config))
    names = {f"{role}_token": special[i] for i, role in enumerate(roles)}
    tokens = {str(first + 2): {"content": "<|mask|>", "special": True}}
    sidecar = {"chat_template": TEMPLATE, "added_tokens_decoder": tokens, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(sidecar))
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    (folder / "added_tokens.json").write_text(json.dumps({"<|end|>": first + 1}))
    ends = {"eos_token_id": [first + 1, first + 4]}
    (folder / "generation_config.json").write_text(json.dumps(ends))


def small_vocabulary(folder: Path) -> None:
    """Mixture of experts whose tokenizer is vocab.json and merges.txt."""
    shutil.copytree(GOLDEN / "backbones" / "llada2_moe", folder)
    config = json.loads((folder / "config.json").read_text())
    rows = config["vocab_size"]
    config |= {"mask_token_id": rows - 1, "eos_token_id": rows - 2, "pad_token_id": rows - 2}
    (folder / "config.json").write_text(json.dumps(config))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: rows - 8]
    (folder / "vocab.json").write_text(json.dumps({a: i for i, a in enumerate(letters)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))


def lavida(folder: Path) -> None:
    """Images and LLaDA."""
    folder.mkdir()
    golden = json.loads((GOLDEN / "vision/lavida_llada/config.json").read_text())
    ids = {f"{role}_token_id": golden["ids"][role] for role in ("mask", "eos")}
    config = golden["llm"] | golden["mm"] | ids | {"pad_token_id": golden["ids"]["eos"]}
    config |= {"model_type": "llava_llada", "vision_config": golden["vision_tower"]}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(GOLDEN / "vision/lavida_llada/weights.safetensors", folder / "model.safetensors")


def diffa(folder: Path) -> None:
    """Speech and LLaDA."""
    folder.mkdir()
    meta = json.loads((GOLDEN / "audio/diffa_meta.json").read_text())
    ends = {"eos_token_id": 149, "pad_token_id": 149, "max_sequence_length": 256}
    config = {
        "architectures": ["DIFFAModel"],
        "whisper_config": meta["whisper"],
        "llm_config": {**meta["llada"], "layer_norm_type": "rms", "rope": True, **ends},
        "acoustic_connector_config": {},
        "prompt_size": meta["prompt_size"],
        "whisper_model_id": meta["whisper_model_id"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(GOLDEN / "audio/diffa_adapters.safetensors")
    for name, tensor in load_file(GOLDEN / "audio/whisper_encoder.safetensors").items():
        tensors[name.replace("model.encoder.", "whisper_model.")] = tensor
    for name, tensor in load_file(GOLDEN / "audio/llada.safetensors").items():
        tensors[f"llm_model.{name}"] = tensor
    save_file(tensors, folder / "model.safetensors")


def dream_vla(folder: Path) -> None:
    """Cameras, a robot and Dream."""
    folder.mkdir()
    meta = json.loads((GOLDEN / "action/dreamvla_meta.json").read_text())
    config = meta["config"] | {"model_type": "dream-vla"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "dataset_statistics.json").write_text(json.dumps(meta["stats"]))
    pixels = {"patch_size": 14, "min_pixels": 3136, "max_pixels": 100_352}
    pixels["patch_size"] = meta["config"]["vision_config"]["patch_size"]
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    shutil.copy(GOLDEN / "action/dreamvla_model.safetensors", folder / "model.safetensors")


PUBLISHED = {each.__name__: each for each in (text, small_vocabulary, lavida, diffa, dream_vla)}


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, multimodal: Callable[[], MultimodalDLM]
) -> dict[str, Path]:
    """A folder of each kind that loads."""
    root, model = tmp_path_factory.mktemp("whole"), multimodal()
    for name, make in PUBLISHED.items():
        make(root / name)
    save(model, root / "own")
    (root / "ckpt").mkdir()
    weights = {f"{PREFIX}{name}": w for name, w in model.state_dict().items()}
    torch.save({ENTRY: entry(model), "state_dict": weights}, root / "ckpt" / "last.ckpt")
    (root / "preset").mkdir()
    (root / "preset" / "fast.yaml").write_text(
        yaml.safe_dump(model.preset["caption"]["strategies"])
    )
    found = {folder.name: folder for folder in root.iterdir()}
    for folder in found.values():  # imports what is needed, so that later calls need no memory
        opened(folder)
    shutil.rmtree(root / "exported", ignore_errors=True)
    return found


def opened(folder: Path) -> None:
    """Everything that reads the files of such a folder."""
    if (folder / "fast.yaml").exists() or (folder / "fast.yaml").is_symlink():
        preset.strategies(str(folder / "fast.yaml"))
        return
    if folder.name == "ckpt":
        export(folder / "last.ckpt", folder.parent / "exported")
        return
    facts(load(folder, device="meta"))
    model = load(folder, device="cpu", dtype="float32")
    if model.tokenizer is not None and model.tokenizer.template is not None:
        mmdlm.generate(model, [{"role": "user", "content": "hi"}], length=2, strategies=[])


@contextmanager
def limited() -> Iterator[None]:
    """Little more memory than the process has, and an alarm for calls that hang."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def problem(folder: Path, run: Callable[[Path], None]) -> str:
    """What is wrong with how a call ends; empty if it succeeds or raises an error of ours."""
    start, found = time.thread_time(), ""
    try:
        with limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(folder)
    except OURS as error:
        message = str(error)
        names = [str(folder), *(f.name for f in folder.iterdir()), folder.name, "prompt"]
        if not any(name in message for name in names):
            found = f"does not name a file: {type(error).__name__}: {message}"
        elif any(words in message for words in THEIRS) and "compare it" not in message:
            found = f"is not our own: {type(error).__name__}: {message}"
        elif len(message) > 4000:
            found = f"is long: {message[:100]}"
    except Exception as error:  # noqa: BLE001 - which ones come is what is tested
        found = f"is of another type: {type(error).__name__}: {str(error)[:300]}"
    seconds = time.thread_time() - start
    return found or (f"took {seconds:.1f} s" if seconds > SECONDS else "")


def paths(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """Places in nested lists and tables."""
    if at:
        yield at
    if not isinstance(value, dict | list):
        return
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, each in items:
        yield from paths(each, (*at, key))


def changed(value: Any, rng: random.Random) -> Any:
    """Nested data with one value replaced, removed or added."""
    value = json.loads(json.dumps(value))
    places = list(paths(value))
    at = rng.choice(places) if places else ()
    if not at:
        return rng.choice(VALUES)
    inner = value
    for key in at[:-1]:
        inner = inner[key]
    kind = rng.randrange(8)
    if kind == 0:
        del inner[at[-1]]
    elif kind == 1 and isinstance(inner[at[-1]], int | float):
        inner[at[-1]] = str(inner[at[-1]])
    elif kind == 2 and isinstance(inner[at[-1]], int | float):
        inner[at[-1]] *= rng.choice((-1, 0, 2, 3, 1000, 10**9))
    elif kind == 3 and isinstance(inner, list):
        inner *= 2
    else:
        inner[at[-1]] = rng.choice(VALUES)
    return value


def damage(data: bytes, rng: random.Random) -> bytes:
    """Bytes that are cut, changed, or of another kind of file."""
    kind = rng.randrange(7)
    if kind == 0:
        return data[: rng.randrange(len(data) + 1)]
    if kind == 1:
        return b""
    if kind == 2:
        return b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    if kind == 3:
        return DEEP.encode()
    if kind == 4:
        return b"\xff\xfe" + data
    flipped = bytearray(data)
    for _ in range(rng.choice((1, 3, 30))):
        last = min(len(flipped), rng.choice((9, 400, len(flipped))))
        flipped[rng.randrange(last)] = rng.randrange(256)
    return bytes(flipped)


def replaced(file: Path, rng: random.Random) -> None:
    """Puts something that is not a regular file in its place."""
    file.unlink()
    kind = rng.randrange(5)
    if kind == 0:
        os.mkfifo(file)
    elif kind == 1:
        file.mkdir()
    elif kind == 2:
        file.symlink_to(file)
    elif kind == 3:
        file.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as door:
            here = os.getcwd()
            os.chdir(file.parent)  # names of sockets are short
            door.bind(file.name)
            os.chdir(here)


def spoil(folder: Path, rng: random.Random) -> str:
    """Changes one file of a folder; names it."""
    file = rng.choice(sorted(f for f in folder.rglob("*") if f.is_file()))
    structured = file.suffix in (".json", ".yaml", ".ckpt")
    kind = rng.random()
    if kind < 0.1:
        replaced(file, rng)
    elif not structured or kind < 0.25:
        file.write_bytes(damage(file.read_bytes(), rng))
    elif file.suffix == ".json":
        file.write_text(json.dumps(changed(json.loads(file.read_text()), rng)))
    elif file.suffix == ".yaml":
        file.write_text(yaml.safe_dump(changed(yaml.safe_load(file.read_text()), rng)))
    else:
        saved = torch.load(file, weights_only=True)
        saved[ENTRY] = changed(saved[ENTRY], rng)
        torch.save(saved, file)
    return file.name


def problems(whole: Path, place: Path, seeds: range) -> list[str]:
    """Seeds of cases that end wrongly, with what happened."""
    found = []
    for seed in seeds:
        folder = place / whole.name
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(whole, folder)
        file = spoil(folder, random.Random(f"{whole.name} {seed}"))
        if wrong := problem(folder, opened):
            found.append(f"{whole.name} {seed} ({file}): the error {wrong}")
    return found


KINDS = (*PUBLISHED, "own", "ckpt", "preset")


@pytest.mark.parametrize("kind", KINDS)
def test_whole_folder_loads(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders[kind], tmp_path / kind)
    assert problem(folder, opened) == ""
    opened(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_file_is_an_error_of_ours(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    assert problems(folders[kind], tmp_path / "case", range(FAST)) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_files_are_errors_of_ours(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    assert problems(folders[kind], tmp_path / "case", range(FAST, FAST + SLOW)) == []
