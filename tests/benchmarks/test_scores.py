import json

import pytest
import torch

from mmdlm.benchmarks import captions, scores
from mmdlm.benchmarks.answers import Answered, answer, hits, ways
from mmdlm.benchmarks.captions import caption_parts, exact, kind_of, question_parts
from mmdlm.benchmarks.report import Score
from mmdlm.benchmarks.scores import absent, bench, mixed
from mmdlm.benchmarks.speed import race, timed
from mmdlm.benchmarks.success import act_samples, success
from mmdlm.data.scenes import Scenes
from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.lengths.end_of_text import EndOfText


@pytest.fixture(scope="module")
def model(build):
    built = build()
    built.preset = {"act": {"tasks": ["toy"]}}
    return built


@pytest.fixture(scope="module")
def twin(build):
    return build(block_size=1, shift=True)


def right(model, samples, wrong=0):
    """What a model that knows everything answers, but for the first few."""
    truths = [model.tokenizer.encode(turn.answer) for s in samples for turn in s.turns]
    tokens = [[3]] * wrong + truths[wrong:]
    return Answered([model.tokenizer.decode(t) for t in tokens], tokens, [2] * len(tokens), 1.0)


def test_parts_are_new_images_of_one_to_three_shapes():
    parts = caption_parts(3)
    assert list(parts) == ["scene1", "scene2", "scene3"]
    for part, samples in parts.items():
        assert [sample.group for sample in samples] == [part] * 3
        assert [len(sample.turns) for sample in samples] == [1] * 3
    trained = Scenes(objects=(2,), seed=0, count=3, questions=0)

    def pixels(example):
        return example.media("image")[0].tobytes()

    assert pixels(parts["scene2"][0]) != pixels(trained.sample(0, None))
    assert pixels(caption_parts(3)["scene3"][2]) == pixels(parts["scene3"][2])


def test_questions_are_grouped_by_kind():
    parts = question_parts(40)
    assert set(parts) == {
        *("colour", "count", "neighbour", "presence", "relation", "shape", "size"),
    }
    assert sum(map(len, parts.values())) == 200
    for kind, samples in parts.items():
        assert all(kind_of(sample.turns[0].prompt) == kind for sample in samples)
    assert parts["count"][0].turns[0].answer in ("one", "two", "three")
    assert kind_of("who are you ?") == "other"


def test_hits_compare_word_by_word(model):
    samples = caption_parts(4)["scene3"]
    assert hits(model, samples, right(model, samples)) == [True] * 4
    assert hits(model, samples, right(model, samples, wrong=1)) == [False] + [True] * 3
    longer = right(model, samples)
    longer.tokens[2].append(5)
    assert hits(model, samples, longer) == [True, True, False, True]


def test_scores_of_a_perfect_model(model, monkeypatch):
    monkeypatch.setattr(captions, "answer", lambda m, s, strategies, batch: right(m, s, wrong=1))
    found = exact(model, "captions", "caption", caption_parts(4), "one_step", "known")
    assert [score.part for score in found] == ["scene1", "scene2", "scene3", "all"]
    assert [score.value for score in found] == [0.75] * 4
    assert found[-1].count == 12
    assert found[-1].low < 0.75 < found[-1].high
    assert found[0].low < found[-1].low  # more answers, narrower interval
    assert found[-1].ms == pytest.approx(250)
    assert found[-1].metric == "exact"


def test_answers_do_not_depend_on_the_batch(model):
    samples = caption_parts(3)["scene2"]
    together = answer(model, samples, [TopK(steps=2)], batch=3)
    alone = answer(model, samples, [TopK(steps=2)], batch=1)
    assert together.tokens == alone.tokens
    assert together.forwards == alone.forwards == [2, 2, 2]
    assert together.seconds > 0


def test_decodings_by_name(model, twin):
    found = ways(model, "caption", "preset, one_step,parallel,plain")
    assert found == {
        "preset": [Threshold(tau=0.9), EndOfText()],
        "one_step": [TopK(steps=1)],
        "parallel": [Threshold(tau=0.9), EndOfText()],
        "plain": [EndOfText()],
    }
    assert ways(model, "act", "preset") == {"preset": [TopK(steps=1)]}
    assert ways(twin, "caption", "preset,one_step") == {"plain": [EndOfText()]}
    with pytest.raises(FileNotFoundError, match="one_step"):
        ways(model, "caption", "onestep")
    with pytest.raises(ValueError, match="at least one"):
        ways(model, "caption", ",")


def test_timing_counts_the_forwards_of_both_models(model, twin):
    samples = act_samples(model, 3)
    assert timed(model, samples, [TopK(steps=1)], batch=3).forwards == 1
    both = timed(twin, samples, [], batch=2)
    assert both.forwards == 6
    assert both.span("answer") == pytest.approx(both.encode + both.decode)
    assert both.span("decode") == both.decode
    mixed_lengths = [*samples, *caption_parts(1)["scene1"]]
    with pytest.raises(ValueError, match=r"canvases \[6, 20\]"):
        timed(model, mixed_lengths, [], batch=4)


def test_race_runs_on_one_thread_and_restores_the_number(model, twin):
    torch.set_num_threads(2)
    samples = act_samples(model, 4)
    found = race(model, twin, "act", "act", samples, ("a", "b"), batches=(1, 4), rounds=3)
    assert torch.get_num_threads() == 2
    assert [(r.span, r.batch) for r in found] == [
        *(("decode", 1), ("answer", 1), ("decode", 4), ("answer", 4)),
    ]
    for one in found:
        assert one.low <= one.ratio <= one.high
        assert one.threads == 1
        assert (one.forwards, one.twin_forwards) == (1, 6)
        assert one.count == 4
    assert found[0].ms < found[1].ms
    with pytest.raises(ValueError, match="at least 3"):
        race(model, twin, "act", "act", samples, ("a", "b"), rounds=2)


def test_race_skips_equal_decodings(model, twin):
    samples, names = caption_parts(2)["scene1"], ("a", "b")
    given = {"decodings": "preset,parallel,one_step", "batches": (2,), "rounds": 3}
    found = race(model, twin, "captions", "caption", samples, names, **given)
    assert [(r.decoding, r.span) for r in found] == [
        *(("preset", "decode"), ("preset", "answer")),
        *(("one_step", "decode"), ("one_step", "answer")),
    ]
    assert found[0].twin_ms == found[2].twin_ms  # one and the same pass of the twin


def test_success_sums_over_the_tasks_of_the_checkpoint(model):
    found = success(model, "preset", count=2, horizon=3, execute=2)
    assert [score.part for score in found] == ["toy"]
    assert found[0].count == 2
    assert found[0].settings["execute"] == 2
    assert [e["seed"] for e in found[0].settings["episodes"]] == [0, 1]


def test_mixed_alternates_between_parts():
    parts = {"a": [1, 2, 3], "b": [4, 5, 6]}
    assert mixed(parts, 3) == [1, 4, 2]
    assert mixed({}, 3) == []


@pytest.fixture
def loads(monkeypatch, model, twin):
    monkeypatch.setattr(
        scores, "load", lambda name, device, adapter=None: {"m": model, "t": twin}[name]
    )


def test_bench_scores_and_writes_one_line_each(loads, tmp_path, capsys):
    out = tmp_path / "new" / "scores.jsonl"
    assert bench("questions", "m", count=2, decoding="one_step", out=out) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[-1]["part"] == "all"
    assert rows[-1]["count"] == 10
    for row in rows:
        assert row["kind"] == "score"
        assert row["versions"]["torch"]
        assert row["cpu"]
        assert row["threads"] == torch.get_num_threads()
        assert row["date"]
    assert "questions" in capsys.readouterr().out


def test_bench_races_the_twin(loads, tmp_path, monkeypatch):
    monkeypatch.setitem(scores.TASKS, "act", ("act", 20, 2))
    out = tmp_path / "twin.jsonl"
    assert bench("act", "m", "t", count=1, rounds=3, out=out) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["model"] for row in rows if row["kind"] == "score"} == {"m", "t"}
    races = [row for row in rows if row["kind"] == "race"]
    assert {row["batch"] for row in races} == {1, 16}
    assert {row["threads"] for row in races} == {1}


def test_bench_twin_needs_a_twin():
    with pytest.raises(ValueError, match="give the second one"):
        bench("twin", "m")


def test_absent_names_what_is_missing(model):
    assert "audio" in absent(model, "speech")
    assert absent(model, "captions") == ""
    assert absent(model, "act") == ""


def test_score_is_plain_data():
    score = Score("captions", "scene1", "m", "plain", "exact", 0.5, 2)
    assert score.low is None
