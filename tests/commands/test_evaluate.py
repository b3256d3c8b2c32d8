"""`mmdlm eval` on files as users have them."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
from PIL import Image

from mmdlm.benchmarks import questions
from mmdlm.benchmarks.evaluate import compare, evaluate, failures
from mmdlm.checkpoint import save
from mmdlm.commands.main import main
from mmdlm.data import scenes
from mmdlm.data.dataset import Dataset, example
from mmdlm.data.formats import open_data
from mmdlm.messages import Turn

COUNT = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Drawn images with captions; two captions are wrong."""
    folder = tmp_path_factory.mktemp("eval")
    rows = []
    for i in range(COUNT):
        scene = scenes.random_scene(np.random.default_rng(i), 1 + i % 2)
        Image.fromarray(scenes.draw(scene)).save(folder / f"{i}.png")
        caption = "a large cow" if i in (2, 5) else scenes.describe(scene)
        asked = [{"type": "image", "image": f"{i}.png"}]
        asked.append({"type": "text", "text": "describe the picture"})
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": caption}]
        rows.append({"messages": messages, "group": f"{1 + i % 2} shapes"})
    (folder / "scenes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def run(capsys, *words):
    """Exit status, standard output and standard error of a command on the CPU."""
    capsys.readouterr()
    status = main(["eval", "--device", "cpu", *map(str, words)])
    return status, *capsys.readouterr()


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def test_scores_by_group_with_intervals(data, capsys):
    path = data / "scenes.jsonl"
    status, out, _ = run(capsys, "--data", path, "--metrics", "exact,wer", "--json")
    assert status == 0
    found = {(one["part"], one["metric"]): one for one in lines(out)}
    whole = found["all", "exact"]
    assert (whole["count"], whole["value"]) == (COUNT, pytest.approx(10 / 12))
    assert 0.5 < whole["low"] < 10 / 12 < whole["high"] <= 1
    assert found["1 shapes", "exact"]["value"] == pytest.approx(5 / 6)
    assert found["2 shapes", "exact"]["count"] == 6
    assert found["all", "wer"]["value"] > 0
    status, out, _ = run(capsys, "--data", path)
    assert re.search(r"all\s*│\s*12 │.*│\s*83\.3 │", out)
    assert all(name in out for name in ("cider", "bleu", "rouge", "exact", "1 shapes"))


def test_failures_and_contact_sheet_of_two_decodings(data, tmp_path, capsys):
    (tmp_path / "one.yaml").write_text(
        "- class_path: mmdlm.decoding.commits.top_k.TopK\n  init_args: {steps: 1}\n"
    )
    failed, sheet = tmp_path / "failed.jsonl", tmp_path / "sheet.png"
    status, out, _ = run(
        *(capsys, "--data", data / "scenes.jsonl", "--metrics", "exact"),
        *("--against", tmp_path / "one.yaml", "--failed", failed, "--sheet", sheet, "--json"),
    )
    assert status == 0
    compared = [one for one in lines(out) if one["kind"] == "comparison"]
    whole = next(one for one in compared if one["part"] == "all")
    assert whole["wins"] + whole["losses"] + whole["ties"] == COUNT
    assert whole["low"] <= whole["difference"] <= whole["high"]
    written = lines(failed.read_text())
    assert {one["place"].partition(", ")[2] for one in written} >= {"line 3", "line 6"}
    cow = next(one for one in written if one["targets"] == ["a large cow"])
    assert cow["file"] in (str(data / "2.png"), str(data / "5.png"))
    assert cow["question"] == "describe the picture"
    assert cow["answer"].startswith("a ")
    assert cow["scores"] == cow["against_scores"] == {"exact": 0.0}
    card = np.asarray(Image.open(sheet).convert("RGB")).astype(int)
    drawn = np.asarray(Image.open(cow["file"]).convert("RGB")).reshape(-1, 3)
    colours = {tuple(colour) for colour in card.reshape(-1, 3).tolist()}
    assert len({tuple(c) for c in drawn.tolist()} & colours) > 20  # the image is on a card
    assert (180, 40, 30) in colours  # wrong answers are red


def test_a_stopped_run_goes_on(data, tmp_path, capsys, monkeypatch):
    out, words = tmp_path / "replies.jsonl", ("--data", data / "scenes.jsonl", "--metrics", "exact")
    whole = run(capsys, *words, "--json")[1]
    real, asked = questions.fill, []

    def stops(model, examples, *given, **more):
        asked.append(len(examples))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(model, examples, *given, **more)

    monkeypatch.setattr(questions, "fill", stops)
    assert run(capsys, *words, "--out", out, "--batch-size", 5)[0] == 130
    assert len(out.read_text().splitlines()) == 5
    status, said, _ = run(capsys, *words, "--out", out, "--batch-size", 5, "--json")
    assert status == 0
    assert asked == [5, 5, 5, 2]

    def plain(text):
        return [(one["part"], one["value"], one["low"], one["count"]) for one in lines(text)]

    assert plain(said) == plain(whole)
    run(capsys, *words, "--out", out)
    assert len(asked) == 4  # nothing is left to ask


def test_rows_that_fail_are_named_and_the_rest_is_scored(data, tmp_path, capsys):
    rows = (data / "scenes.jsonl").read_text().splitlines()[:4]
    rows[1] = rows[1].replace("1.png", "absent.png")
    rows[3] = rows[3].replace("describe the picture", "who is Zarathustra ?")
    path = data / "broken.jsonl"
    path.write_text("\n".join(rows))
    status, out, said = run(capsys, "--data", path, "--metrics", "exact", "--json")
    assert status == 1
    assert next(one for one in lines(out) if one["part"] == "all")["count"] == 2
    assert "line 2: FileNotFoundError" in said
    assert "absent.png" in said
    assert "line 4: ValueError" in said


def test_accepted_answers_and_rows(tmp_path, build):
    questions_ = [
        {"question_id": i, "image_id": i, "question": "what shape is it ?"} for i in (1, 2)
    ]
    answers = [
        {
            "question_id": i,
            "image_id": i,
            "answers": [{"answer": "yes"}] * 6 + [{"answer": "no"}] * 4,
        }
        for i in (1, 2)
    ]
    (tmp_path / "v2_questions.json").write_text(json.dumps({"questions": questions_}))
    (tmp_path / "v2_annotations.json").write_text(json.dumps({"annotations": answers}))
    (tmp_path / "images").mkdir()
    for i in (1, 2):
        Image.new("RGB", (32, 32)).save(tmp_path / "images" / f"{i}.png")
    dataset = open_data(tmp_path / "v2_questions.json", length=1)
    dataset.connect(build().processor)
    asked, _ = questions.questions(dataset)
    assert [one.targets for one in asked] == [("yes",) * 6 + ("no",) * 4] * 2
    assert len(questions.questions(dataset, rows=1)[0]) == 1


def test_data_sets_of_a_training_config(tmp_path, capsys):
    (tmp_path / "train.yaml").write_text(
        "data:\n  train: {}\n  val:\n    drawn:\n      class_path: mmdlm.data.scenes.Scenes\n"
        "      init_args: {seed: 7, count: 6, questions: 2, caption: false}\n"
    )
    status, out, _ = run(capsys, "--data", tmp_path / "train.yaml", "--rows", 3, "--json")
    assert status == 0
    found = lines(out)
    assert {one["metric"] for one in found} == {"exact", "f1"}
    assert (found[0]["what"], found[0]["count"]) == ("drawn", 6)  # three rows of two questions


def test_columns_of_a_table(data, capsys):
    (data / "table.csv").write_text("photo,words\n0.png,a large cow\n1.png,a large cow\n")
    columns = ("--columns", "image=photo,answer=words", "--metrics", "exact", "--json")
    status, out, _ = run(capsys, "--data", data / "table.csv", *columns)
    assert status == 0
    assert [(one["count"], one["value"]) for one in lines(out)] == [(2, 0.0)]


def test_another_model_is_worse(data, tmp_path, capsys, build):
    save(build(), tmp_path / "untrained")
    status, out, said = run(
        *(capsys, "--data", data / "scenes.jsonl", "--metrics", "exact", "--rows", 8),
        *("--against", tmp_path / "untrained", "--length", 20, "--json"),
    )
    assert status == 0
    whole = next(one for one in lines(out) if one["kind"] == "comparison")
    assert (whole["model"], whole["against"]) == ("tiny", str(tmp_path / "untrained"))
    assert (whole["losses"], whole["other"]) == (0, 0.0)
    assert whole["wins"] == round(8 * whole["value"]) >= 6
    assert whole["low"] > 0
    assert "filled the canvas of 20 tokens" in said


def test_two_models_are_compared_on_what_both_answered(data, build):
    models = [build(seed=seed) for seed in (0, 1)]
    path = data / "scenes.jsonl"
    found = [evaluate(m, open_data(path, length=1), ["f1"], length=6, rows=8) for m in models]
    for one in compare(*found):
        assert one.difference == pytest.approx(one.value - one.other)
    mirrored = compare(*reversed(found))
    for one, other in zip(compare(*found), mirrored, strict=True):
        assert (one.wins, one.losses) == (other.losses, other.wins)
        assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=1e-12)
    worst = failures(found[0])
    scores = [one.scores[0]["f1"] for one in worst]
    assert scores == sorted(scores)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--metrics", "exact,spice"), "metrics is exact,spice, expected different ones of exact"),
        (("--metrics", "exact,exact"), "expected different ones of exact"),
        (("--sheet", "sheet.txt"), "sheet is sheet.txt, expected the name of an image file"),
        (("--columns", "image"), "columns is image, expected such as image=photo"),
        (("--metrics", "vqa"), "vqa: a question has 1 accepted answers"),
        (("--redo",), "--redo and --keep are about earlier results"),
    ],
)
def test_wrong_options_are_named(words, error, data, capsys):
    status, out, said = run(capsys, "--data", data / "scenes.jsonl", *words)
    assert (status, out) == (2, "")
    assert error in said


@pytest.mark.parametrize(
    ("metric", "lost", "error"),
    [("exact,vqa", "none", "expected the ten of VQA"), ("cider", "pycocoevalcap", "mmdlm\\[eval")],
)
def test_metrics_are_tried_before_anything_is_decoded(
    metric, lost, error, data, capsys, monkeypatch
):
    asked = []
    monkeypatch.setattr(questions, "fill", lambda *given, **more: asked.append(1))
    for known in [m for m in sys.modules if m.partition(".")[0] == lost]:
        monkeypatch.delitem(sys.modules, known)
    monkeypatch.setitem(sys.modules, lost, None)
    status, _, said = run(capsys, "--data", data / "scenes.jsonl", "--metrics", metric)
    assert status == 2
    assert re.search(error, said)
    assert not asked


def test_a_yaml_file_without_data_sets_is_named(tmp_path, capsys):
    (tmp_path / "data.yaml").write_text("class_path: mmdlm.data.scenes.Scene\n")
    status, _, said = run(capsys, "--data", tmp_path / "data.yaml")
    assert status == 2
    assert "data.yaml" in said


def test_actions_are_not_scored_as_texts():
    class Moves(Dataset):
        def __len__(self):
            return 1

        def sample(self, index, rng):
            return example([Turn("go", np.zeros((3, 2), np.float32), 3)])

    with pytest.raises(ValueError, match="the answer is not a text; eval scores texts"):
        questions.questions(Moves())


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    text = capsys.readouterr().out
    assert "mmdlm eval --model my-model --data test.jsonl" in text
    assert "1,000 resamples of the rows" in text
