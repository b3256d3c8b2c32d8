import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image

import mmdlm
from adapters.mlp import MLP
from encoders.vit import ViT
from mmdlm import checkpoint
from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.family import Spec
from mmdlm.commands.about import facts
from mmdlm.commands.arguments import arguments
from mmdlm.commands.main import SPINS, main
from mmdlm.commands.table import COMMANDS, TRAINING
from mmdlm.model import MultimodalDLM
from mmdlm.text import Tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*filled the canvas")


@pytest.fixture
def model() -> MultimodalDLM:
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_words("a red blue circle is it describe ? yes no".split())  # noqa: SIM905
    config = TransformerConfig(vocab=len(tokenizer), width=32, layers=1, heads=2, inner=64)
    spec = Spec("mmdlm", config, mask_id=2, eos_id=1, pad_id=0, attention="cascade")
    model = MultimodalDLM(spec, {"image": ViT.tiny()}, {"image": MLP(32, 32)}, tokenizer)
    model.backbone.reset(torch.Generator().manual_seed(0))
    return model.eval()


@pytest.fixture
def loaded(model, monkeypatch) -> MultimodalDLM:
    """The model that every command finds under any name."""
    model.preset = {"caption": {"prompt": "describe it", "length": 3, "strategies": []}}
    monkeypatch.setattr(checkpoint, "load", lambda *a, **k: model)
    return model


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="of GNU OpenMP")
@pytest.mark.parametrize("given", [None, "7"])
def test_idle_threads_leave_their_core_to_other_programs(given: str | None) -> None:
    environment = {name: v for name, v in os.environ.items() if name != "GOMP_SPINCOUNT"}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE"} | (
        {} if given is None else {"GOMP_SPINCOUNT": given}
    )
    command = [sys.executable, "-m", "mmdlm", "generate", "red", "--length", "1"]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True).stderr
    assert f"GOMP_SPINCOUNT = '{given or SPINS}'" in printed


def test_help_answers_at_once_and_names_every_command():
    begin = time.perf_counter()
    run = subprocess.run([sys.executable, "-m", "mmdlm", "--help"], capture_output=True, text=True)
    assert time.perf_counter() - begin < 5  # 0.1 s on an idle machine
    assert run.returncode == 0, run.stderr
    for name, command in COMMANDS.items():
        assert f"  {name} " in run.stdout
        assert command.line in run.stdout


def test_help_of_a_command_imports_no_torch():
    code = (
        "import sys; from mmdlm.commands.main import main\n"
        "try: main(['caption', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "mmdlm caption photos/" in run.stdout


@pytest.mark.parametrize("name", [n for n, c in COMMANDS.items() if c.place != TRAINING])
def test_every_option_of_every_command_is_explained(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*name.split(), "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert f"mmdlm {name}" in text
    import re

    assert not re.findall(r"^  (--\S+ [A-Z-]+)$\n(?=  \S|\Z)", text, re.MULTILINE)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mmdlm {mmdlm.__version__}\n"


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["capton", "a.png"], "did you mean caption"),
        (["data", "make", "sceens"], "did you mean data make scenes"),
        (["frobnicate"], "known: caption, answer"),
        (["caption", "no-such.png"], "no-such.png"),
        (["info", "no/such/folder"], "no checkpoint at 'no/such/folder'"),
        (["fit", "-c", "train/nothing"], "no config 'train/nothing'"),
        (["foresee", "-c", "train/tiny"], "there is no command 'foresee'"),
    ],
)
def test_user_errors_are_one_line_and_status_2(args, told, capsys):
    assert main(args) == 2
    err = capsys.readouterr().err
    assert err.startswith("mmdlm: error: ")
    assert told in err
    assert err.count("\n") == 1


def test_errors_of_our_own_code_need_no_traceback_in_training(monkeypatch, capsys):
    from mmdlm.commands import train
    from mmdlm.layout import Row
    from mmdlm.training.checkpoints import NotSavedError
    from mmdlm.training.tune import assign

    def full(_):
        raise NotSavedError("the checkpoint of step 4 could not be written")

    for fault in (full, lambda _: assign(["a.b"], {"c.*": "frozen"})):
        monkeypatch.setattr(train, "run", fault)
        assert main(["fit"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    # Errors that say nothing about the input, of others or of ours, keep their traceback.
    for fault in (lambda _: int("x"), lambda _: Row()):
        monkeypatch.setattr(train, "run", fault)
        with pytest.raises((ValueError, TypeError)):
            main(["fit"])


def test_debug_shows_where(monkeypatch):
    monkeypatch.setenv("MMDLM_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        main(["caption", "no-such.png"])


def test_misspelt_option_names_the_near_one(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["caption", "a.png", "--lenght", "3"])
    assert stopped.value.code == 2
    assert "unknown '--lenght'; did you mean --length" in capsys.readouterr().err


def test_group_of_commands_is_listed(capsys):
    assert main(["data"]) == 0
    assert "mmdlm data make speech" in capsys.readouterr().out


def test_caption_prints_a_line_per_file(loaded, photos, capsys):
    assert main(["caption", str(photos)]) == 0
    wanted = mmdlm.caption(loaded, sorted(map(str, photos.iterdir())))
    found = capsys.readouterr().out.splitlines()
    assert found == [f"{photos / f'{i}.png'}: {text}" for i, text in enumerate(wanted)]


def test_json_with_details(loaded, photos, capsys):
    assert main(["caption", str(photos / "0.png"), "--json", "--details", "--length", "2"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["file"] == str(photos / "0.png")
    assert record["forwards"] == 2
    assert len(record["words"]) == len(record["tokens"])


def test_details_are_shown_below_the_text(loaded, photos, capsys):
    assert main(["caption", str(photos / "0.png"), "--details"]) == 0
    assert "3 forwards" in capsys.readouterr().out


def test_folder_job_ends_with_status_1_and_is_resumed(loaded, photos, tmp_path, capsys):
    (photos / "2.png").write_bytes(b"broken")
    out = tmp_path / "captions.jsonl"
    assert main(["caption", str(photos), "--out", str(out)]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert "3 done, 0 done before, 1 failed" in told.err
    assert "mmdlm: failed: " in told.err
    (photos / "2.png").unlink()
    assert main(["caption", str(photos), "--out", str(out)]) == 0
    assert "0 done, 3 done before, 0 failed" in capsys.readouterr().err
    assert len(out.read_text().splitlines()) == 3


def test_folder_job_names_what_it_skips_and_fails_for_unsupported_images(
    loaded, photos, tmp_path, capsys
):
    for name in ("notes.txt", "raw.cr2"):
        (photos / name).touch()
    (photos / "linked").symlink_to(tmp_path)  # contains the photos
    out = ["--out", str(tmp_path / "captions.jsonl")]
    for more in (out, []):
        assert main(["caption", str(photos), *more]) == 1
        told = capsys.readouterr().err
        assert f"mmdlm: warning: skipped {photos / 'notes.txt'}: not an image (.txt)" in told
        assert f"skipped {photos / 'linked'}: link to a folder that is searched already" in told
        assert f"mmdlm: failed: {photos / 'raw.cr2'}: ValueError" in told
    assert main(["caption", str(photos / "notes.txt"), str(photos / "0.png")]) == 1
    assert f"mmdlm: failed: {photos / 'notes.txt'}" in capsys.readouterr().err


def test_changed_prompt_is_refused_redone_or_kept(loaded, photos, tmp_path, capsys):
    out = tmp_path / "captions.jsonl"
    given = ["caption", str(photos), "--out", str(out)]
    assert main(given) == 0
    given += ["--length", "2"]
    assert main(given) == 2
    told = capsys.readouterr().err
    assert "4 results made with other settings: length was" in told
    assert "--redo" in told
    assert "--keep" in told
    assert main([*given, "--keep"]) == 0
    assert "0 done, 4 done before" in capsys.readouterr().err
    assert main([*given, "--redo"]) == 0
    assert "4 done, 0 done before" in capsys.readouterr().err
    assert len(out.read_text().splitlines()) == 4
    assert main(given) == 0
    assert main([*given, "--keep", "--redo"]) == 2
    assert main(["caption", str(photos), "--keep"]) == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="needs file names that are bytes")
def test_names_that_are_not_utf8_are_printed(loaded, photos, capfd):
    (photos / "0.png").rename(photos / os.fsdecode(b"caf\xe9.png"))
    assert main(["caption", str(photos)]) == 0
    assert f"{photos}/caf%E9.png: " in capfd.readouterr().out


def test_help_explains_resuming(capsys):
    for command in ("caption", "answer", "describe", "transcribe", "embed"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        told = " ".join(capsys.readouterr().out.split())
        for part in ("again to resume", "--redo", "--keep", "Failures are also listed", "skipped"):
            assert part in told, command


def test_broken_file_without_out_ends_with_status_1(loaded, photos, capsys):
    (photos / "2.png").write_bytes(b"broken")
    assert main(["caption", str(photos)]) == 1
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 3
    assert "2.png" in told.err


def test_answer_with_and_without_pictures(loaded, photos, capsys):
    assert main(["answer", str(photos), "--question", "is it red ?", "--choices", "yes,no"]) == 0
    found = capsys.readouterr().out.splitlines()
    assert len(found) == 4
    assert all(line.endswith((": yes", ": no")) for line in found)
    assert main(["answer", "--question", "is it red ?", "--length", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["question"] == "is it red ?"
    with pytest.raises(SystemExit):
        main(["answer", str(photos)])
    assert "--question" in capsys.readouterr().err


def test_one_question_about_several_images(loaded, photos, capsys):
    first, second = str(photos / "0.png"), str(photos / "1.png")
    given = ["--question", "is it red ?", "--length", "2"]
    assert main(["answer", "--image", first, "--image", second, *given]) == 0
    content = [{"type": "image", "image": first}, {"type": "image", "image": second}]
    content.append({"type": "text", "text": "is it red ?"})
    wanted = mmdlm.answer(loaded, [{"role": "user", "content": content}], length=2)
    assert capsys.readouterr().out == f"is it red ?: {wanted}\n"
    assert main(["answer", first, "--image", second, *given]) == 2
    assert "--image is for one question" in capsys.readouterr().err


def test_stop_texts_end_answers(loaded, photos, capsys):
    image, question = str(photos / "0.png"), "is it red ?"
    whole = mmdlm.answer(loaded, question, image, length=6).split()
    stops = [whole[3], whole[4]]
    wanted = " ".join(whole[: min(map(whole.index, stops))])
    given = ["--question", question, "--length", "6"]
    ends = [word for stop in stops for word in ("--stop", stop)]
    assert main(["answer", image, *given, *ends]) == 0
    assert capsys.readouterr().out == f"{image}: {wanted}\n"
    assert main(["answer", "--image", image, *given, *ends]) == 0
    assert capsys.readouterr().out == f"{question}: {wanted}\n"
    assert main(["answer", "--image", image, *given, *ends, "--choices", "yes,no"]) == 2
    assert "choices= and stop= exclude each other" in capsys.readouterr().err


def test_infill_and_embed(loaded, photos, capsys):
    image = str(photos / "0.png")
    assert main(["infill", "a [MASK] circle", "[MASK:2] circle", "--image", image]) == 0
    found = capsys.readouterr().out.splitlines()
    assert found[0].startswith("a ")
    assert found[1].endswith("circle")
    assert main(["embed", image]) == 0
    assert "32 numbers" in capsys.readouterr().out


def test_task_without_a_prompt_says_what_to_pass(loaded, photos, capsys):
    loaded.preset = {}
    assert main(["caption", str(photos)]) == 2
    assert "--prompt" in capsys.readouterr().err


def test_info_of_a_folder(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    checkpoint.save(model, tmp_path / "mine")
    assert main(["info", str(tmp_path / "mine")]) == 0
    text = capsys.readouterr().out
    count = sum(p.numel() for p in model.parameters())
    words = ("mask 2 <mask>", "end 1 <eos>", "padding 0 <pad>")
    for part in (f"{count:,}", "cascade", *words, "ViT", "circle", "float32", "no limit"):
        assert part in text


def test_info_counts_the_tokens_of_an_image(golden, tmp_path, capsys):
    source = golden / "vision" / "lavida_llada"
    settings = json.loads((source / "config.json").read_text())
    roles = {"mask": "mask", "eos": "eos", "pad": "eos"}
    ids = {f"{name}_token_id": settings["ids"][role] for name, role in roles.items()}
    config = settings["llm"] | settings["mm"] | ids | {"vision_config": settings["vision_tower"]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava_llada"} | config))
    shutil.copy(source / "weights.safetensors", tmp_path / "model.safetensors")
    image = source / "img0.png"
    told = "160 x 90 pixels, 660 tokens of 5 views; 197 tokens beside other images"
    for folder, want in ((tmp_path, told), ("tiny", "160 x 90 pixels, 16 tokens")):
        assert main(["info", str(folder), "--image", str(image)]) == 0
        assert f"image img0.png{want}".replace(" ", "") in "".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"template": "chatml"}, "the family's, chatml"),
        ({"template": "chatml", "own": "{{ x }}"}, "the checkpoint's own"),
        ({"template": "llada"}, "none: text is taken as it is"),
        ({"context": 2048, "attention": "block_causal", "block_size": 4}, "2,048 tokens"),
        ({"stop_ids": (260,), "shift": True}, "also end 260 <|im_end|>"),
    ],
)
def test_info_of_a_text_model(speller, given, told, monkeypatch):
    model = speller(["<|im_start|>", "<|im_end|>"], **given)
    found = facts(model)
    assert told in " ".join(found.values())
    count = sum(p.numel() for p in model.parameters())
    assert found["memory"].endswith("(weights only)")
    for kind, size in (("float32", 4), ("bfloat16 or float16", 2), ("int8", 1), ("int4", 0.5)):
        assert f"{kind} {count * size / 1e6:.1f} MB" in found["memory"]
    cache = model.backbone.cache(1, 1)
    size = sum(t.numel() for t in (*cache.keys, *cache.values))
    assert f"per token {4 * size:,} bytes in float32, {2 * size:,} in bfloat16" in found["KV cache"]
    if "context" in given:
        assert found["KV cache"].endswith(f"{2 * size * 2048 / 1e6:.1f} MB for the whole context")
        assert found["attention"] == "block_causal, blocks of 4"


def test_info_without_a_tokenizer_names_ids_only(golden):
    found = facts(checkpoint.load(golden / "backbones" / "llada", device="meta"))
    files = "mask 150 (config.json), end 149 (config.json), padding 149 (config.json)"
    assert found["special ids"] == files
    assert "no use without a tokenizer" in found["chat template"]
    assert found["context"] == "256 tokens of prompt and answer"


def test_info_tells_experts(golden):
    model = checkpoint.load(golden / "backbones" / "llada2_moe", device="meta")
    moe, found = model.spec.transformer.moe, facts(model)
    assert f"{moe.experts} of width {moe.inner}" in found["experts"]
    count = sum(p.numel() for p in model.parameters())
    blocks = [block.moe for block in model.backbone.blocks if block.moe is not None]
    size = 3 * model.spec.transformer.width * moe.inner
    idle = len(blocks) * (moe.experts - moe.top) * size
    assert f"{count - idle:,} parameters at work" in found["experts"]
    assert f"in {len(blocks)} layers" in found["experts"]


def test_saved_model_is_used_from_its_folder(model, photos, tmp_path, capsys):
    checkpoint.save(model, tmp_path / "mine")
    args = ["--model", str(tmp_path / "mine"), "--prompt", "describe it", "--length", "3"]
    assert main(["caption", str(photos / "0.png"), *args]) == 0
    wanted = mmdlm.caption(model, photos / "0.png", prompt="describe it", length=3)
    assert capsys.readouterr().out == f"{photos / '0.png'}: {wanted}\n"


@pytest.mark.parametrize("what", ["decoding", "strategies", "families", "simulators", "configs"])
def test_lists(what, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["list", what]) == 0
    known = {
        "decoding": "fast_dllm",
        "strategies": "threshold.Threshold",
        "families": "LLaDA",
        "simulators": "metaworld/TASK",
        "configs": "train/tiny",
    }
    assert known[what].lower() in capsys.readouterr().out.lower()


def test_make_scenes(tmp_path, capsys):
    assert main(["data", "make", "scenes", str(tmp_path / "s"), "--count", "3"]) == 0
    assert len(list((tmp_path / "s").glob("*.png"))) == 3


def test_make_episodes_records_missing_tasks_only(tmp_path, capsys):
    pytest.importorskip("pyarrow", reason='needs pip install "mmdlm[data]"')
    args = ["data", "make", "episodes", str(tmp_path), "--tasks", "toy", "--size", "16"]
    assert main([*args, "--episodes", "2"]) == 0
    assert "2 episodes" in capsys.readouterr().out
    assert main([*args, "--episodes", "2"]) == 0
    assert "recorded before" in capsys.readouterr().out
    assert main([*args, "--episodes", "9"]) == 2
    assert "holds 2 episodes, not 9" in capsys.readouterr().err


@dataclass(frozen=True)
class Way:
    """How.

    Args:
        speed: metres per second.
        loud: whether it is heard.
    """

    speed: float = 1.5
    loud: bool = False


def example(
    files: list[str],
    way: Way,
    mode: Literal["a", "b"] = "a",
    names: list[str] | None = None,
    horizon: int | None = 200,
    place: Path = Path("here"),
    quick: bool = True,
) -> int:
    """Does it.

    Args:
        files: some, 100 %.
        way: how.
        mode: which,
            in two lines.
        names: of them.
        horizon: null for none.
        place: where.
        quick: whether.
    """
    return 0


def test_signature_becomes_options():
    assert arguments(example, ["x", "y"], "t", ("files",)) == {
        "files": ["x", "y"],
        "way": Way(),
        "mode": "a",
        "names": None,
        "horizon": 200,
        "place": Path("here"),
        "quick": True,
    }
    line = "x --speed 2 --loud --mode b --names p,q --horizon null --place there --no-quick"
    found = arguments(example, line.split(), "t", ("files",))
    assert found["way"] == Way(2.0, True)
    assert found["mode"] == "b"
    assert found["names"] == ["p", "q"]
    assert found["horizon"] is None
    assert found["place"] == Path("there")
    assert found["quick"] is False


@pytest.mark.parametrize("line", ["", "x --mode c", "x --horizon many", "x --spee 2"])
def test_wrong_options_are_refused(line, capsys):
    with pytest.raises(SystemExit) as stopped:
        arguments(example, line.split(), "t", ("files",))
    assert stopped.value.code == 2
    assert capsys.readouterr().err


def test_trace_draws_how_an_answer_came_about(model, photos, tmp_path, capsys):
    checkpoint.save(model, tmp_path / "mine")
    args = ["--model", str(tmp_path / "mine"), "--prompt", "describe it", "--length", "3"]
    out = tmp_path / "trace.gif"
    assert main(["caption", str(photos / "0.png"), *args, "--trace", str(out)]) == 0
    assert Image.open(out).n_frames > 1
    shown = capsys.readouterr()
    wanted = mmdlm.caption(model, photos / "0.png", prompt="describe it", length=3)
    assert shown.out == f"{photos / '0.png'}: {wanted}\n"
    assert "trace.gif: drawn" in shown.err
    assert main(["caption", str(photos), *args, "--trace", str(out)]) == 2
    assert "--trace draws one answer, here are" in capsys.readouterr().err


def test_bench_presets_draws_accuracy_against_forwards(tmp_path, capsys):
    out, plot = tmp_path / "presets.jsonl", tmp_path / "presets.png"
    given = ["plain,parallel,daedal", "--tasks", "captions", "--count", "2"]
    assert main(["bench", "presets", *given, "--out", str(out), "--plot", str(plot)]) == 0
    shown = capsys.readouterr().out
    assert "daedal: DAEDAL requires full attention, but this model has cascade" in shown
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {line["decoding"]: line["forwards"] for line in lines}["plain"] == 20
    assert all(line["value"] >= 0.5 for line in lines)
    assert Image.open(plot).width > 400
    assert main(["bench", "presets", "plain", "--tasks", "sums"]) == 2
    assert "known: captions, speech, act" in capsys.readouterr().err
