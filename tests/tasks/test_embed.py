import pytest
import torch

import mmdlm
from encoders.whisper import WhisperEncoder


def test_vectors_have_unit_length_and_do_not_depend_on_the_batch(model, images):
    found = mmdlm.embed(model, image=images)
    assert found.shape == (5, 32)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.norm(dim=1), torch.ones(5))
    alone = torch.stack([mmdlm.embed(model, image=one) for one in images])
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found, mmdlm.embed(model, image=images, batch_size=2))


def test_texts_of_unequal_length_are_not_changed_by_padding(model):
    texts = ["a", "a red circle left of a blue square"]
    found = mmdlm.embed(model, text=texts)
    alone = torch.stack([mmdlm.embed(model, text=text) for text in texts])
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("bfloat16", 1e-3)])
def test_batch_size_changes_embeddings_by_rounding_only(dtype, bound):
    model = mmdlm.load("tiny", dtype=dtype, device="cpu")
    texts = [" ".join(["red", "circle", "left"] * n) for n in (1, 2, 11, 3, 1, 7)]
    found = [mmdlm.embed(model, text=texts, batch_size=size) for size in (1, 4, 6)]
    assert max((one - found[0]).abs().max() for one in found) < bound


def test_an_empty_text_has_no_embedding(model):
    with pytest.raises(ValueError, match="neither media nor text"):
        mmdlm.embed(model, text="")


def test_embedding_is_the_mean_over_all_tokens(model):
    tokens = model.prompt("a red circle")[None]
    hidden = model.hidden(mmdlm.layout.from_tokens(tokens, None, "cascade", None))[0].mean(0)
    torch.testing.assert_close(
        mmdlm.embed(model, text="a red circle"), (hidden / hidden.norm()).detach()
    )


def test_modalities_are_combined(model, images):
    clip = WhisperEncoder.example(0)
    found = mmdlm.embed(model, image=images[:2], audio=clip, text="a circle")
    assert found.shape == (2, 32)
    assert mmdlm.embed(model, audio=[clip]).shape == (1, 32)
    assert mmdlm.embed(model, image=[]).shape == (0, 32)


def test_invalid_arguments_are_rejected(model, images):
    with pytest.raises(ValueError, match="got no input"):
        mmdlm.embed(model)
    with pytest.raises(ValueError, match="lists have lengths"):
        mmdlm.embed(model, image=images, text=["a", "red"])
