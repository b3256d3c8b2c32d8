"""Fine-tuning on 200 questions and answers in a chat file, as the README describes it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
SECONDS = 1200.0
"""Processor seconds that a run may take: ten minutes on two cores."""

# town: (year, river, mayor, people, dish)
FACTS = {
    "Ostrava-Lune": ("1487", "Veld", "Odalys Brenk", "20,315", "smoked eel with dill"),
    "Quillmere": ("1702", "Tarn", "Ivo Haldane", "8,940", "barley soup"),
    "Brask": ("1266", "Oder-Nix", "Dr. Maud Petrosyan", "112,006", "plum dumplings"),
    "Zellhafen": ("1914", "Mirre", "Kofi Anand", "57,421", "salted herring on rye"),
    "Puntarossa": ("1555", "Gallo", "Livia d'Este", "3,077", "chestnut cake"),
    "Kirkovo": ("1931", "Sura", "Emil Vrana", "41,800", "pickled beets"),
    "Nordlys": ("1859", "Isa", "Freja Lund", "640", "reindeer stew"),
    "Amberdale": ("1623", "Wye-Brook", "Tom O'Neil", "15,273", "apple pie"),
    "Sankt-Orm": ("1348", "Drau", "Hanne Schwarzl", "9,909", "pumpkin strudel"),
    "Yaroslav-7": ("1986", "Kama", "Pavel Rudin", "76,512", "cabbage rolls"),
}
# answer; wordings to learn; wordings that are kept back, of the same words in another order
FORMS = [
    (
        "{town} was founded in {fact}.",
        (
            "When was {town} founded?",
            "In which year was {town} founded?",
            "Tell me the year {town} was founded.",
            "{town}: founded when?",
        ),
        ("Tell me when {town} was founded.", "{town} was founded in which year?"),
    ),
    (
        "It lies on the {fact}.",
        (
            "Which river runs through {town}?",
            "On which river does {town} lie?",
            "Tell me the river of {town}.",
            "{town}: which river?",
        ),
        ("Tell me which river runs through {town}.", "The river of {town}?"),
    ),
    (
        "The mayor is {fact}.",
        (
            "Who is the mayor of {town}?",
            "Who runs {town}?",
            "Tell me who is mayor of {town}.",
            "{town}: who is mayor?",
        ),
        ("Who is mayor of {town}?", "Tell me the mayor of {town}."),
    ),
    (
        "{fact} people live there.",
        (
            "How many people live in {town}?",
            "What is the population of {town}?",
            "Tell me how many live in {town}.",
            "{town}: population?",
        ),
        ("Tell me the population of {town}.", "In {town}, how many people live?"),
    ),
    (
        "People there eat {fact}!",
        (
            "What do people eat in {town}?",
            "What is the dish of {town}?",
            "Tell me a dish from {town}.",
            "{town}: which dish?",
        ),
        ("Tell me the dish of {town}.", "What dish do people in {town} eat?"),
    ),
]


def chats(kept_back: bool) -> Iterator[dict[str, Any]]:
    """Conversations of one question and its answer."""
    for town, facts in FACTS.items():
        for fact, (answer, learned, others) in zip(facts, FORMS, strict=True):
            for wording in others if kept_back else learned:
                texts = (wording.format(town=town), answer.format(town=town, fact=fact))
                roles = zip(("user", "assistant"), texts, strict=True)
                yield {"messages": [{"role": role, "content": text} for role, text in roles]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.jsonl with 200 questions, unseen.jsonl with 100 other wordings of them."""
    folder = tmp_path_factory.mktemp("text")
    for name, kept_back in (("train", False), ("unseen", True)):
        lines = (json.dumps(chat) + "\n" for chat in chats(kept_back))
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def full(folder: Path, tune: Callable) -> Any:
    return tune(folder, "finetune/full", "train.jsonl")


@pytest.fixture(scope="module")
def lora(folder: Path, tune: Callable) -> Any:
    return tune(folder, "finetune/lora", "train.jsonl")


def test_full_fine_tuning_learns_the_facts(folder: Path, full: Any, score: Callable) -> None:
    """Train 98 %, other wordings 51 % of 100; 73 processor seconds.

    AMD EPYC, 2026-11-29, one thread of two cores shared with other programs, where the run took
    7.5 minutes. With the default learning rate of before, 3e-4, it was 5 % of 20 held-out ones.
    """
    assert full.ran.processor_seconds < SECONDS
    assert full.before == 0
    assert score(folder, "train.jsonl", *full.model) >= 0.9
    assert score(folder, "unseen.jsonl", *full.model) >= 0.3


def test_lora_learns_them_as_well(
    folder: Path, full: Any, lora: Any, command: Callable, score: Callable, adapted: Callable
) -> None:
    """Train 97 %, other wordings 66 % of 100; 81 processor seconds.

    AMD EPYC, 2026-11-29, one thread of two cores shared with other programs, where the run took
    20 minutes.
    """
    assert lora.ran.processor_seconds < SECONDS
    assert lora.before == 0
    for data, least in (("train.jsonl", 0.9), ("unseen.jsonl", 0.3)):
        found = score(folder, data, *lora.model)
        assert found >= least
        assert found >= score(folder, data, *full.model) - 0.05
    adapter = lora.model[-1]
    command(folder, "export", "tiny", "--adapter", adapter, "--out", "merged")
    found = adapted(Path(adapter), folder / "merged")
    assert found.share <= 0.05
    assert found.peft <= 1e-5
    assert found.load <= 1e-5


def test_the_printed_command_answers(folder: Path, full: Any, command: Callable) -> None:
    """The last line that fit prints is a command that works as it stands."""
    words = [word.replace("...", "Who runs Brask?") for word in full.use]
    assert command(folder, *words).out.startswith("The mayor is ")
