"""Commands and code of the README run as shown."""

import re
import shlex
from pathlib import Path

import pytest

from mmdlm.commands.main import main
from mmdlm.commands.table import COMMANDS as KNOWN

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True)[1:]
    for kind, block in BLOCKS
    if kind == "bash"
    for line in block.splitlines()
    if line.startswith("mmdlm ")
]
# These take minutes or need a simulator; only their options are checked.
LONG = ("fit", "act", "drive", "bench", "export")


def test_readme_has_commands():
    assert {command[0] for command in COMMANDS} >= {"caption", "answer", "transcribe", "act"}


def test_short_commands_run_as_written(tmp_path, monkeypatch, capsys):
    pytest.importorskip("espeakng_loader", reason='pip install "mmdlm[speech]"')
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS:
        made_later = any(
            name in " ".join(command) for name in ("my-tiny", "data/", "my.jsonl", "runs/")
        )
        if command[0] in LONG or made_later:
            continue
        assert main(command) == 0, command
    said = capsys.readouterr().out
    assert "0000000.png" in said
    assert len((tmp_path / "captions.jsonl").read_text().splitlines()) == 100


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c[0] in ("act", "drive", "bench", "export")]
)
def test_options_of_long_commands_exist(command, capsys):
    name = next(" ".join(command[:n]) for n in (2, 1) if " ".join(command[:n]) in KNOWN)
    with pytest.raises(SystemExit) as end:
        main([*name.split(), "--help"])
    assert end.value.code == 0
    help_text = capsys.readouterr().out
    assert all(part in help_text for part in command if part.startswith("--"))


def test_first_lines_caption_an_image(tmp_path, monkeypatch, capsys):
    import numpy as np
    from PIL import Image

    from mmdlm.data.scenes import Scenes

    sample = Scenes(objects=(1,), seed=5).sample(0, np.random.default_rng(0))
    Image.fromarray(sample.media("image")[0]).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    first = next(block for kind, block in BLOCKS if kind == "python")
    exec(compile(first, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() == sample.turns[0].answer


def test_own_data_of_the_readme_are_checked_shown_and_learned(tmp_path, monkeypatch, capsys):
    import numpy as np
    import soundfile
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    rows = re.search(r"```json\n(.*?)```", README, re.DOTALL)[1]
    (tmp_path / "my.jsonl").write_text(rows, encoding="utf-8")
    Path("photos").mkdir()
    Path("clips").mkdir()
    for name in ("cat", "dog"):
        Image.effect_noise((64, 64), 99).save(f"photos/{name}.png")
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 16000)
    soundfile.write("clips/hello.wav", noise.astype(np.float32), 16000)
    mine = [command for command in COMMANDS if "my.jsonl" in command]
    assert [command[:2] for command in mine] == [["data", "check"], ["data", "show"], ["fit", "-c"]]
    for command in mine:
        more = ["--steps", "1"] if command[0] == "fit" else []
        assert main([*command, *more]) == 0, command
    said = capsys.readouterr().out
    assert "What│does│it│do│?│It│sleeps│." in said
    assert Path("sheet.png").is_file()
    Path("photos/cat.png").unlink()
    assert main(mine[0]) == 1
    assert "my.jsonl, line 1: missing file" in capsys.readouterr().out


def test_streams_and_sessions_of_the_readme_run(tmp_path, monkeypatch, capsys):
    import numpy as np
    import torch
    from PIL import Image

    import mmdlm
    from mmdlm.data import scenes

    scene = scenes.random_scene(np.random.default_rng(3), 1)
    (tmp_path / "pictures").mkdir()
    Image.fromarray(scenes.draw(scene)).save(tmp_path / "pictures" / "0000000.png")
    monkeypatch.chdir(tmp_path)
    code = next(block for kind, block in BLOCKS if kind == "python" and "mmdlm.stream" in block)
    space = {"mmdlm": mmdlm, "torch": torch, "model": mmdlm.load("tiny", device="cpu")}
    exec(code, space)
    assert scenes.describe(scene) in capsys.readouterr().out.splitlines()[-1]
    assert [event.key for event in space["events"]][-1] == space["key"]


def test_strategy_of_the_readme_decodes():
    import torch

    import mmdlm
    from mmdlm.decoding.decode import decode

    code = next(block for kind, block in BLOCKS if kind == "python" and "class Halve" in block)
    space: dict = {"__name__": "halve"}
    exec(
        "from dataclasses import dataclass\nfrom torch import Tensor\n"
        "from mmdlm.decoding.view import View\n"
        "from mmdlm.decoding.strategy import Strategy\nfrom mmdlm.decoding.numerics import rank\n",
        space,
    )
    exec(code, space)
    model = mmdlm.load("tiny")
    done = decode(model, torch.tensor([[5, 6, 7]]), 8, [space["Halve"]()])
    assert (done.tokens[:, 3:] != model.spec.mask_id).all()
    assert done.nfe == 4  # 8 open positions: 4, 2, 1, 1


def test_family_of_the_readme_reads_a_checkpoint():
    code = next(block for kind, block in BLOCKS if kind == "python" and "class Mine" in block)
    space: dict = {"__name__": "mine"}
    exec(
        "from mmdlm.backbones.family import Family, architecture\n"
        "from mmdlm.backbones.llama_config import QWEN2, Ids, read_config\n"
        "from mmdlm.backbones.llama_keys import LLAMA_KEYS\n",
        space,
    )
    exec(code, space)
    config = {"architectures": ["MyDiffusionModel"], "hidden_size": 64}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    assert space["Mine"].matches(config, set())
    spec = space["Mine"].read(config, set())
    assert (spec.family, spec.shift, spec.mask_id) == ("mine", True, 151665)
    assert (spec.transformer.width, spec.transformer.qkv_bias) == (64, True)
