"""What other programs read of an exported folder, and what an interrupted export leaves."""

import errno
import json
import multiprocessing
import pydoc
import random
import shutil
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Backend

import mmdlm
from mmdlm.checkpoint import save, save_published
from mmdlm.export import export
from mmdlm.loading import ckpt
from mmdlm.text import Tokenizer

GOLDEN = Path(__file__).parent / "golden" / "backbones"
FAMILIES = sorted(folder.name for folder in GOLDEN.iterdir())
CONTROLS = ["<|im_start|>", "<|im_end|>", "<|pad|>", "<|extra|>"]
TEXTS = ["a b <|im_end|> c", "<tool> a", "b <|im_start|> a"]
CHAT = [{"role": "user", "content": "a b"}]
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m.content }} <|im_end|>{{ eos_token }}{% endfor %}"
)


def put(file: Path, **content: Any) -> None:
    file.parent.mkdir(exist_ok=True)
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(known | content))


def tokenizer(folder: Path, draw: random.Random) -> dict[str, int]:
    """Writes a tokenizer with some of what may stand in its files; gives its vocabulary."""
    pieces = [*"abcdefghijklmnopqrstuvwxyz <>|_/", "ab", "the"]
    made = Backend(models.BPE({piece: i for i, piece in enumerate(pieces)}, [("a", "b")]))
    made.add_tokens([AddedToken(c, special=True, normalized=False) for c in CONTROLS])
    made.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    if draw.random() < 0.4:
        made.enable_truncation(max_length=2, direction=draw.choice(["left", "right"]))
    if draw.random() < 0.4:
        made.enable_padding(direction=draw.choice(["left", "right"]), pad_token="<|pad|>")
    made.save(str(folder / "tokenizer.json"))
    config = folder / "tokenizer_config.json"
    put(config, tokenizer_class="PreTrainedTokenizerFast", eos_token="<|im_end|>")
    some: list[Callable[[], None]] = [
        lambda: put(config, padding_side="left", truncation_side="left"),
        lambda: put(config, model_max_length=77, clean_up_tokenization_spaces=False),
        lambda: put(config, auto_map={"AutoTokenizer": [None, "mine.Mine"]}),
        lambda: put(config, chat_template=TEMPLATE),
        lambda: put(
            config,
            chat_template=[
                {"name": "default", "template": TEMPLATE + " "},
                {"name": "tool_use", "template": "of tools"},
            ],
        ),
        lambda: (folder / "chat_template.jinja").write_text(TEMPLATE + "\n\n"),
        lambda: put(folder / "chat_template.json", chat_template=TEMPLATE),
        lambda: put(config, additional_special_tokens=["<|extra|>"]),
        lambda: put(
            folder / "special_tokens_map.json", pad_token="<|pad|>", eos_token="<|im_end|>"
        ),
        lambda: put(folder / "added_tokens.json", **{"<|im_end|>": made.token_to_id("<|im_end|>")}),
        lambda: put(folder / "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3]),
    ]
    for write in draw.sample(some, draw.randint(0, len(some))):
        write()
    if draw.random() < 0.4 and (folder / "chat_template.jinja").exists():
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    return made.get_vocab()


def source(family: str, seed: int, folder: Path) -> Path:
    """A published folder with a tokenizer, and settings that no part of a model repeats."""
    draw = random.Random(f"{family} {seed}")
    shutil.copytree(GOLDEN / family, folder)
    vocab = tokenizer(folder, draw)
    config = json.loads((folder / "config.json").read_text())
    ends = [config["eos_token_id"]] if isinstance(config["eos_token_id"], int) else []
    changes: list[dict[str, Any]] = [
        {"auto_map": {"AutoModel": "modeling_mine.Mine"}, "transformers_version": "4.46.3"},
        {"_name_or_path": "somewhere/else", "task_specific": {"a": [1, None, 0.1]}},
        {"bos_token_id": 1, "llm_model_path": "x"},
        {"dtype": "float32"},
    ]
    config.setdefault("mask_token_id", vocab["<|extra|>"])
    config.pop("torch_dtype", None)  # in some of these folders, not that of the weights
    if "embedding_size" in config:
        changes.append({"vocab_size": config["vocab_size"] - 9})
    elif "rope_theta" in config:
        changes.append(
            {"rope_parameters": {"rope_type": "default", "rope_theta": config.pop("rope_theta")}}
        )
    for change in draw.sample(changes, draw.randint(1, len(changes))):
        config |= change
    if "rope_theta" not in config and "rope_parameters" not in config:
        config |= changes[-1]
    (folder / "config.json").write_text(json.dumps(config))
    if draw.random() < 0.7:
        more = {
            "eos_token_id": draw.choice([ends[0], [vocab["<|im_end|>"], *ends]]),
            "temperature": draw.choice([0.25, 0.6]),
            "do_sample": True,
            "pad_token_id": draw.choice([0, 1]),
        }
        put(folder / "generation_config.json", **dict(draw.sample(sorted(more.items()), 3)))
    return folder


def written(route: str, folder: Path, out: Path) -> None:
    """Exports a folder into the published layout, or into ours."""
    if route == "through our layout":
        export(folder, out.parent / "own")
        export(out.parent / "own", out, layout="published")
    elif route == "through training":
        model = mmdlm.load(folder, device="cpu", dtype="stored", pack=False)
        weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        torch.save({"mmdlm": ckpt.entry(model), "state_dict": weights}, out.parent / "last.ckpt")
        export(out.parent / "last.ckpt", out, layout="published")
    else:
        export(folder, out, layout=route)


def said_by_transformers(folder: Path) -> dict[str, Any]:
    """What AutoTokenizer and GenerationConfig make of a folder."""
    from transformers import AutoTokenizer, GenerationConfig

    found = AutoTokenizer.from_pretrained(str(folder))
    said = {
        "ids": [found.encode(text, add_special_tokens=False) for text in TEXTS],
        "template": found.chat_template,
        "chat": found.chat_template and found.apply_chat_template(CHAT, tokenize=False),
        "sides": (found.padding_side, found.truncation_side),
        "length": found.model_max_length,
        "special": (found.special_tokens_map, sorted(found.all_special_ids)),
        "added": found.get_added_vocab(),
    }
    if (folder / "generation_config.json").exists():
        generation = GenerationConfig.from_pretrained(str(folder)).to_dict()
        said["generation"] = {k: v for k, v in generation.items() if k != "eos_token_id"}
    return said


def ends(folder: Path) -> set[int]:
    """Every id that config.json or generation_config.json calls the end."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        value = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        value = value.get("eos_token_id")
        found |= set(value if isinstance(value, list) else [] if value is None else [value])
    return found


ROUTES = ("published", "own", "through our layout", "through training")


@pytest.mark.filterwarnings("ignore:.*chat templates of .* differ")
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("family", FAMILIES)
def test_exported_folder_says_what_the_source_says(family: str, route: str, tmp_path: Path) -> None:
    for seed in range(2):
        work = tmp_path / str(seed)
        work.mkdir()
        folder, out = source(family, 1000 * ROUTES.index(route) + seed, work / "in"), work / "out"
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*config.json this model comes from is not kept")
            written(route, folder, out)
        theirs, ours = (said_by_transformers(f) for f in (folder, out))
        assert {key: ours.get(key) for key in theirs} == theirs
        one, two = (mmdlm.load(f, device="cpu", pack=False) for f in (folder, out))
        assert two.spec == one.spec
        assert (two.tokenizer.template, two.tokenizer.names) == (
            one.tokenizer.template,
            one.tokenizer.names,
        )
        assert [two.tokenizer.encode(t) for t in TEXTS] == [one.tokenizer.encode(t) for t in TEXTS]
        tokens = torch.arange(6)[None]
        with torch.no_grad():
            assert torch.equal(two.logits(tokens), one.logits(tokens))
        if route == "own":
            assert two.published["config.json"] == one.published["config.json"]
        else:
            assert ends(out) >= {one.spec.eos_id, *one.spec.stop_ids} | ends(folder)
            was, now = (json.loads((f / "config.json").read_text()) for f in (folder, out))
            assert {key: now.get(key) for key in was} == was


def test_ids_of_the_user_are_written_in_every_file(tmp_path: Path) -> None:
    folder = source("sdar", 0, tmp_path / "in")
    put(folder / "generation_config.json", eos_token_id=[3, 4], pad_token_id=5, temperature=0.5)
    given = {"eos_id": 7, "stop_ids": (8, 9), "pad_id": 10, "mask_id": 11, "theta": 123.0}
    model = mmdlm.load(folder, device="cpu", **given)
    save_published(model, tmp_path / "out")
    again = mmdlm.load(tmp_path / "out", device="cpu").spec
    assert replace(again, stop_ids=(8, 9)) == model.spec  # the tokenizer's end counts as well
    config, generation = (
        json.loads((tmp_path / "out" / name).read_text())
        for name in ("config.json", "generation_config.json")
    )
    assert (config["mask_token_id"], config["pad_token_id"]) == (11, 10)
    assert generation["eos_token_id"] == [7, 8, 9]
    assert (generation["pad_token_id"], generation["temperature"]) == (10, 0.5)
    assert ends(tmp_path / "out") == {7, 8, 9}


def test_ends_that_no_file_names_are_written_for_others(tmp_path: Path) -> None:
    from transformers import GenerationConfig

    model = mmdlm.load(GOLDEN / "sdar", device="cpu")
    model.spec = replace(model.spec, stop_ids=(9,))  # as the family or the chat template knows
    eos = model.spec.eos_id
    for save_as in (save_published, save):
        save_as(model, tmp_path / save_as.__name__)
        found = GenerationConfig.from_pretrained(str(tmp_path / save_as.__name__))
        assert (found.eos_token_id, found.pad_token_id) == ([eos, 9], model.spec.pad_id)
    config = json.loads((tmp_path / "save_published" / "config.json").read_text())
    assert config["eos_token_id"] == eos  # as in the source


@pytest.mark.parametrize("name", ["../out.json", "additional_chat_templates/../x.jinja", "a.py"])
def test_checkpoints_write_no_files_of_other_names(tmp_path: Path, name: str) -> None:
    model = mmdlm.load(GOLDEN / "dream", device="cpu")
    model.tokenizer = Tokenizer.from_words(["a"])
    entry = ckpt.entry(model)
    with pytest.raises(ValueError, match="is not the text of a file of a tokenizer"):
        ckpt.from_entry(entry | {"files": {name: "x"}}, "x.ckpt")
    with pytest.raises(ValueError, match=r"config\.json is a int, expected a JSON object"):
        ckpt.from_entry(entry | {"published": {"config.json": 3}}, "x.ckpt")
    model.published[name] = {"a": 1}
    save(model, tmp_path / "own")
    save_published(mmdlm.load(tmp_path / "own", device="cpu"), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"own", "out"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json")
    }


# The folder is replaced at once, or not at all


def snapshot(folder: Path) -> dict[str, bytes]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes], Path]:
    """An export to be replaced, its files after that, and the source of the new ones."""
    work = tmp_path_factory.mktemp("exports")
    old, new = source("dream", 1, work / "a"), source("llada", 2, work / "b")
    export(old, work / "old", layout="published", shard_bytes=1e5)
    (work / "old" / "notes" / ".git").mkdir(parents=True)
    (work / "old" / "notes" / ".git" / "HEAD").write_text("mine")
    (work / "old" / "dangling").symlink_to("nowhere")
    shutil.copytree(work / "old", work / "wanted", symlinks=True)
    export(new, work / "wanted", layout="published")
    return work / "old", snapshot(work / "wanted"), new


def test_other_files_of_the_folder_stay(exports: tuple[Path, dict[str, bytes], Path]) -> None:
    old, wanted, new = exports
    out = old.parent / "wanted"
    assert wanted["notes/.git/HEAD"] == b"mine"
    assert (out / "dangling").is_symlink()
    assert not any("-of-" in name or "index" in name for name in wanted)
    assert mmdlm.load(out, device="cpu").spec == mmdlm.load(new, device="cpu").spec
    names = {path.name for path in out.parent.iterdir()}
    assert names == {"a", "b", "old", "wanted"}


WRITES = ("os.fsync", "os.replace", "os.link", "shutil.copyfile", "pathlib.Path.write_text")


@pytest.mark.parametrize("where", [*WRITES, "mmdlm.loading.shards.save_file"])
def test_failed_export_leaves_the_old_folder(
    exports: tuple[Path, dict[str, bytes], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    old, wanted, new = exports
    out = tmp_path / "out"
    shutil.copytree(old, out, symlinks=True)
    before, calls = snapshot(out), 0
    for failing in range(1, 99):
        done = 0
        module, _, name = where.rpartition(".")
        original = getattr(pydoc.locate(module), name)

        def fail(*args: Any, failing: int = failing, original: Any = original, **kw: Any) -> Any:
            nonlocal done
            done += 1
            if done == failing:
                raise OSError(errno.EIO, "disk")
            return original(*args, **kw)

        with monkeypatch.context() as patch:
            patch.setattr(where, fail)
            with suppress(OSError):
                export(new, out, layout="published")
        calls += done >= failing
        if done < failing or where == "os.link":  # links are copied where they cannot be made
            break
        at_the_end = where == "os.fsync" and snapshot(out) == wanted  # of the folder it is in
        assert at_the_end or snapshot(out) == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert calls > 0 or where == "os.link"
    assert snapshot(out) == wanted


def test_killed_export_leaves_the_old_or_the_new_folder(
    exports: tuple[Path, dict[str, bytes], Path], tmp_path: Path
) -> None:
    old, wanted, new = exports
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mmdlm.export", "mmdlm.systems.lavida", "transformers"])
    draw, seconds = random.Random(0), []
    before, seen = snapshot(old), list[str]()
    for run in range(20):
        out = tmp_path / str(run) / "out"
        shutil.copytree(old, out, symlinks=True)
        process = context.Process(target=export, args=(new, out), kwargs={"layout": "published"})
        start = time.monotonic()
        process.start()
        # The first runs are not killed and say how long one takes.
        process.join(None if run < 3 else draw.uniform(0.2, 1.02) * min(seconds))
        seconds.append(time.monotonic() - start) if run < 3 else None
        process.kill()
        process.join()
        assert snapshot(out) in (before, wanted)
        seen += [path.name for path in out.parent.iterdir() if path.name != "out"]
    assert seen  # some were killed while they wrote beside the old folder
    assert mmdlm.load(out, device="cpu").spec.family in ("dream", "llada")
    export(new, out, layout="published")
    assert snapshot(out) == wanted


def test_folders_that_cannot_be_replaced_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    for out in (".", "..", tmp_path):
        with pytest.raises(ValueError, match="is the current folder or above it; give a new"):
            export(GOLDEN / "dream", out)
    monkeypatch.setattr(Path, "is_mount", lambda _: True)
    with pytest.raises(ValueError, match="out is a mount point, which cannot be replaced"):
        export(GOLDEN / "dream", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
