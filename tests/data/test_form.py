"""Rows of conversations in the forms of published trainers, compared with their rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mmdlm
from mmdlm.data.collate import batch
from mmdlm.data.gaps import Gaps
from mmdlm.data.llava import LLaVA
from mmdlm.model import MultimodalDLM
from mmdlm.training.data import Data
from tests.systems import test_lavida, test_lavida_dream, test_llada_v
from tests.systems.letters import spelled
from tests.systems.llava_golden import WRITTEN
from tests.systems.llava_layouts import lavida, lavida_dream, llada_v

CONTROL, CHATML, HEADERS = (m.CONTROL for m in (test_lavida, test_lavida_dream, test_llada_v))
NAMES = {number: text for text, number in CONTROL.items()}
PAIRS = [("What?", "Red."), ("And the size of it?", "It is so small!"), ("Where?", "Here it is.")]
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
VIEW = {"image_aspect_ratio": "square", "mm_patch_merge_type": "flat"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MultimodalDLM:
    folder = lavida(tmp_path_factory.mktemp("form") / "source", **VIEW, image_template="{}\n")
    return mmdlm.load(folder, device="cpu")


def data_of(folder: Path, model: MultimodalDLM, size: int, **options: Any) -> Data:
    """Two rows of three turns and of one, with an image in front."""
    Image.new("RGB", (20, 30), (200, 10, 10)).save(folder / "a.png")
    rows = []
    for pairs in (PAIRS, PAIRS[1:2]):
        turns = []
        for question, answer in pairs:
            mark = "" if turns else "<image>\n"
            turns.append({"from": "human", "value": mark + question})
            turns.append({"from": "gpt", "value": answer})
        rows.append({"image": "a.png", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    dataset = LLaVA(folder / "rows.json")
    dataset.connect(model.processor, model.preset)
    return Data({"rows": dataset}, size, seed=0, **options)


def texts(row: Any) -> tuple[str, str]:
    """Prompt, with <image> in the place of one, and canvas of a row before the encoders."""
    (turn,) = row.turns
    letters = dict(enumerate(WRITTEN)) | NAMES
    prompt = "".join(
        "".join(letters[i] for i in part.tolist()) if isinstance(part, torch.Tensor) else "<image>"
        for part in turn.parts
    )
    return prompt, spelled([turn.answer], CONTROL, WRITTEN)


def test_one_turn_is_drawn_without_those_before_it(model: MultimodalDLM, tmp_path: Path) -> None:
    form = data_of(tmp_path, model, 2, turns="one", end_of_turn=True, pad=128).form
    dataset = data_of(tmp_path, model, 2).train["rows"]
    seen = []
    for seed in range(40):
        sample = form.of(dataset.sample(0, np.random.default_rng(1)), *_given(model, seed))
        (row,) = model.processor.pack([sample]).rows
        prompt, canvas = texts(row)
        question, answer = next(pair for pair in PAIRS if pair[1] in canvas)
        assert prompt.endswith(
            f"{HEADER.format('user')}<image>\n{question}<|eot_id|>{HEADER.format('assistant')}"
        )
        assert prompt.count("<|end_header_id|>") == 3  # system, user and assistant
        assert canvas == f"{answer}<|eot_id|>"
        seen.append(answer)
    assert min(seen.count(answer) for _, answer in PAIRS) > 5


def _given(model: MultimodalDLM, seed: int) -> tuple[Any, np.random.Generator]:
    return model.processor, np.random.default_rng(seed)


def test_plain_rows_are_an_image_its_text_and_a_line_break(
    model: MultimodalDLM, tmp_path: Path
) -> None:
    data = data_of(tmp_path, model, 2, turns="plain", pad=0)
    (collated,) = data.steps(model.processor)[0].values()
    found = sorted(map(texts, collated.packed.rows))
    answers = [*(answer for _, answer in PAIRS), PAIRS[1][1]]
    assert found == sorted(("<image>", f"{answer}\n") for answer in answers)


@pytest.mark.parametrize("pad", [0, 128])
def test_rows_are_extended_by_end_tokens_that_are_learnt(
    pad: int, model: MultimodalDLM, tmp_path: Path
) -> None:
    data = data_of(tmp_path, model, 2, turns="one", end_of_turn=True, pad=pad)
    steps, extras = data.steps(model.processor), []
    for step in range(8):
        (collated,) = steps[step].values()
        made = batch(model, collated).sequence
        apart = model.embed(collated.packed.rows)
        sizes = apart.mask.sum(1)
        extras.append(made.tokens.shape[1] - int(sizes.max()))
        assert bool(made.mask.all())
        assert bool((made.positions == torch.arange(made.tokens.shape[1])).all())
        for row, size in enumerate(sizes.tolist()):
            last = apart.tokens.shape[1] - size
            assert torch.equal(made.tokens[row, :size], apart.tokens[row, last:])
            assert torch.equal(made.is_answer[row, :size], apart.is_answer[row, last:])
            assert bool(made.is_answer[row, size:].all())
            assert bool((made.tokens[row, size:] == model.spec.eos_id).all())
    if pad == 0:
        assert set(extras) == {0}
    else:
        assert extras.count(0) in range(1, 8)  # of u from -128 to 127, half are negative
        assert 10 < max(extras) < pad


def test_answers_with_gaps_end_their_turn_too(model: MultimodalDLM, tmp_path: Path) -> None:
    data = data_of(tmp_path, model, 2, turns="one", end_of_turn=True, pad=0)
    tokens = {"end": "<|start_header_id|>", "filler": "<|end_header_id|>"}  # in no answer
    data.train["rows"] = Gaps(data.train["rows"], **tokens, share=1.0).connect(model.processor)
    gaps = 0
    for step in range(6):
        (collated,) = data.steps(model.processor)[step].values()
        for row in collated.packed.rows:
            canvas = texts(row)[1]
            gaps += canvas.count(tokens["end"])
            for token in tokens.values():
                canvas = canvas.replace(token, "")
            assert canvas in {f"{answer}<|eot_id|>" for _, answer in PAIRS}
    assert gaps > 0


def test_end_tokens_follow_the_end_of_a_turn(model: MultimodalDLM, tmp_path: Path) -> None:
    data = data_of(tmp_path, model, 2, end_of_turn=True, tail=3, buckets=False)
    endings = set()
    for step in range(6):
        (collated,) = data.steps(model.processor)[step].values()
        for row in collated.packed.rows:
            answer, _, ending = texts(row)[1].partition("<|eot_id|>")
            assert answer in {answer for _, answer in PAIRS}
            endings.add(ending.count("<|endoftext|>"))
    assert endings <= {0, 1, 2, 3}
    assert len(endings) >= 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pad": 1, "tail": 1}, "tail and pad both decide what follows an answer"),
        ({"pad": 1, "pack": 64}, "pack excludes pad and also"),
        ({"also": ["a"], "pack": 64}, "pack excludes pad and also"),
        ({"turns": "two"}, "turns is 'two'"),
        ({"pad": -1}, "pad is -1"),
    ],
)
def test_options_that_contradict_are_rejected(
    options: dict[str, Any], message: str, model: MultimodalDLM, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        data_of(tmp_path, model, 2, **options)


@pytest.mark.parametrize("make", [llada_v, lavida_dream])
def test_control_tokens_are_learnt_wherever_they_occur(make: Any, tmp_path: Path) -> None:
    """The targets of LLaDA-V's and Dream-VL's trainers, where a row has one turn."""
    model = mmdlm.load(make(tmp_path / "source"), device="cpu")
    control = {"lavida_dream": CHATML, "llada_v": HEADERS}[model.system]
    also = [text for text in control if text not in ("<|mask|>", "<|mdm_mask|>", "<|endoftext|>")]
    more = {"end_of_turn": True, "pad": 0, "also": [*also, "\n"]}
    (collated,) = (
        data_of(tmp_path, model, 2, turns="one", **more).steps(model.processor)[0].values()
    )
    sequence = batch(model, collated).sequence
    ids = {control[text] for text in also} | {WRITTEN.index("\n")}
    for row, packed in enumerate(collated.packed.rows):
        (turn,) = packed.turns
        wanted = []
        for part in turn.parts:
            if isinstance(part, torch.Tensor):
                wanted += [token in ids for token in part.tolist()]
            else:
                wanted += [False] * len(model.encode("image", [part])[0])
        wanted += [True] * (sequence.tokens.shape[1] - len(wanted))
        assert sequence.is_answer[row].tolist() == wanted
        assert sum(wanted) > len(turn.answer) + 5
    with pytest.raises(ValueError, match="also holds 'ab', which has 2 tokens, expected one"):
        data_of(tmp_path, model, 2, also=["ab"]).steps(model.processor)[0]


def test_an_answer_must_leave_room_for_the_end_of_its_turn(
    model: MultimodalDLM, tmp_path: Path
) -> None:
    data = data_of(tmp_path, model, 2, end_of_turn=True)
    data.train["rows"].length = len(PAIRS[1][1])
    with pytest.raises(ValueError, match="has 16 tokens with the end of its turn, but its slot"):
        data.steps(model.processor)[0]
