import json

import pytest
import torch

import mmdlm
import mmdlm.tasks.chat as module
from mmdlm import checkpoint
from mmdlm.tasks.generate import Answer

pytestmark = pytest.mark.filterwarnings("ignore:.*filled the canvas")
MARKERS = ["<|im_start|>", "<|im_end|>"]
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "why"},
]


@pytest.fixture
def speaker(speller):
    """A model without a chat template."""
    return speller(MARKERS)


@pytest.fixture
def chatty(speller):
    """A model with the template of its family."""
    return speller(MARKERS, template="chatml")


def test_text_becomes_a_user_message(chatty):
    found = mmdlm.generate(chatty, "hi", length=4)
    assert isinstance(found, str)
    assert found == mmdlm.generate(chatty, [{"role": "user", "content": "hi"}], length=4)
    prompt = chatty.prompt("hi")
    tokens = mmdlm.decode(chatty, prompt[None], 4).tokens[0, len(prompt) :].tolist()
    answer = mmdlm.generate(chatty, "hi", length=4, details=True)
    assert isinstance(answer, Answer)
    assert list(answer.tokens) == tokens[: len(answer.tokens)]


def test_conversation_includes_earlier_turns(chatty):
    details = [mmdlm.generate(chatty, t, length=6, details=True) for t in (TALK, TALK[2:])]
    assert details[0].confidence != details[1].confidence
    assert len(chatty.prompt(TALK)) > len(chatty.prompt(TALK[2:]))


@pytest.mark.parametrize("kind", ["texts", "conversations", "both"])
def test_list_equals_single_prompts(chatty, kind):
    items = {
        "texts": ["hi", "a much longer question", "why"],
        "conversations": [TALK, TALK[2:]],
        "both": ["hi", TALK],
    }[kind]
    together = mmdlm.generate(chatty, items, length=5, batch_size=2)
    assert together == [mmdlm.generate(chatty, item, length=5) for item in items]
    assert mmdlm.generate(chatty, [], length=5) == []


def test_length_is_the_argument_or_the_checkpoint_default(chatty, monkeypatch):
    def size(**options):
        found = []
        with monkeypatch.context() as patched:
            patched.setattr(module, "to_answers", lambda *_: None)
            patched.setattr(module, "fill", lambda _, given, *__, **___: found.extend(given))
            patched.setattr(module, "unwrap", lambda *_: None)
            mmdlm.generate(chatty, "hi", strategies="one_step", **options)
        return len(chatty.processor.canvas(found[0].messages))

    assert size() == 128
    assert size(length=3) == 3
    monkeypatch.setattr(chatty, "preset", {"generate": {"length": 9, "strategies": []}})
    assert size() == 9
    assert size(length=2) == 2


def test_equal_seeds_give_equal_answers(chatty):
    drawn = [{"class_path": "mmdlm.decoding.scores.gumbel.Gumbel", "init_args": {}}]
    first = [mmdlm.generate(chatty, "hi", length=8, strategies=drawn, seed=1) for _ in range(2)]
    assert first[0] == first[1]


def test_raw_text_is_continued_without_a_template(chatty):
    assert chatty.prompt("hi", chat=False).tolist() == chatty.tokenizer.encode("hi")
    raw = mmdlm.generate(chatty, "hi", length=6, chat=False, details=True)
    assert raw.confidence != mmdlm.generate(chatty, "hi", length=6, details=True).confidence


def test_model_without_a_template_continues_text(speaker):
    prompt = torch.tensor(speaker.tokenizer.encode("hi"))
    assert torch.equal(speaker.prompt("hi"), prompt)
    assert isinstance(mmdlm.generate(speaker, "hi", length=4), str)
    for given in ({"chat": True}, {}):
        with pytest.raises(ValueError, match="no chat template"):
            mmdlm.generate(speaker, "hi" if given else TALK, length=4, **given)


def test_empty_prompts_are_rejected(speaker, chatty):
    for prompt in ("", ["hi", ""]):
        with pytest.raises(ValueError, match=r"prompt \d is empty"):
            mmdlm.generate(chatty, prompt, length=2, chat=False)
    with pytest.raises(ValueError, match="ends with the assistant"):
        mmdlm.generate(chatty, TALK[:2], length=2)


def test_question_without_an_image_uses_the_template(chatty):
    asked = mmdlm.answer(chatty, "hi", length=4, details=True)
    said = mmdlm.generate(chatty, "hi", length=4, details=True)
    assert (asked.text, asked.confidence) == (said.text, said.confidence)


def test_checkpoint_without_a_full_tokenizer_file_gives_equal_answers(chatty, tmp_path):
    chatty.tokenizer.template = "{{ bos_token }}{{ messages[-1].content }}<|im_end|>"
    chatty.tokenizer.names = {"bos_token": "<|im_start|>"}
    checkpoint.save(chatty, tmp_path)
    again = mmdlm.load(tmp_path, device="cpu")
    wanted = mmdlm.generate(chatty, TALK, length=5, details=True)
    assert mmdlm.generate(again, TALK, length=5, details=True).confidence == wanted.confidence
    backend = chatty.tokenizer.backend
    backend.model.save(str(tmp_path))  # vocab.json and merges.txt
    (tmp_path / "tokenizer.json").unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    added = {
        i: {"content": t.content, "special": t.special}
        for i, t in backend.get_added_tokens_decoder().items()
    }
    config |= {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    again = mmdlm.load(tmp_path, device="cpu")
    assert mmdlm.generate(again, TALK, length=5, details=True).confidence == wanted.confidence
    ids = again.prompt(TALK).tolist()
    assert [ids[0], ids[-1]] == [backend.token_to_id(marker) for marker in MARKERS]
