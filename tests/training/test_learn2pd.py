"""The trainer of `Learn2PD`, on a model whose confidence shows which tokens are right."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from mmdlm.backbones.kv import take
from mmdlm.decoding.commits.learn2pd import Learn2PD
from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.decode import decode
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.layout import arrange
from mmdlm.training.learn2pd import record, train_filter

VOCAB, MASK, LENGTH, BLOCK = 20, 19, 12, 6


class HalfRight:
    """Predicts every other token right at once, and the token after it once it is committed.

    Right predictions have probability 0.7, wrong ones 0.4, committed tokens 0.95. So a threshold of
    0.9 takes one forward per token, and one of 0.4 commits wrong tokens.
    """

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.spec = SimpleNamespace(
            mask_id=MASK,
            eos_id=0,
            stop_ids=(),
            shift=False,
            attention="full",
            block_size=None,
            context=None,
            fits=lambda length: None,
            transformer=SimpleNamespace(vocab=VOCAB),
        )
        nowhere = SimpleNamespace(keys=(), keep=lambda rows: None, whole_batch=False)
        self.backbone = SimpleNamespace(cache=lambda batch, length: nowhere)

    def arrange(self, rows):
        return arrange(rows, pad=0, attention="full")

    def run(self, sequence, rows, read, kv, columns=None, mask=None):
        tokens, at = sequence.tokens, sequence.positions
        key = (tokens * sequence.mask)[:, : tokens.shape[1] - LENGTH].sum(1, keepdim=True)
        place = at - at[:, -LENGTH : -LENGTH + 1]  # within the answer
        truth = (7 * key + 3 * place + place * place) % 18
        written = tokens != MASK
        before = written.roll(1, 1)
        knows = (place % 2 == 0) | before | written
        says = torch.where(knows, truth, (truth + 1) % 18)
        level = torch.where(written, 0.95, torch.where(knows, 0.7, 0.4))
        # Ties are broken by the position alone.
        level = level + 0.001 * (place % 5)
        odds = torch.log(level / (1 - level) * (VOCAB - 2))
        logits = torch.zeros(*tokens.shape, VOCAB).scatter(2, says[..., None], odds[..., None])
        logits[..., MASK] = -torch.inf
        return take(logits, read)


def questions(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(2, 6, (count,), generator=generator).tolist()
    return [torch.randint(1, 18, (n,), generator=generator) for n in sizes]


SHORT = {"block": BLOCK, "epochs": 600, "patience": 300, "rate": 0.03, "progress": False}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("filter") / "filter.safetensors"
    return out, train_filter(HalfRight(), questions(30), LENGTH, out, **SHORT)


@pytest.mark.parametrize("trajectory", ["oracle", "plain"])
def test_a_trained_filter_saves_forwards_at_equal_tokens(trajectory, trained, tmp_path) -> None:
    out, scores = trained
    if trajectory == "plain":
        out = tmp_path / "filter.safetensors"
        scores = train_filter(
            HalfRight(), questions(30), LENGTH, out, trajectory=trajectory, **SHORT
        )
    assert scores.precision == 1.0
    assert scores.recall > 0.95
    assert scores.decided > 50
    model = HalfRight()
    for held_out in questions(12, seed=1):
        plain = decode(model, held_out[None], LENGTH, [Blocks(BLOCK)])
        fast = decode(model, held_out[None], LENGTH, [Blocks(BLOCK), Learn2PD(out)])
        assert fast.tokens.equal(plain.tokens)
        assert plain.nfe == LENGTH
        # Two per block if the filter was trained on the steps of a perfect filter.
        assert fast.nfe == 4 if trajectory == "oracle" else fast.nfe < LENGTH
        strict = decode(model, held_out[None], LENGTH, [Blocks(BLOCK), Threshold(0.9)])
        loose = decode(model, held_out[None], LENGTH, [Blocks(BLOCK), Threshold(0.4)])
        assert strict.nfe == LENGTH
        assert not loose.tokens.equal(plain.tokens)


def test_the_same_seed_trains_the_same_filter(trained, tmp_path) -> None:
    out, scores = trained
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert train_filter(HalfRight(), questions(30), LENGTH, tmp_path / "again", **SHORT) == scores
    assert (tmp_path / "again").read_bytes() == out.read_bytes()
    train_filter(HalfRight(), questions(30), LENGTH, tmp_path / "other", seed=1, **SHORT)
    assert (tmp_path / "other").read_bytes() != out.read_bytes()
    assert torch.get_rng_state().equal(before)


def test_the_file_holds_sizes_and_scores(trained) -> None:
    with safe_open(trained[0], "pt") as file:
        header = json.loads(file.metadata()["mmdlm"])
    assert header["kind"] == "learn2pd filter"
    assert header["sizes"] == {"size": 6, "hidden": 6}
    assert (header["notes"]["accept"], header["notes"]["precision"]) == (0.9, 1.0)


@pytest.mark.parametrize("oracle", [True, False])
def test_every_step_of_every_prompt_is_recorded(oracle) -> None:
    prompts = questions(5)
    seen = record(HalfRight(), prompts, LENGTH, BLOCK, oracle, batch_size=2, hide=True)
    # If all final predictions are committed at once, a block takes two steps, else one per token.
    steps = 2 if oracle else BLOCK
    assert seen.prompt.bincount().tolist() == [2 * steps] * 5
    assert seen.real.all()
    for i in range(5):
        one = seen.of(torch.tensor([i]))
        alone = record(HalfRight(), prompts[i : i + 1], LENGTH, BLOCK, oracle, hide=True)
        assert one.final.equal(alone.final)
        torch.testing.assert_close(one.confidences, alone.confidences)
    assert (
        seen.of(torch.tensor([0])).masked.sum(1).tolist()
        == ([6, 3] if oracle else [6, 5, 4, 3, 2, 1]) * 2
    )
    knows = (seen.confidences > 0.5) == seen.final
    assert knows.all()


def test_a_short_last_block_and_a_model_that_is_never_right() -> None:
    class Wavering(HalfRight):
        """Predicts other tokens in the second decode, whatever is committed."""

        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def run(self, *given):
            self.calls += 1
            return super().run(*given).roll(0 if self.calls <= LENGTH else 1, -1)

    seen = record(Wavering(), questions(1), LENGTH, 8, True, hide=True)
    # Rows without a final prediction commit the rest of their block, here all of it.
    assert len(seen.final) == 2
    assert not seen.final.any()
    assert seen.real.sum(1).tolist() == [8, 4]
    assert seen.confidences[1, 4:].eq(1).all()
    assert not seen.masked[1, 4:].any()


def test_too_few_prompts_are_an_error(tmp_path) -> None:
    with pytest.raises(ValueError, match="2 prompts, expected at least 3"):
        train_filter(HalfRight(), questions(2), LENGTH, tmp_path / "f", **SHORT)
    with pytest.raises(ValueError, match="trajectory is 'best'"):
        train_filter(HalfRight(), questions(3), LENGTH, tmp_path / "f", trajectory="best", **SHORT)


def test_a_filter_that_accepts_nothing_has_no_precision(tmp_path) -> None:
    given = SHORT | {"epochs": 1}
    scores = train_filter(HalfRight(), questions(3), LENGTH, tmp_path / "f", accept=0.99, **given)
    assert math.isnan(scores.precision)
    assert (scores.recall, scores.epochs) == (0.0, 1)
