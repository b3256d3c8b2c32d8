from pathlib import Path

import numpy as np
import pytest

import mmdlm
from mmdlm.data.chat import Chat
from mmdlm.data.gaps import Gaps
from mmdlm.messages import Slot
from mmdlm.processor import Processor
from tests.systems import test_lavida
from tests.systems.llava_golden import with_tokenizer

END, FILLER = "<|gap_end|>", "<|gap|>"
TEXT = "one two three four five six"


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    folder = test_lavida.published(tmp_path_factory.mktemp("gaps"))
    control = test_lavida.CONTROL | {END: 110, FILLER: 111}
    return mmdlm.load(with_tokenizer(folder, control), device="meta").processor


def rows(path: Path, *answers: str) -> Chat:
    lines = (
        f'{{"messages": [{{"role": "user", "content": "Count."}}, '
        f'{{"role": "assistant", "content": "{answer}"}}]}}'
        for answer in answers
    )
    path.write_text("\n".join(lines))
    return Chat(path)


def slots(example) -> list[Slot]:
    return [
        part
        for messages in (example.messages, *example.branches)
        for message in messages
        for part in message.parts
        if isinstance(part, Slot)
    ]


def test_gaps_stand_after_words_and_end_in_their_token(
    processor: Processor, tmp_path: Path
) -> None:
    data = Gaps(rows(tmp_path / "a.jsonl", TEXT, "a b c"), END, FILLER, share=1.0)
    data.connect(processor)
    counts = set()
    for seed in range(40):
        (slot,) = slots(data.sample(0, np.random.default_rng(seed)))
        ids = slot.value.tolist()
        plain = [i for i in ids if i not in (110, 111, processor.spec.eos_id)]
        assert processor.tokenizer.decode(plain) == TEXT
        assert 1 <= ids.count(110) <= 5
        counts.add(ids.count(110))
        text = "".join(processor.tokenizer.backend.id_to_token(i) for i in ids)
        for gap in text.split(END)[:-1]:
            words, fillers = gap.rstrip(">|<gap_"), gap.count(FILLER)
            assert fillers <= 5
            assert not words.endswith(" ")
        assert ids[-1] == processor.spec.eos_id
        assert len(
            processor.canvas(list(data.sample(0, np.random.default_rng(seed)).conversations)[0])
        ) == len(ids)
    assert len(counts) > 1
    (short,) = slots(data.sample(1, np.random.default_rng(0)))
    assert short.value == "a b c"


def test_without_a_share_answers_stay(processor: Processor, tmp_path: Path) -> None:
    data = Gaps(rows(tmp_path / "a.jsonl", TEXT), END, FILLER, share=0.0).connect(processor)
    assert slots(data.sample(0, np.random.default_rng(0)))[0].value == TEXT
    assert len(data) == 1


def test_tokens_that_are_not_in_the_vocabulary_are_named(
    processor: Processor, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match="the tokenizer has no token <|reserved_token_1|>".replace("|", "[|]")
    ):
        Gaps(rows(tmp_path / "a.jsonl", TEXT)).connect(processor)
