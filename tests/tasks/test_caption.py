import numpy as np
import pytest
import torch
from PIL import Image

import mmdlm

pytestmark = pytest.mark.filterwarnings("ignore:.*filled the canvas")


def test_list_equals_single_images(model, images):
    together = mmdlm.caption(model, images)
    assert together == [mmdlm.caption(model, one) for one in images]
    assert together == mmdlm.caption(model, images, batch_size=2)
    assert len(set(together)) > 1


def test_image_types_give_equal_captions(model, images):
    image = Image.open(images[0])
    pixels = np.asarray(image)
    kinds = [image, pixels, torch.from_numpy(pixels.copy()), pixels / 255.0, pixels.tobytes]
    wanted = mmdlm.caption(model, images[0])
    assert [mmdlm.caption(model, kind) for kind in kinds[:-1]] == [wanted] * 4
    with pytest.raises(TypeError, match="read_image"):
        mmdlm.caption(model, kinds[-1])


def test_details_match_the_decode_history(model, images):
    answer = mmdlm.caption(model, images[0], details=True)
    assert answer.text == mmdlm.caption(model, images[0])
    # Six positions, two per step.
    assert answer.forwards == 3
    assert len(answer.tokens) == len(answer.step) == len(answer.confidence)
    assert set(answer.step) <= {0, 1, 2}
    assert all(0 < sure <= 1 for sure in answer.confidence)
    assert [word for word, _, _ in answer.words] == [
        model.tokenizer.decode([token]) for token in answer.tokens
    ]
    assert answer.seconds > 0


def test_prompt_length_and_strategies_are_used(model, images):
    one = mmdlm.caption(
        model, images[0], prompt="what is it ?", length=3, strategies="one_step", details=True
    )
    assert one.forwards == 1
    assert len(one.tokens) <= 3


def test_empty_list_gives_no_captions(model):
    assert mmdlm.caption(model, []) == []


def test_unknown_words_and_presets_raise(model, images):
    with pytest.raises(ValueError, match="pictuer.*picture"):
        mmdlm.caption(model, images[0], prompt="describe the pictuer")
    with pytest.raises(FileNotFoundError, match="no decoding preset 'fastt'"):
        mmdlm.caption(model, images[0], strategies="fastt")


@pytest.mark.parametrize(
    "make",
    [
        lambda p: Image.new("CMYK", (9, 9)).save(p, "TIFF"),
        lambda p: Image.new("P", (9, 9)).save(p, "PNG"),
        lambda p: Image.fromarray(np.zeros((9, 9), np.uint16)).save(p, "PNG"),
        lambda p: Image.new("RGB", (1, 1)).save(p, "PNG"),
    ],
)
def test_unusual_image_files_are_captioned(model, tmp_path, make):
    make(tmp_path / "image")
    assert isinstance(mmdlm.caption(model, tmp_path / "image"), str)


def test_model_is_trainable_after_captioning(model, images):
    mmdlm.caption(model, images[:2])
    model.logits(torch.tensor([[3, 4]])).sum().backward()
    assert model.backbone.embed.weight.grad is not None
