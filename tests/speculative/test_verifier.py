"""Verifier: scores of a causal model with a KV cache."""

from types import SimpleNamespace

import pytest
import torch

from mmdlm.speculative.verifier import Scorer, Verifier, as_verifier, check_vocabulary
from mmdlm.text import Tokenizer


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_cached_scores_equal_uncached_scores(kind: str, causal) -> None:
    model = causal(1, kind)
    fed = []
    hook = model.register_forward_pre_hook(
        lambda _, args, given: fed.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    verifier, plain = Verifier(model), Verifier(model, cached=False)
    a, b, c, d = [5, 6, 7, 8, 9], [5, 6, 7, 10, 11, 12], [9, 9], [9, 20, 7, 8, 9]
    for text, last in (
        (a, None),
        (a, 0),
        (b, 2),
        ([*b, 13], 1),
        (b[:4], 1),
        (c, 1),
        (c, 1),
        (d, 0),
        ([9, 21], 0),
    ):
        tokens = torch.tensor(text)
        got = verifier.score(tokens, last)
        whole = model(input_ids=tokens[None]).logits[0].float()
        size = (len(text) - 1 if last is None else last) + 1
        assert got.shape == (size, 50)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, whole[-size:], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(plain.score(tokens, last), got, atol=1e-4, rtol=1e-4)
    hook.remove()
    # Only tokens after the common prefix with the previous text, and the scored positions.
    assert fed[0::3] == [5, 1, 3, 2, 2, 2, 2, 4, 1]
    assert verifier.forwards == plain.forwards == 9


def test_scoring_the_first_token_is_rejected(causal) -> None:
    verifier = Verifier(causal())
    for last in (2, -1):
        with pytest.raises(ValueError, match=f"last is {last} of 2 tokens"):
            verifier.score(torch.tensor([3, 4]), last)


def test_end_ids_come_from_the_generation_config(causal) -> None:
    assert Verifier(causal()).ends == {1}
    model = causal(5)
    model.generation_config.eos_token_id = [1, 7]
    assert Verifier(model).ends == {1, 7}
    model.generation_config.eos_token_id = None
    assert Verifier(model).ends == frozenset()


def test_model_in_training_mode_is_rejected(causal) -> None:
    model = causal(6)
    with pytest.raises(ValueError, match="training mode"):
        Verifier(model.train())
    model.eval()


def test_verifier_is_returned_unchanged(causal) -> None:
    verifier = Verifier(causal())
    assert isinstance(verifier, Scorer)
    assert as_verifier(verifier) is verifier
    assert isinstance(as_verifier(causal()), Verifier)


class Words:
    """Minimal transformers tokenizer for the comparison."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}


def test_vocabularies_are_compared(toy, causal) -> None:
    check_vocabulary(toy(), Verifier(causal()))
    with pytest.raises(ValueError, match="the model has 50 ids and the verifier 60"):
        check_vocabulary(toy(), Verifier(causal(vocab=60)))
    spec, tokenizer = toy().spec, Tokenizer.from_words(["a", "b", "c"])
    model = SimpleNamespace(spec=spec, tokenizer=tokenizer)
    same, other = ("<pad>", "<eos>", "<mask>", "a", "b"), ("<pad>", "<eos>", "<mask>", "b", "x")
    check_vocabulary(model, Verifier(causal(vocab=60), Words(*same)))
    with pytest.raises(
        ValueError,
        match="2 of the verifier's tokens .* 'b' is 3 in the verifier and 4 in the model",
    ):
        check_vocabulary(model, Verifier(causal(), Words(*other)))
    with pytest.raises(ValueError, match="'x' is 0 in the verifier and missing"):
        check_vocabulary(model, Verifier(causal(), Words("x")))
