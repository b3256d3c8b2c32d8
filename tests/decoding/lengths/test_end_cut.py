import pytest
import torch

from mmdlm.decoding.caches.dual_cache import DualCache
from mmdlm.decoding.caches.prefix_lm import PrefixLM
from mmdlm.decoding.commits.maskgit import MaskGIT
from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.decoding.lengths.end_cut import EndCut
from mmdlm.decoding.lengths.end_of_text import EndOfText
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.plans.streams import Streams
from mmdlm.decoding.plans.sub_blocks import SubBlocks

MASK, EOS, LENGTH, SIZES = 15, 0, 20, (7, 4, 6, 5)
TOKENS = torch.randint(1, 14, (4, 7), generator=torch.Generator().manual_seed(6))
REAL = torch.stack([torch.arange(7) >= 7 - size for size in SIZES])


def settings(seed: int, slope: float) -> dict:
    """A synthetic predictor: the end token is more probable towards the end."""
    ids = {"mask_id": MASK, "eos_id": EOS, "shift": 0}
    return {"seed": seed, "vocab": 16, "scale": 12.0, "mix": 0.0, "eos_slope": slope, **ids}


def slow(model, prompt: list[int], size: int, tau: float, tau_end: float) -> tuple[list, list]:
    """The answer and the lengths of all forwards by hand, Python numbers."""
    x, known, seen = prompt + [MASK] * LENGTH, len(prompt), []
    while MASK in x[known:]:
        first = x.index(MASK, known)
        stop = known + (first - known) // size * size + size
        seen.append(len(x))
        logits = rows(model, x)
        best = [max(range(15), key=lambda v, z=z: z[v]) for z in logits]
        sure = [torch.tensor(z[:15]).double().softmax(0).max().item() for z in logits]
        masked = [i for i in range(known, len(x)) if x[i] == MASK]
        inside = [i for i in masked if i < stop]
        top = max(inside, key=lambda i: sure[i])
        taken = [i for i in inside if sure[i] >= tau or i == top]
        for i in taken:
            x[i] = best[i]
        ends = [i for i in taken if best[i] == EOS]
        guessed = [i for i in masked if i not in taken and best[i] == EOS and sure[i] >= tau_end]
        if ends:
            x = x[: min(ends) + 1]
        elif guessed:
            x = x[: max(guessed, key=lambda i: sure[i]) + 1]
    return x[known:], seen


def rows(model, x: list[int]) -> list[list[float]]:
    """Logits of the synthetic predictor for one text, from its formula."""
    total = 7919 * model.seed + sum(131 * (q + 1) * (t + 3) for q, t in enumerate(x))
    found = []
    for p in range(len(x)):
        h = [(total + 613 * p + 1237 * v + 17 * p * v) % 10007 for v in range(16)]
        z = [12 * ((a * a % 10007) / 10007) ** 3 + v / 1000 for v, a in enumerate(h)]
        z[EOS] += model.slope * p / len(x)
        found.append(z)
    return found


@pytest.mark.parametrize("tau_end", [0.0, 0.6])
@pytest.mark.parametrize(("size", "tau", "slope"), [(8, 0.5, 2), (20, 0.7, 5), (5, 2.0, 8)])
def test_a_cut_answer_equals_one_by_hand(
    size: int, tau: float, slope: float, tau_end: float, synthetic, monkeypatch
) -> None:
    cut = 0
    for seed in range(6):
        model, seen = synthetic(settings(seed, slope)), []
        inner = model.run
        monkeypatch.setattr(
            model, "run", lambda s, *r, f=inner, n=seen: (n.append(s.tokens.shape[1]), f(s, *r))[1]
        )
        prompt = TOKENS[seed % 4].tolist()
        want, forwards = slow(model, prompt, size, tau, tau_end)
        chosen = [Blocks(size), Threshold(tau), EndCut(tau_end)]
        got = decode(model, torch.tensor([prompt]), LENGTH, chosen)
        assert got.tokens[0, 7:].tolist() == want + [EOS] * (LENGTH - len(want))
        assert seen == forwards
        cut += len(want) < LENGTH
    assert cut > 2  # otherwise the test shows nothing


@pytest.mark.parametrize(
    "more",
    [
        [],
        [TopK(10)],
        [Blocks(6), Threshold(0.6), EndOfText()],
        [Blocks(6), MaskGIT(10)],
        [Streams(3, steps=4)],
        [Streams(sizes=(5, 7)), PrefixLM()],
    ],
)
def test_rows_of_a_batch_are_cut_as_alone(more: list, synthetic) -> None:
    model, chosen, found = synthetic(settings(11, 4)), [EndCut(0.5), *more], set()
    got = decode(model, TOKENS, LENGTH, chosen, mask=REAL)
    for i, size in enumerate(SIZES):
        alone = decode(model, TOKENS[i : i + 1, -size:], LENGTH, chosen)
        assert got.tokens[i, 7:].tolist() == alone.tokens[0, size:].tolist()
        assert got.history.step[i].equal(alone.history.step[0])
        assert got.forwards[i] == alone.nfe
        found.add(int((alone.history.step >= 0).sum()))
    assert len(found) > 1


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("more", [[], [Blocks(4)]])
def test_a_model_with_weights_is_cut_row_by_row(more: list, shift: bool, toy, prompts) -> None:
    model, ids = toy(shift=shift), slice(0, 8)  # few ids, so that ends are predicted
    tokens, mask = prompts(*SIZES)
    chosen = [EndCut(0.2), Threshold(0.4), *more]
    got = decode(model, tokens, LENGTH, chosen, mask=mask, columns=ids)
    assert (got.history.step < 0).any()
    for i, size in enumerate(SIZES):
        row = tokens[i : i + 1, -size:]
        alone = decode(model, row, LENGTH, chosen, columns=ids)
        assert got.tokens[i, 7:].tolist() == alone.tokens[0, size:].tolist()


def test_positions_per_step_stay_when_the_answer_is_cut(synthetic) -> None:
    model = synthetic(settings(11, 9))
    plain, cut = (
        decode(model, TOKENS[:1], LENGTH, [Blocks(4), TopK(10), *more]) for more in ([], [EndCut()])
    )
    assert plain.nfe == 10
    filled = int((cut.history.step >= 0).sum())
    assert filled < 15
    assert cut.nfe <= -(-filled // 2) + 1


def test_nothing_is_cut_without_a_certain_end_nor_before_given_positions(synthetic) -> None:
    model = synthetic(settings(11, 4))
    plain, cut = (decode(model, TOKENS, LENGTH, [TopK(5), *more]) for more in ([], [EndCut(1.5)]))
    assert not cut.tokens.equal(plain.tokens)
    for row, steps in zip(cut.tokens[:, 7:].tolist(), cut.history.step, strict=True):
        kept = int((steps >= 0).sum())
        assert kept == LENGTH or row.index(EOS) == kept - 1
    canvas = torch.full((4, LENGTH), MASK)
    canvas[:, 16] = 9
    got = decode(model, TOKENS, LENGTH, [EndCut()], canvas=canvas)
    assert (got.tokens[:, 7 + 16] == 9).all()
    assert ((got.history.step >= 0).sum(1) >= 16).all()


def test_models_and_caches_that_do_not_fit_are_refused(toy) -> None:
    with pytest.raises(
        ValueError, match="EndCut requires full attention, but .* cascade attention"
    ):
        decode(toy(attention="cascade"), torch.tensor([[3, 4]]), 4, [EndCut()])
    with pytest.raises(ValueError, match="EndCut cannot be combined with DualCache"):
        decode(toy(), torch.tensor([[3, 4]]), 4, [EndCut(), DualCache()])
    with pytest.raises(ValueError, match="EndCut.tau is -0.5"):
        EndCut(-0.5)


def test_a_row_with_given_positions_is_cut_as_alone(toy, prompts) -> None:
    model, (tokens, mask) = toy(shift=True), prompts(5, 3)
    canvas = torch.full((2, 12), 2)
    canvas[0, [0, 1, 2, 4, 5, 6, 7, 9]] = torch.tensor([38, 24, 19, 47, 48, 14, 48, 4])
    chosen = [EndCut(tau=0.05), SubBlocks(size=1)]
    batch = decode(model, tokens, 12, chosen, mask=mask, canvas=canvas)
    alone = decode(model, tokens[:1], 12, chosen, canvas=canvas[:1])
    assert batch.tokens[0].equal(alone.tokens[0])
    assert batch.history.confidence[0].allclose(alone.history.confidence[0], atol=1e-4)
