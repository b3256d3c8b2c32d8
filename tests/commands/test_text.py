import io
import json
import re
import sys

import pytest
from PIL import Image

import mmdlm
from mmdlm import checkpoint
from mmdlm.commands import text as terminal
from mmdlm.commands.main import main

pytestmark = pytest.mark.filterwarnings("ignore:.*filled the canvas")
MARKERS = ["<|im_start|>", "<|im_end|>"]


@pytest.fixture
def model(speller, monkeypatch):
    """The model that every command finds under any name."""
    made = speller(MARKERS, template="chatml", context=400)
    made.preset = {"generate": {"length": 4, "strategies": []}}
    monkeypatch.setattr(checkpoint, "load", lambda *a, **k: made)
    return made


@pytest.fixture
def asked(model, monkeypatch):
    """The conversations that reached the model."""
    import mmdlm.tasks.chat as module

    seen, answer = [], module.generate

    def listen(model, prompt, **options):
        seen.append(prompt)
        return answer(model, prompt, **options)

    monkeypatch.setattr(module, "generate", listen)
    return seen


def talk(monkeypatch, text: str, *options: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return main(["chat", "any", *options])


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def test_generate_prints_an_answer_per_text(model, capsys):
    assert main(["generate", "hi", "why", "--batch-size", "1"]) == 0
    wanted = mmdlm.generate(model, ["hi", "why"])
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in wanted)


def test_generate_in_json(model, capsys):
    assert main(["generate", "hi", "--json", "--details", "--length", "3"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["prompt"] == "hi"
    assert record["forwards"] == 3
    assert record["text"] == mmdlm.generate(model, "hi", length=3)


def test_generate_shows_details_below_the_answer(model, capsys):
    assert main(["generate", "hi", "--details"]) == 0
    assert "    4 forwards, " in capsys.readouterr().out


def test_generate_reads_files(model, asked, tmp_path, capsys):
    lines = tmp_path / "prompts.txt"
    lines.write_text("hi\n\nwhy\n")
    assert main(["generate", "first", "--file", str(lines)]) == 0
    assert asked.pop() == ["first", "hi", "why"]
    table = tmp_path / "prompts.jsonl"
    rows = ["hi", {"prompt": "why"}, {"messages": [user("a")], "id": 3}, [user("b")]]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["generate", "--file", str(table)]) == 0
    assert asked.pop() == ["hi", "why", [user("a")], [user("b")]]
    capsys.readouterr()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_generate_reads_files_of_any_editor(model, asked, tmp_path, capsys, mark, end):
    lines, table = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text(f"{mark}hi{end}why", encoding="utf-8", newline="")
    rows = ["hi\u2028there", {"prompt": "why"}]
    text = end.join(json.dumps(row, ensure_ascii=False) for row in rows)
    table.write_text(mark + text, encoding="utf-8", newline="")
    assert main(["generate", "--file", str(lines)]) == 0
    assert asked.pop() == ["hi", "why"]
    assert main(["generate", "--file", str(table)]) == 0
    assert asked.pop() == ["hi\u2028there", "why"]
    capsys.readouterr()


def test_chat_reads_a_pipe_with_a_byte_order_mark(model, asked, monkeypatch, capsys):
    assert talk(monkeypatch, "\ufeffhi\n") == 0
    assert asked[0][0]["content"] == "hi"
    capsys.readouterr()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "ValueError: the line is not valid JSON"),
        ("3", "ValueError: the line has no text and no messages"),
        ('{"text": "x"}', "ValueError: the line has no text and no messages"),
        ('"blue <|mask|> here"', "ValueError: .* holds the mask token"),
        (json.dumps("blue " * 200), "ValueError: .* this model's context is 400"),
        ('"half \\ud83d"', "ValueError: .* half of a surrogate pair, .* at position 5"),
        ('[{"role": "bot", "content": "x"}]', "ValueError: message 0 has role 'bot'"),
        ("[]", r"ValueError: the prompt is \[\], expected text"),
    ],
)
@pytest.mark.parametrize("size", ["1", "2", "16"])
def test_one_bad_line_does_not_cost_the_other_answers(model, tmp_path, capsys, line, message, size):
    file = tmp_path / "p.jsonl"
    file.write_text(f'"hi"\n\n{line}\n"why"\n')
    assert main(["generate", "--file", str(file), "--json", "--batch-size", size]) == 1
    told = capsys.readouterr()
    records = [json.loads(line) for line in told.out.splitlines()]
    wanted = [{"prompt": p, "text": mmdlm.generate(model, p)} for p in ("hi", "why")]
    assert records == wanted
    assert re.search(rf"failed: {re.escape(str(file))}, line 3: {message}", told.err)


def test_generate_resumes_where_it_stopped(model, asked, tmp_path, capsys):
    """After a kill in the middle of a line, too; failures and equal prompts included."""
    file, out = tmp_path / "p.txt", tmp_path / "answers" / "a.jsonl"
    file.write_text("hi\nblue <|mask|>\n  hi\nwhy\nhi\n")
    call = ["generate", "--file", str(file), "--out", str(out), "--batch-size", "2"]
    assert main(call) == 1
    assert "4 done, 0 done before, 1 failed" in capsys.readouterr().err
    whole = out.read_text()
    records = [json.loads(line) for line in whole.splitlines()]
    assert [record["prompt"] for record in records] == ["hi", "  hi", "why", "hi"]
    assert [record["text"] for record in records] == [
        mmdlm.generate(model, record["prompt"]) for record in records
    ]
    (failure,) = map(json.loads, out.with_suffix(".failed.jsonl").read_text().splitlines())
    assert (failure["prompt"], failure["place"]) == ("blue <|mask|>", f"{file}, line 2")
    out.write_text(whole[: whole.rindex("hi")])  # killed while the last line was written
    asked.clear()
    assert main(call) == 1
    assert out.read_text() == whole
    assert "1 done, 3 done before, 1 failed" in capsys.readouterr().err
    assert "why" not in [prompt for prompts in asked for prompt in prompts]
    assert main([*call, "--system", "be brief"]) == 1  # other prompts, in the same file
    assert "4 done, 0 done before, 1 failed" in capsys.readouterr().err


def test_generate_with_other_options_is_refused_redone_or_kept(model, tmp_path, capsys):
    file, out = tmp_path / "p.txt", tmp_path / "a.jsonl"
    file.write_text("hi\nwhy\n")
    call = ["generate", "--file", str(file), "--out", str(out)]
    assert main(call) == 0
    call += ["--length", "3"]
    assert main(call) == 2
    assert "2 results made with other settings: length was" in capsys.readouterr().err
    assert main([*call, "--keep"]) == 0
    assert "0 done, 2 done before" in capsys.readouterr().err
    assert main([*call, "--redo"]) == 0
    assert "2 done, 0 done before" in capsys.readouterr().err
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["text"] for record in records] == [
        mmdlm.generate(model, prompt, length=3) for prompt in ("hi", "why")
    ]


def test_faulty_options_are_reported_before_the_first_answer(model, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("hi\nwhy\n")
    for given in (["--length", "0"], ["--decoding", "nowhere"], ["--batch-size", "0"]):
        assert main(["generate", "--file", str(tmp_path / "p.txt"), *given]) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert "failed" not in told.err


def test_generate_reads_files_of_windows(model, asked, tmp_path, capsys):
    file = tmp_path / "p.TXT"
    file.write_bytes("\ufeffhi\r\n  why\u2028so\r\n".encode())
    assert main(["generate", "--file", str(file)]) == 0
    assert asked.pop() == ["hi", "  why\u2028so"]
    file.write_bytes(b"gr\xfcn\n")
    assert main(["generate", "--file", str(file)]) == 2
    assert f"{file} is not valid UTF-8" in capsys.readouterr().err


def test_generate_with_a_system_message(model, asked, capsys):
    assert main(["generate", "hi", "--system", "be brief"]) == 0
    assert asked == [[[{"role": "system", "content": "be brief"}, user("hi")]]]
    assert main(["generate", "hi", "--system", "be brief", "--raw"]) == 2
    assert "--system has no place" in capsys.readouterr().err


def test_generate_raw_text(model, capsys):
    assert main(["generate", "hi", "--raw", "--json", "--details"]) == 0
    record = json.loads(capsys.readouterr().out)
    wanted = mmdlm.generate(model, "hi", chat=False, details=True)
    assert record["confidence"] == list(wanted.confidence)


def test_generate_without_texts_says_what_to_give(model, capsys):
    assert main(["generate"]) == 2
    assert "--file" in capsys.readouterr().err


def test_chat_remembers_what_was_said(model, asked, monkeypatch, capsys):
    assert talk(monkeypatch, "hi\n\n  why  \n", "--system", "be brief") == 0
    said = capsys.readouterr().out.splitlines()
    opening = {"role": "system", "content": "be brief"}
    first = mmdlm.generate(model, [opening, user("hi")])
    assert asked[0] == [opening, user("hi")]
    reply = {"role": "assistant", "content": first}
    assert asked[1] == [opening, user("hi"), reply, user("  why  ")]  # as it was typed
    assert "\n".join(said) == "\n".join([first, mmdlm.generate(model, asked[1])])


def test_chat_commands(model, asked, monkeypatch, capsys):
    assert talk(monkeypatch, "hi\n/reset\nwhy\n/what\n/exit\nmore\n") == 0
    assert asked == [[user("hi")], [user("why")]]
    told = capsys.readouterr().out
    assert "forgotten" in told
    assert "/what is unknown; /image FILE" in told


def test_chat_shows_forwards_and_seconds_on_request(model, monkeypatch, capsys):
    assert talk(monkeypatch, "hi\n", "--details") == 0
    assert "    4 forwards, 0." in capsys.readouterr().out
    assert talk(monkeypatch, "hi\n") == 0
    assert "forwards" not in capsys.readouterr().out


def test_chat_goes_on_after_an_error(model, asked, monkeypatch, capsys):
    assert talk(monkeypatch, "a <|mask|> b\nhi\n") == 1
    told = capsys.readouterr()
    assert "mask token" in told.err
    assert asked[-1] == [user("hi")]
    assert told.out.strip() == mmdlm.generate(model, "hi")


def test_chat_needs_a_template(speller, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "load", lambda *a, **k: speller())
    assert talk(monkeypatch, "hi\n") == 2
    assert "no chat template" in capsys.readouterr().err


def test_chat_greets_whoever_types(model, monkeypatch, capsys):
    class Keyboard(io.StringIO):
        def isatty(self) -> bool:
            return True

    asked = []
    answers = iter(["hi", "/exit"])
    monkeypatch.setattr(sys, "stdin", Keyboard())
    monkeypatch.setattr("builtins.input", lambda prompt: asked.append(prompt) or next(answers))
    assert main(["chat", "any"]) == 0
    assert asked == ["> ", "> "]
    assert capsys.readouterr().out.startswith(terminal.HELP)


def test_help_of_both_imports_no_torch():
    import subprocess

    code = (
        "import sys; from mmdlm.commands.main import main\n"
        "for name in ('chat', 'generate'):\n"
        "    try: main([name, '--help'])\n"
        "    except SystemExit: pass\n"
        "assert not {'torch', 'jinja2'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.fixture
def seeing(model, monkeypatch):
    """A model with a chat template that takes images."""
    from adapters.mlp import MLP
    from encoders.vit import ViT
    from mmdlm.model import MultimodalDLM

    made = MultimodalDLM(model.spec, {"image": ViT.tiny()}, {"image": MLP(32, 16)}, model.tokenizer)
    made.preset = model.preset
    monkeypatch.setattr(checkpoint, "load", lambda *a, **k: made.eval())
    return made


def test_chat_shows_images_to_the_model(seeing, asked, monkeypatch, capsys, tmp_path):
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for number, file in enumerate(files):
        Image.new("RGB", (20, 10), (100 * number, 0, 0)).save(file)
    lines = [*(f"/image {file}" for file in files), "which is red?", "sure?"]
    assert talk(monkeypatch, "\n".join(lines)) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].endswith("a.png: image, 20 x 10 pixels")
    first, second = asked
    assert [part["type"] for part in first[0]["content"]] == ["image", "image", "text"]
    assert second[0] is first[0]
    assert second[-1] == user("sure?")
    content = [*({"type": "image", "image": str(file)} for file in files)]
    content.append({"type": "text", "text": "which is red?"})
    assert told[2] == mmdlm.generate(seeing, [user(content)])


def test_chat_goes_on_after_a_file_that_cannot_be_read(seeing, monkeypatch, capsys, tmp_path):
    (tmp_path / "a.png").write_bytes(b"words")
    lines = ["/image", f"/image {tmp_path / 'a.png'}", "/image nowhere.png", "/audio a.wav", "hi"]
    assert talk(monkeypatch, "\n".join(lines)) == 1
    told = capsys.readouterr()
    assert told.err.count("mmdlm: error:") == 4
    assert "takes image, not audio" in told.err
    assert told.out.strip() == mmdlm.generate(seeing, "hi")


def test_chat_with_the_bundled_model_answers_each_question_by_itself(monkeypatch, capsys, tmp_path):
    from mmdlm.data.scenes import Scenes, draw

    file = tmp_path / "scene.png"
    Image.fromarray(draw(Scenes(objects=(1,)).scene(3))).save(file)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/image {file}\nhow many shapes are there ?\n"))
    assert main(["chat", "tiny"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == terminal.SINGLE
    assert told[2] == "one"
