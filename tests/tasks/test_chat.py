import json

import pytest
import torch

import mmdlm
import mmdlm.tasks.chat as module
from mmdlm import checkpoint
from mmdlm.decoding.guidance.allowed import Allowed, Slot
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
            patched.setattr(module, "to_answers", lambda *_, **__: None)
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


@pytest.mark.parametrize("names", [None, {"bos_token": "<|im_start|>"}])
def test_without_a_prompt_a_text_begins_with_bos_or_nothing(speller, names):
    model = speller(MARKERS, names=names)
    begin = torch.tensor([model.tokenizer.encode("<|im_start|>" if names else "")]).long()
    wanted = mmdlm.decode(model, begin, 6).history.confidence[0].tolist()
    found = mmdlm.generate(model, ["", "hi"], length=6, chat=False, details=True)
    assert found[0].confidence == pytest.approx(wanted[: len(found[0].confidence)])
    assert found[1].text == mmdlm.generate(model, "hi", length=6, chat=False)


def test_without_a_prompt_a_shifted_family_begins_after_the_end_token(speller):
    model = speller(MARKERS, shift=True)
    wanted = mmdlm.decode(model, torch.tensor([[model.spec.eos_id]]), 6).tokens[0, 1:].tolist()
    found = mmdlm.generate(model, "", length=6, chat=False, details=True).tokens
    assert list(found) == wanted[: len(found)]


def test_what_is_not_a_prompt_is_rejected(chatty):
    for prompt in (None, 3, ["hi", []], ["hi", None]):
        with pytest.raises(ValueError, match="the prompt is .*expected text or a conversation"):
            mmdlm.generate(chatty, prompt, length=2)


@pytest.mark.parametrize("chat", [False, None])
def test_white_space_of_the_text_is_kept(speaker, chatty, chat):
    """Indentation and the last line break of a continued text; prompt and text are one text."""
    wanted = "    return x + 1\n"
    for model in (speaker, chatty):
        ids = [*model.tokenizer.encode(wanted), model.spec.eos_id]
        forced = [Allowed([Slot(i, i + 1, [token]) for i, token in enumerate(ids)])]
        options = {"length": len(ids), "strategies": forced, "chat": chat}
        assert mmdlm.generate(model, "def f(x):\n", **options) == wanted


def test_an_answer_that_the_assistant_has_begun_is_continued(chatty):
    begun = [TALK[0], {"role": "assistant", "content": "Sure, "}]
    prompt = chatty.prompt(begun)
    assert chatty.tokenizer.decode(prompt.tolist()).endswith("assistant\nSure, ")
    wanted = mmdlm.decode(chatty, prompt[None], 5).tokens[0, len(prompt) :].tolist()
    found = mmdlm.generate(chatty, begun, length=5, details=True)
    assert list(found.tokens) == wanted[: len(found.tokens)]
    assert not found.text.startswith("Sure")


def test_the_fault_of_one_prompt_names_its_index(chatty):
    for bad in ("a \ud83d", "a <|mask|>", [{"role": "bot", "content": "x"}], [{"role": "user"}]):
        with pytest.raises(ValueError, match="^item 2: "):
            mmdlm.generate(chatty, ["fine", "too", bad], length=2, batch_size=2)


def test_half_of_a_surrogate_pair_is_named_with_its_place(chatty):
    assert chatty.prompt("a \ud83d\ude00").equal(chatty.prompt("a \U0001f600"))
    for chat in (False, True):
        for text in ("ok \ud83d", "ok \ude00", "ok \ude00\ud83d", "\U0001f600k \udcff."):
            with pytest.raises(ValueError, match="half of a surrogate pair, .* at position 3"):
                chatty.prompt(text, chat=chat)


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
