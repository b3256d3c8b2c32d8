import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mmdlm.decoding.caches.dual_cache import DualCache
from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import Decoded, decode
from mmdlm.decoding.guidance.suppress import Suppress
from mmdlm.decoding.lengths.dystruct import Dystruct
from mmdlm.decoding.lengths.end_of_text import EndOfText

MASK, EOS, LENGTH, SIZES = 15, 0, 12, (7, 4, 6, 5)
TOKENS = torch.randint(1, 14, (4, 7), generator=torch.Generator().manual_seed(6))
REAL = torch.stack([torch.arange(7) >= 7 - size for size in SIZES])
AT_ONCE = Threshold(0)


def settings(seed: int, slope: float = 0.0, mix: float = 0.0) -> dict:
    ids = {"mask_id": MASK, "eos_id": EOS if slope else None, "shift": 0}
    return {"seed": seed, "vocab": 16, "scale": 12.0, "mix": mix, "eos_slope": slope, **ids}


@pytest.fixture
def certain(synthetic, monkeypatch) -> Callable[..., tuple]:
    """certain(sure, text): a model whose answer is known, with these probabilities."""

    def make(sure: list[float], text: list[int] | None = None) -> tuple:
        model = synthetic(settings(0, slope=1.0))
        text = text or [1 + i % 9 for i in range(len(sure))]

        def run(sequence, rows, read, *_: object) -> Tensor:
            logits = torch.zeros(*sequence.tokens.shape, 16)
            for i, (p, token) in enumerate(zip(sure, text, strict=True), 2):
                if i < logits.shape[1]:
                    logits[:, i, token] = math.log(p / (1 - p) * 14)  # 14 others of weight 1
            logits[..., MASK] = -torch.inf
            return logits[:, read] if isinstance(read, slice) else logits[0][read]

        monkeypatch.setattr(model, "run", run)
        return model, torch.tensor([[3, 4]])

    return make


def opened(got: Decoded) -> list[list[int]]:
    """Answer positions by the step that filled them."""
    steps = got.history.step[0]
    return [(steps == i).nonzero()[:, 0].tolist() for i in range(int(steps.max()) + 1)]


def blocks(uncertainty: list[float], **given: float) -> list[int]:
    free = [False] * len(uncertainty)
    return Dystruct(**given)._divide(uncertainty, free, [True] * len(uncertainty))


def test_equal_uncertainty_is_one_block_and_a_jump_opens_another() -> None:
    assert blocks([0.3] * 8) == [0] * 8
    assert blocks([0.1, 0.1, 0.12, 0.9, 0.85, 0.9]) == [0, 0, 0, 1, 1, 1]
    assert blocks([0.3] * 8, alpha=1e9) == list(range(8))
    assert blocks([0.1, 0.9, 0.1], alpha=1e-9, spread=5.0) == [0, 0, 0]


def test_larger_blocks_attract_more() -> None:
    far = 0.55  # too far for a block of one position, not for a larger one
    assert blocks([0.1, far]) == [0, 1]
    assert blocks([0.1] * 9 + [far]) == [0] * 10


def test_line_breaks_and_known_tokens_end_blocks() -> None:
    values, free = [0.3] * 6, [False] * 6
    inside = [False, True, False, False, False, False]
    plan = Dystruct(structure=5.0)
    assert plan._divide(values, inside, [True] * 6) == [0, 0, 1, 1, 1, 1]
    assert plan._divide(values, free, [True, True, False, True, True, False]) == [
        0,
        0,
        -1,
        1,
        1,
        -1,
    ]


def test_the_least_uncertain_block_opens_first_unless_another_has_more_context(certain) -> None:
    model, prompt = certain([0.6] * 9 + [0.99] * 9 + [0.3] * 9)
    first, second, third = (list(range(i, i + 9)) for i in (0, 9, 18))
    plans = [Dystruct(1, context=x, spread=0.05, repair_threshold=0) for x in (0, 9)]
    certainty, context = (opened(decode(model, prompt, 27, [plan, AT_ONCE])) for plan in plans)
    assert certainty == [second, first, third]
    assert context == [first, second, third]  # each next to positions known by then


def test_uncertain_tokens_at_a_block_boundary_are_decided_once_more(certain) -> None:
    model, prompt = certain([0.95, 0.95, 0.9, 0.4, 0.35, 0.4])
    got = decode(model, prompt, 6, [Dystruct(growth=1, repair_threshold=0.5), AT_ONCE])
    # Blocks in steps 0 and 1, then position 3: at the boundary, and below 0.5.
    assert got.history.step.tolist() == [[0, 0, 0, 2, 1, 1]]
    assert got.nfe == 3
    none = decode(model, prompt, 6, [Dystruct(growth=1, repair_threshold=0), AT_ONCE])
    assert none.nfe == 2


def test_repaired_tokens_count_in_the_mean_probability(certain) -> None:
    sure = [0.95, 0.95, 0.9, 0.4, 0.35, 0.4] + [0.9] * 20
    model, prompt = certain(sure)
    got = decode(model, prompt, 6, [Dystruct(growth=2, expansion=5, alpha=1.0), AT_ONCE])
    # Position 3 is decided again in step 2; then round(5 * 0.658) = 3 masks are appended, not 4.
    assert got.history.step[0, :9].tolist() == [0, 0, 0, 2, 1, 1, 3, 3, 3]
    assert got.history.step[0, 9] > 3


def test_masks_are_appended_by_the_mean_probability_until_the_text_ends(certain) -> None:
    sure, text = [0.9] * 4 + [0.5] * 20, [5] * 9 + [EOS] + [7] * 14
    model, prompt = certain(sure, text)
    plan = Dystruct(growth=9, expansion=5, repair_threshold=0, alpha=1e-9)
    got = decode(model, prompt, 4, [plan, AT_ONCE])
    # 4, then round(5 * 0.9) more, then round(5 * 0.5) that hold the end of the text.
    assert got.history.step[0].tolist() == [0] * 4 + [1] * 5 + [2] * 3
    plan = Dystruct(growth=2, repair_threshold=0, alpha=1e-9)
    short = decode(model, prompt, 4, [plan, AT_ONCE])
    assert short.tokens.shape[1] == 2 + 8


@pytest.mark.parametrize("steps", [None, 3])
def test_one_block_without_growth_is_the_plain_decode(steps: int | None, synthetic) -> None:
    plan = Dystruct(growth=1, repair_threshold=0, alpha=1e-9, spread=9)
    more = [TopK()] if steps is None else [Threshold(0.7)]
    for seed in range(4):
        model = synthetic(settings(seed))
        one, plain = (decode(model, TOKENS[:1], LENGTH, [*s, *more]) for s in ([plan], []))
        assert one.tokens.equal(plain.tokens)
        assert one.history.step.equal(plain.history.step)


@pytest.mark.parametrize("seed", range(3, 11))
@pytest.mark.parametrize("more", [[], [Threshold(0.6)], [Threshold(0.5), EndOfText()], [TopK(6)]])
def test_rows_of_a_batch_equal_the_rows_alone(seed: int, more: list, synthetic) -> None:
    model, chosen = synthetic(settings(seed, slope=4.0)), [Dystruct(2.5, 6, spread=0.1), *more]
    got = decode(model, TOKENS, LENGTH, chosen, mask=REAL)
    for i, size in enumerate(SIZES):
        alone = decode(model, TOKENS[i : i + 1, -size:], LENGTH, chosen)
        answer, rest = alone.tokens[0, size:].tolist(), got.tokens.shape[1] - 7
        assert got.tokens[i, 7:].tolist() == answer + [EOS] * (rest - len(answer))
        assert got.history.step[i, : len(answer)].equal(alone.history.step[0])
        assert got.forwards[i] == alone.nfe
    assert not (got.tokens == MASK).any()


def test_models_and_caches_that_do_not_fit_are_refused(toy) -> None:
    prompt = torch.tensor([[3, 4]])
    with pytest.raises(
        ValueError, match="Dystruct requires full attention, but .* prefix attention"
    ):
        decode(toy(attention="prefix"), prompt, 4, [Dystruct()])
    with pytest.raises(ValueError, match="Dystruct cannot be combined with DualCache"):
        decode(toy(), prompt, 4, [Dystruct(), DualCache()])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"growth": 0.5}, "Dystruct.growth is 0.5, expected at least 1"),
        ({"expansion": 0}, "Dystruct.expansion is 0, expected at least 1"),
        ({"alpha": 0.0}, "Dystruct.alpha is 0.0, expected above 0"),
        ({"spread": -1.0}, "Dystruct.spread is -1.0, expected above 0"),
    ],
)
def test_bad_arguments_of_dystruct(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Dystruct(**given)


def test_many_blocks_and_repairs_fill_the_whole_answer(toy, prompts) -> None:
    tokens, mask = prompts(6, 2)
    often = Dystruct(growth=2.0, expansion=5, spread=1.0, repair_threshold=1.0)
    got = decode(toy(), tokens, 14, [often, Suppress(eos=True)], mask=mask)
    assert got.tokens.shape[1] == 6 + 2 * 14
    assert got.history.step.min() >= 0
    for i, size in enumerate((6, 2)):
        alone = decode(toy(), tokens[i : i + 1, -size:], 14, [often, Suppress(eos=True)])
        assert got.tokens[i, 6:].equal(alone.tokens[0, size:])
