import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import mmdlm
from mmdlm.tasks.generate import Filled, finish, settings
from mmdlm.text import Tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*filled the canvas")


def test_details_of_an_answer_fit_together(model):
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


def test_stop_ids_end_an_answer_too(model):
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


def test_full_canvas_warns_once_and_is_marked(model, pictures):
    text = "describe"

    def never_end(weight):
        weight[model.spec.eos_id] = -100.0

    with torch.no_grad():
        never_end(model.backbone.embed.weight)
        if hasattr(model.backbone, "out"):
            model.backbone.out.weight[model.spec.eos_id] = 0
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = mmdlm.caption(model, pictures, prompt=text, length=2, details=True)
    told = [str(w.message) for w in seen if "filled the canvas of 2 tokens" in str(w.message)]
    full = sum(answer.truncated for answer in found)
    assert full == sum(len(answer.tokens) == 2 for answer in found) > 0
    assert len(told) == 1
    assert f"{full} of 5 answers" in told[0]


def test_settings_come_from_the_checkpoint_or_the_caller(model):
    own = settings(model, "caption")
    assert (own.prompt, own.length, len(own.strategies)) == ("describe the picture", 6, 1)
    mine = settings(model, "caption", "say it", 9, [])
    assert (mine.prompt, mine.length, mine.strategies) == ("say it", 9, [])


def test_missing_prompt_names_the_tasks_that_have_one(model):
    with pytest.raises(
        ValueError, match="'describe', only for caption, infill, transcribe;.*prompt="
    ):
        mmdlm.describe(model, (np.zeros(8000, np.float32), 16000))


def test_checkpoint_without_defaults_wants_a_prompt_and_has_a_length(model):
    model.preset = {}
    with pytest.raises(ValueError, match="names no prompt for 'caption'; say"):
        settings(model, "caption")
    assert settings(model, "caption", "describe").length == 32


@pytest.mark.parametrize("length", [0, -1, True, 2.5])
def test_length_must_be_positive(model, pictures, length):
    with pytest.raises(ValueError, match="length is"):
        mmdlm.caption(model, pictures[0], length=length)


def test_wrong_batch_size_is_refused(model, pictures):
    with pytest.raises(ValueError, match="batch_size is 0"):
        mmdlm.caption(model, pictures, batch_size=0)


def test_mask_token_in_a_prompt_is_refused(model, pictures):
    backend = model.tokenizer.backend
    backend.add_special_tokens(["<mask>"])
    model.tokenizer = Tokenizer(backend)
    model.tokenizer.words = None
    with pytest.raises(ValueError, match="mask token"):
        mmdlm.caption(model, pictures[0], prompt="describe <mask> the picture")


def test_missing_encoder_is_named_before_anything_is_read(model):
    model.encoders.pop("audio")
    with pytest.raises(ValueError, match="takes image, not audio"):
        mmdlm.transcribe(model, "no-such-file.wav")


def test_model_without_tokenizer_says_so(model, pictures):
    model.tokenizer = None
    with pytest.raises(ValueError, match="tokenizer"):
        mmdlm.caption(model, pictures[0])


def test_bad_item_of_a_list_is_pointed_out(model, pictures, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="broken.png") as caught:
        mmdlm.caption(model, [pictures[0], broken])
    assert "item 1" in caught.value.__notes__[0]


def test_equal_pictures_are_encoded_once(model, pictures, encoded):
    pixels = np.asarray(Image.open(pictures[0]))
    same = [pictures[0], pixels, pixels.copy(), Image.fromarray(pixels), pictures[0]]
    found = mmdlm.caption(model, same)
    assert encoded == [1]
    assert len(set(found)) == 1


def test_path_asked_about_in_many_batches_is_encoded_once(model, pictures, encoded):
    asked = [pictures[0], pictures[1], pictures[2], pictures[0], pictures[1], pictures[0]]
    mmdlm.caption(model, asked, batch_size=2)
    assert sum(encoded) == 3


def test_seed_makes_random_decoding_repeatable_in_any_batch(model, pictures):
    drawn = [
        {"class_path": "mmdlm.decoding.scores.gumbel.Gumbel", "init_args": {}},
        {"class_path": "mmdlm.decoding.scores.random_order.RandomOrder", "init_args": {}},
    ]
    together = mmdlm.caption(model, pictures, strategies=drawn[:1], seed=3)
    alone = [mmdlm.caption(model, one, strategies=drawn[:1], seed=3) for one in pictures]
    assert together == alone
