import io
import json
import sys
from contextlib import redirect_stdout

import pytest

from tests.speed import decode_speed
from tests.speed.__main__ import main
from tests.speed.decode_speed import Setting, race, ratios, spread, timed
from tests.speed.shapes import SHAPES, Shape, synthetic
from tests.speed.systems import Answer, agreement, passes, runner, strategies

TINY = SHAPES["tiny"]


@pytest.fixture(scope="module")
def raced(tmp_path_factory):
    """`decode --shape tiny` with all modes: its file, status and what it printed."""
    out = tmp_path_factory.mktemp("speed") / "new" / "a.jsonl"
    modes = "none,prefix,dual,prefix-lm,prompt-once"
    args = ["decode", "--shape", "tiny", "--mode", modes, "--rounds", "2"]
    with redirect_stdout(io.StringIO()) as printed:
        status = main([*args, "--json", str(out)])
    return out, status, printed.getvalue()


@pytest.fixture(scope="module")
def records(raced):
    return [json.loads(line) for line in raced[0].read_text().splitlines()]


def test_tiny_shape_passes_the_gate_in_every_mode(raced, records):
    assert raced[1] == 0
    ours = [r for r in records if r["system"] == "mmdlm"]
    exact = [r for r in ours if r["mode"] != "prompt-once"]
    assert len(exact) == 4 * 3
    assert all(r["gate"] is True and r["agreement"] == 1.0 for r in exact)
    once = [r for r in ours if r["mode"] == "prompt-once"]
    assert {r["gate"] for r in once} == {None}
    assert all(0.3 < r["agreement"] <= 1.0 for r in once)


def test_forwards_of_each_mode(records):
    found = {(r["mode"], r["system"]): r["forwards"] for r in records}
    assert {found[mode, "plain"] for mode in ("none", "prefix", "dual", "prompt-once")} == {8}
    assert found["prefix-lm", "plain"] == 9
    assert {n for (_, system), n in found.items() if system == "mmdlm"} == {8}


def test_rounds_are_interleaved_after_a_warm_up(records):
    turns = [(r["round"], r["system"]) for r in records if r["mode"] == "dual"]
    assert turns == [(n, s) for n in (-1, 0, 1) for s in ("plain", "mmdlm")]
    assert [r["warmup"] for r in records if r["mode"] == "dual"] == [True] * 2 + [False] * 4


def test_record_holds_settings_and_cost(records):
    for r in records:
        assert r["kind"] == "decode"
        assert (r["shape"], r["device"], r["dtype"], r["threads"]) == ("tiny", "cpu", "float32", 1)
        assert r["new_tokens"] == 32
        assert r["seconds"] > 0
        assert r["cpu_seconds"] > 0
        assert r["tokens_per_s"] == pytest.approx(32 / r["seconds"])
        assert r["tokens_per_forward"] == 32 / r["forwards"]
        assert len(r["tokens_sha"]) == 16
        assert r["versions"]["torch"]
        assert r["refresh"]
    first, later = records[0], records[2]
    assert first["setup_s"] > later["setup_s"]  # the model is made once
    assert len({r["tokens_sha"] for r in records if r["mode"] == "none"}) == 1
    if sys.platform == "linux":
        assert all(0 <= r["peak_extra_mb"] < 200 for r in records)


def test_table_shows_every_mode(raced):
    printed = raced[2]
    for mode in ("none", "prefix", "dual", "prefix-lm"):
        assert f"tiny  │ {mode} " in printed
    assert "% of" in printed  # prompt-once: the share of the parent's tokens
    assert "yes" in printed
    assert "written to" in printed


def test_compare_pairs_shape_mode_and_round(records, tmp_path, capsys):
    half = [r | {"seconds": r["seconds"] / 2, "cpu_seconds": r["cpu_seconds"]} for r in records]
    a, b = (
        decode_speed.write(tmp_path / name, rows) for name, rows in (("a", records), ("b", half))
    )
    assert main(["compare", str(a), str(b)]) == 0
    printed = capsys.readouterr().out
    assert "2.00x" in printed
    assert "1.00x" in printed
    assert printed.count("yes") >= 8


def test_compare_of_two_systems_in_separate_files(records, tmp_path, capsys):
    files = []
    for system in ("plain", "mmdlm"):
        mine = [r for r in records if r["system"] == system]
        files.append(str(decode_speed.write(tmp_path / system, mine)))
    assert main(["compare", *files]) == 0
    assert "plain > mmdlm" in capsys.readouterr().out


def test_compare_rejects_files_without_common_records(records, tmp_path, capsys):
    a = decode_speed.write(tmp_path / "a", records)
    other = [r | {"shape": "else"} for r in records]
    b = decode_speed.write(tmp_path / "b", other)
    assert main(["compare", str(a), str(b)]) == 2
    assert "share no shape, mode and system" in capsys.readouterr().err
    (tmp_path / "c").write_text("{}\n")
    assert main(["compare", str(a), str(tmp_path / "c")]) == 2
    assert "c, line 1: not a record" in capsys.readouterr().err
    warm = decode_speed.write(tmp_path / "d", [r for r in records if r["warmup"]])
    assert main(["compare", str(warm), str(a)]) == 2
    assert "warm-ups do not count" in capsys.readouterr().err
    assert main(["compare", str(a), "nowhere.jsonl"]) == 2
    assert "nowhere.jsonl: no such file" in capsys.readouterr().err


def test_gate_and_agreement():
    shape = Shape("x", TINY.transformer, (4,), 200, 4, 50)
    same = Answer([[1] * 200], 50)
    assert passes(shape, "float32", same, same)
    assert passes(shape, "float32", Answer([[1] * 200], 49), same)
    assert not passes(shape, "float32", Answer([[1] * 200], 51), same)
    late, early = [1] * 199 + [2], [2] + [1] * 199
    assert agreement([late], same.tokens) == 0.995
    assert not passes(shape, "float32", Answer([late], 50), same)
    assert passes(shape, "bfloat16", Answer([late], 50), same)
    assert not passes(shape, "bfloat16", Answer([early], 50), same)  # in the first block
    assert not passes(shape, "bfloat16", Answer([[1] * 190 + [2] * 10], 50), same)


def test_batch_of_unequal_rows_passes_the_gate():
    rows = Shape("x", TINY.transformer, (9, 30, 17), 16, 8, 8)
    model = synthetic(TINY.transformer)
    for mode in ("none", "prefix", "dual", "prefix-lm"):
        ours, theirs = (runner(s, model, rows, mode)() for s in ("mmdlm", "plain"))
        assert ours.tokens == theirs.tokens
        assert ours.forwards == 8
        assert theirs.forwards == 3 * (8 + (mode == "prefix-lm"))


def test_threshold_shapes_decode_by_threshold():
    assert [type(s).__name__ for s in strategies(SHAPES["thr256"], "dual")] == [
        *("DualCache", "Blocks", "Threshold"),
    ]


def test_ratios_pair_rounds_and_skip_missing_ones():
    a = [{"round": n, "t": t} for n, t in ((0, 4.0), (1, 9.0), (2, 5.0))]
    b = [{"round": n, "t": t} for n, t in ((1, 3.0), (0, 2.0), (2, None))]
    assert ratios(a, b, "t") == [2.0, 3.0]
    assert spread([2.0, 3.0, 4.0]) == "3.00x\n2.00-4.00"
    assert spread([2.0]) == "2.00x"
    assert spread([]) == "-"
    rows = [{"shape": "s", "mode": "m", "system": "x", "warmup": w, "round": 0} for w in (0, 1)]
    assert timed(rows, "s", "m", "x") == rows[:1]


@pytest.mark.gpu
def test_tiny_shape_on_a_gpu():
    found = race([TINY], ["none", "dual"], Setting("cuda", rounds=2, warmup=1))
    ours = [r for r in found if r["system"] == "mmdlm"]
    assert all(r["dtype"] == "bfloat16" and r["peak_extra_mb"] >= 0 for r in ours)
    assert all(r["reserved_mb"] > 0 for r in found)
    for compiled in (False, True):
        setting = Setting("cuda", "float32", rounds=1, warmup=2, compile=compiled)
        exact = race([TINY], ["none", "prefix", "dual"], setting)
        assert all(r["gate"] for r in exact if r["system"] == "mmdlm")
