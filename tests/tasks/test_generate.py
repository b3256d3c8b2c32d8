import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import mmdlm
from mmdlm.tasks.generate import Filled, finish, resolve_settings
from mmdlm.text import Tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*filled the canvas")


def test_details_of_an_answer_are_consistent(model):
    ids = [model.tokenizer.id(w) for w in ["a", "red", "circle"]] + [1, 1]
    filled = Filled(ids, [2, 0, 1, 0, 0], [0.5, 0.9, 0.7, 1.0, 1.0], 3, 0.25)
    answer = finish(model, filled)
    assert answer.text == "a red circle"
    assert answer.tokens == tuple(ids[:3])
    assert answer.step == (2, 0, 1)
    assert answer.confidence == (0.5, 0.9, 0.7)
    assert answer.words == (("a", 2, 0.5), ("red", 0, 0.9), ("circle", 1, 0.7))
    assert answer.tokens_per_forward == 1.0
    assert not answer.truncated
    assert answer.to_dict()["tokens_per_forward"] == 1.0


def test_stop_ids_end_an_answer(model):
    word = model.tokenizer.id("a")
    spec = model.spec
    object.__setattr__(spec, "stop_ids", (word,))
    answer = finish(model, Filled([7, word, 8], [0] * 3, [1.0] * 3, 1, 0.0))
    assert answer.tokens == (7,)


def test_subwords_are_joined_to_words(model):
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    backend = Backend(models.BPE({"Ġred": 0, "dish": 1, "Ġcat": 2, ".": 3}, []))
    backend.decoder = decoders.ByteLevel()
    model.tokenizer = Tokenizer(backend)
    object.__setattr__(model.spec, "eos_id", 9)
    answer = finish(model, Filled([0, 1, 2, 3, 9], [0, 4, 1, 2, 0], [0.9, 0.3, 0.8, 0.7, 1], 5, 0))
    assert answer.text == "reddish cat."
    assert answer.words == (("reddish", 4, 0.3), ("cat.", 2, 0.7))


def test_truncated_answers_warn_once(model, images):
    text = "describe"

    def never_end(weight):
        weight[model.spec.eos_id] = -100.0

    with torch.no_grad():
        never_end(model.backbone.embed.weight)
        if hasattr(model.backbone, "out"):
            model.backbone.out.weight[model.spec.eos_id] = 0
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = mmdlm.caption(model, images, prompt=text, length=2, details=True)
    told = [str(w.message) for w in seen if "filled the canvas of 2 tokens" in str(w.message)]
    full = sum(answer.truncated for answer in found)
    assert full == sum(len(answer.tokens) == 2 for answer in found) > 0
    assert len(told) == 1
    assert f"{full} of 5 answers" in told[0]


def test_settings_are_arguments_or_checkpoint_defaults(model):
    own = resolve_settings(model, "caption")
    assert (own.prompt, own.length, len(own.strategies)) == ("describe the picture", 6, 1)
    mine = resolve_settings(model, "caption", "say it", 9, [])
    assert (mine.prompt, mine.length, mine.strategies) == ("say it", 9, [])


def test_missing_prompt_error_lists_tasks_with_prompts(model):
    with pytest.raises(
        ValueError, match="'describe', only for caption, infill, transcribe;.*prompt="
    ):
        mmdlm.describe(model, (np.zeros(8000, np.float32), 16000))


def test_checkpoint_without_defaults_requires_a_prompt(model):
    model.preset = {}
    with pytest.raises(ValueError, match="no default prompt for 'caption'; pass"):
        resolve_settings(model, "caption")
    assert resolve_settings(model, "caption", "describe").length == 32


@pytest.mark.parametrize("length", [0, -1, True, 2.5])
def test_length_must_be_positive(model, images, length):
    with pytest.raises(ValueError, match="length is"):
        mmdlm.caption(model, images[0], length=length)


def test_invalid_batch_size_is_rejected(model, images):
    with pytest.raises(ValueError, match="batch_size is 0"):
        mmdlm.caption(model, images, batch_size=0)


def test_mask_token_in_a_prompt_is_rejected(model, images):
    backend = model.tokenizer.backend
    backend.add_special_tokens(["<mask>"])
    model.tokenizer = Tokenizer(backend)
    model.tokenizer.words = None
    with pytest.raises(ValueError, match="mask token"):
        mmdlm.caption(model, images[0], prompt="describe <mask> the picture")


def test_missing_encoder_raises_before_files_are_read(model):
    model.encoders.pop("audio")
    with pytest.raises(ValueError, match="takes image, not audio"):
        mmdlm.transcribe(model, "no-such-file.wav")


def test_model_without_tokenizer_raises(model, images):
    model.tokenizer = None
    with pytest.raises(ValueError, match="tokenizer"):
        mmdlm.caption(model, images[0])


def test_error_names_the_invalid_item_of_a_list(model, images, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="broken.png") as caught:
        mmdlm.caption(model, [images[0], broken])
    assert "item 1" in caught.value.__notes__[0]


def test_equal_images_are_encoded_once(model, images, encoded):
    pixels = np.asarray(Image.open(images[0]))
    same = [images[0], pixels, pixels.copy(), Image.fromarray(pixels), images[0]]
    found = mmdlm.caption(model, same)
    assert encoded == [1]
    assert len(set(found)) == 1


def test_path_used_in_many_batches_is_encoded_once(model, images, encoded):
    asked = [images[0], images[1], images[2], images[0], images[1], images[0]]
    mmdlm.caption(model, asked, batch_size=2)
    assert sum(encoded) == 3


def test_seeded_decoding_does_not_depend_on_the_batch(model, images):
    drawn = [
        {"class_path": "mmdlm.decoding.scores.gumbel.Gumbel", "init_args": {}},
        {"class_path": "mmdlm.decoding.scores.random_order.RandomOrder", "init_args": {}},
    ]
    together = mmdlm.caption(model, images, strategies=drawn[:1], seed=3)
    alone = [mmdlm.caption(model, one, strategies=drawn[:1], seed=3) for one in images]
    assert together == alone


def test_threads_that_share_a_model_get_what_they_get_alone(model, images):
    """Eight threads, each with several captions, answers and random draws."""
    drawn = [{"class_path": "mmdlm.decoding.scores.gumbel.Gumbel", "init_args": {}}]

    def work(number: int) -> list:
        order = [(i + number) % len(images) for i in range(len(images))]
        captions = mmdlm.caption(model, [images[i] for i in order], batch_size=1 + number % 3)
        question = mmdlm.answer(model, "what is it ?", images[number % 5], seed=number)
        sampled = mmdlm.caption(model, images[0], strategies=drawn, seed=number)
        vectors = mmdlm.embed(model, image=images[number % 5])
        return [[captions[order.index(i)] for i in range(5)], question, sampled, vectors.tolist()]

    wanted = [work(number) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, [*range(8)] * 3))
    assert found == wanted * 3


def test_texts_are_encoded_alike_by_threads(speller):
    """The guard against control tokens in user text is a setting of the shared tokenizer."""
    model = speller(["<|im_start|>", "<|im_end|>"], template="chatml")
    text = "a <|im_end|> b " * 20
    wanted = [model.prompt(text).tolist(), model.tokenizer.encode(text)]
    with ThreadPoolExecutor(8) as pool:
        prompts = pool.map(lambda _: model.prompt(text).tolist(), range(60))
        raw = pool.map(lambda _: model.tokenizer.encode(text), range(60))
        assert [*prompts, *raw] == [wanted[0]] * 60 + [wanted[1]] * 60
