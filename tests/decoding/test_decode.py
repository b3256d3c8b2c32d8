"""What holds for every strategy and every kind of attention; a new strategy is in at once."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmdlm import discover
from mmdlm.checkpoint import load
from mmdlm.decoding.caches.dual_cache import DualCache
from mmdlm.decoding.caches.prefix_cache import PrefixCache
from mmdlm.decoding.caches.prefix_lm import PrefixLM
from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.decoding.guidance.cfg import CFG
from mmdlm.decoding.lengths.end_of_text import EndOfText
from mmdlm.decoding.loop import assign
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.refresh import Refresh
from mmdlm.decoding.scores.gumbel import Gumbel
from mmdlm.decoding.scores.random_order import RandomOrder
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View
from mmdlm.layout import Row, arrange
from mmdlm.model import MultimodalDLM

LENGTH = 8
EOS, MASK, PAD = 1, 2, 0
STRATEGIES = discover.classes("mmdlm.decoding", Strategy)
MODELS = {
    "full": {},
    "full shifted": {"shift": True},
    "prefix": {"attention": "prefix"},
    "prefix shifted": {"attention": "prefix", "shift": True},
    "cascade in blocks": {"attention": "cascade", "block_size": 4},
    "block causal": {"attention": "block_causal", "block_size": 4},
    "autoregressive": {"attention": "block_causal", "block_size": 1, "shift": True},
}
Toy = Callable[..., MultimodalDLM]


@dataclass(frozen=True)
class Everything(Strategy):
    """Recomputes the whole canvas in every step."""

    def refresh(self, view: View) -> Refresh:
        return Refresh(view.level >= 0, cached=False)


def pairs(*kinds: str, without: str = "") -> pytest.MarkDecorator:
    """Every strategy but one with every kind of model that it is for; it refuses the others."""
    not_full = set(MODELS) - {"full", "full shifted"}
    in_order = {"cascade in blocks", "block causal", "autoregressive"}
    refused = {
        **dict.fromkeys(("PrefixLM", "DAEDAL", "EndCut", "Dystruct"), not_full),
        **dict.fromkeys(("MaxLogitCache", "DLLMCache"), not_full),
        **dict.fromkeys(("WindowDiffusion", "ElasticCache"), in_order),
    }
    names = [name for name in STRATEGIES if name != without]
    chosen = [(n, k) for n in names for k in kinds if k not in refused.get(n, ())]
    return pytest.mark.parametrize(("name", "kind"), chosen)


every = pytest.mark.parametrize("name", STRATEGIES)
everywhere = pytest.mark.parametrize("kind", MODELS)


@pairs(*MODELS)
def test_fills_every_mask_of_the_answer_and_nothing_else(
    name: str, kind: str, toy: Toy, watch, prompts, seeds
) -> None:
    model = toy(**MODELS[kind])
    forwards = watch(model)
    tokens, mask = prompts(7, 4)
    tokens[0, 3] = MASK  # smuggled into a prompt: stays what it is
    canvas = torch.full((2, LENGTH), MASK)
    canvas[0, 5], canvas[1, 0] = 17, 23
    got = decode(
        model,
        tokens,
        LENGTH,
        [STRATEGIES[name]()],
        mask=mask,
        canvas=canvas,
        generator=seeds(0, 1),
    )
    answer = got.tokens[:, 7:]
    assert got.tokens[:, :7].tolist() == tokens.tolist()
    assert (answer[0, 5], answer[1, 0]) == (17, 23)
    assert not (answer == MASK).any()
    assert got.nfe == len(forwards)
    assert max(got.forwards) <= min(got.nfe, 4 * LENGTH)
    steps = got.history.step
    assert (steps[0, 5], steps[1, 0]) == (-1, -1)
    assert steps.max() < max(got.forwards)
    assert ((got.history.confidence > 0) == (steps >= 0)).all()


# The rows of an ODD batch are meant to look at each other.
@pairs("full", "full shifted", "cascade in blocks", "block causal", without="ODD")
def test_a_row_of_a_batch_is_what_it_is_alone(
    name: str, kind: str, toy: Toy, prompts, seeds
) -> None:
    model, strategy, sizes = toy(**MODELS[kind]), STRATEGIES[name](), (7, 4, 6)
    tokens, mask = prompts(*sizes)
    taken = set(strategy.hooks())
    more = [s for s in (Blocks(5), Threshold(0.3), EndOfText()) if not taken & set(s.hooks())]
    chosen = [strategy, *more]
    batch = decode(model, tokens, LENGTH, chosen, mask=mask, generator=seeds(8, 9, 10))
    for i, size in enumerate(sizes):
        row, source = tokens[i : i + 1, -size:], seeds(8 + i)
        alone = decode(model, row, LENGTH, chosen, generator=source)
        want = alone.tokens[0, size:].tolist()  # others of the batch may have grown longer
        rest = batch.tokens.shape[1] - 7 - len(want)
        assert batch.tokens[i, 7:].tolist() == want + [EOS] * rest
        assert batch.history.step[i].tolist() == alone.history.step[0].tolist() + [-1] * rest
        assert batch.forwards[i] == alone.nfe


@every
def test_the_same_seed_gives_the_same_answer(name: str, toy: Toy, run) -> None:
    first, second = (run(toy(), STRATEGIES[name]()) for _ in range(2))
    assert first.tokens.equal(second.tokens)
    assert first.history.step.equal(second.history.step)


@pytest.mark.parametrize("drawing", [RandomOrder(), Gumbel(2.0)])
def test_other_seeds_and_other_rows_draw_otherwise(drawing: Strategy, toy: Toy, prompts) -> None:
    tokens = prompts(5)[0].expand(3, -1)
    one = decode(toy(), tokens, LENGTH, [drawing], generator=torch.Generator().manual_seed(0))
    two = decode(toy(), tokens, LENGTH, [drawing], generator=torch.Generator().manual_seed(1))
    assert not one.history.step.equal(two.history.step)
    assert not one.history.step[0].equal(one.history.step[1])
    torch.manual_seed(4)
    free = decode(toy(), tokens, LENGTH, [drawing])
    torch.manual_seed(4)
    assert free.tokens.equal(decode(toy(), tokens, LENGTH, [drawing]).tokens)


def test_one_generator_per_row_or_one(toy: Toy, prompts, seeds) -> None:
    tokens, mask = prompts(3, 3)
    with pytest.raises(ValueError, match="3 for 2 rows; give one, or one per row"):
        decode(toy(), tokens, 4, mask=mask, generator=seeds(0, 1, 2))


@everywhere
@pytest.mark.parametrize("more", [[], [Blocks(5)], [Threshold(0.2)], [TopK(4), CFG(1.5)]])
def test_keeping_keys_changes_nothing(kind: str, more: list[Strategy], toy: Toy, run) -> None:
    model = toy(**MODELS[kind])
    kept, all_new = run(model, *more), run(model, Everything(), *more)
    assert kept.tokens.equal(all_new.tokens)
    assert kept.history.step.equal(all_new.history.step)
    torch.testing.assert_close(kept.history.confidence, all_new.history.confidence)


@pytest.mark.parametrize("shift", [False, True])
def test_keeping_the_keys_of_a_prefix_lm_changes_nothing(shift: bool, toy: Toy, run) -> None:
    model = toy(shift=shift)
    kept, all_new = run(model, PrefixLM()), run(model, PrefixLM(), Everything())
    assert kept.tokens.equal(all_new.tokens)
    trained = run(toy(attention="prefix", shift=shift))
    assert kept.tokens.equal(trained.tokens)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("cache", [PrefixCache(), DualCache()])
def test_a_cache_renewed_in_every_step_is_exact(
    cache: Strategy, shift: bool, toy: Toy, run
) -> None:
    model = toy(shift=shift)
    renewed, all_new = run(model, Blocks(1), cache), run(model, Blocks(1))
    assert renewed.tokens.equal(all_new.tokens)
    torch.testing.assert_close(renewed.history.confidence, all_new.history.confidence)


@pytest.mark.parametrize("shift", [False, True])
def test_block_causal_models_fill_their_own_blocks(shift: bool, toy: Toy, run) -> None:
    model = toy(attention="block_causal", block_size=4, shift=shift)
    sizes = (7, 4, 6)
    got = run(model, TopK(2), sizes=sizes)
    for size, steps in zip(sizes, got.history.step, strict=True):
        # Blocks count from the start of the text, so the first holds the end of the prompt.
        block = (size + torch.arange(LENGTH)) // 4
        block = block - block[0]
        assert [set(steps[block == i].tolist()) for i in block.unique()] == [
            {int(i)} for i in block.unique()
        ]
    everything = run(model, TopK(2), Everything(), sizes=sizes)
    assert got.tokens.equal(everything.tokens)


def test_a_threshold_above_one_commits_one_per_step(toy: Toy, run) -> None:
    strict, one = run(toy(), Threshold(1.5)), run(toy(), TopK())
    assert strict.tokens.equal(one.tokens)
    assert strict.history.step.equal(one.history.step)
    assert strict.nfe == LENGTH
    assert run(toy(), Threshold(0.0)).nfe == 1


def test_two_owners_of_a_hook_are_refused(toy: Toy, run) -> None:
    message = "Threshold and TopK both decide 'select'; keep one"
    with pytest.raises(ValueError, match=f"^{message}$"):
        run(toy(), Threshold(), TopK())
    assert len(assign([EndOfText(), CFG(), CFG()])["guide"]) == 2


@dataclass(frozen=True)
class OwnPace(Strategy):
    """Requires that nothing ends a row early, and makes a step of several forwards."""

    requires = frozenset({"own_schedule"})
    denies = frozenset({"one_forward"})

    def guide(self, view: View, logits: Tensor) -> Tensor:
        return logits


@dataclass(frozen=True)
class Single(Strategy):
    """Requires one forward per step."""

    requires = frozenset({"one_forward"})

    def observe(self, view: View, logits: Tensor) -> None:
        pass


@dataclass(frozen=True)
class Stopper(Strategy):
    """Stops nothing."""

    def stop(self, view: View) -> Tensor:
        return torch.zeros_like(view.open[:, 0])


def test_a_strategy_that_lacks_what_it_requires_is_rejected(toy: Toy, run) -> None:
    says = "^OwnPace cannot be combined with Stopper: OwnPace requires a schedule that no early"
    with pytest.raises(ValueError, match=says):
        run(toy(), Stopper(), OwnPace())
    with pytest.raises(ValueError, match="^Single cannot be .* one forward per step, which OwnP"):
        run(toy(), OwnPace(), Single())
    assert run(toy(), OwnPace()).nfe == run(toy(), Single(), Stopper()).nfe == LENGTH


def test_finished_rows_leave_the_batch(toy: Toy, watch, run) -> None:
    model = toy()
    forwards = watch(model)
    got = run(model, Blocks(4), Threshold(0.25))
    last = got.history.step.amax(1)
    assert last.unique().numel() > 1
    rows = [len(forward.tokens) for forward in forwards]
    assert rows == [int((last >= step).sum()) for step in range(got.nfe)]


def test_media_leave_with_their_rows(toy: Toy) -> None:
    model = toy()
    generator = torch.Generator().manual_seed(1)
    rows = [
        Row((torch.randn(n, 32, generator=generator), torch.randint(3, 50, (4,))))
        for n in (3, 6, 2)
    ]
    lay = {"pad": PAD, "attention": "full"}
    chosen = [Blocks(4), Threshold(0.2)]
    batch = decode(model, arrange(rows, **lay), LENGTH, chosen)
    assert batch.history.step.amax(1).unique().numel() > 1
    for i, row in enumerate(rows):
        alone = decode(model, arrange([row], **lay), LENGTH, chosen)
        assert batch.tokens[i, -LENGTH:].tolist() == alone.tokens[0, -LENGTH:].tolist()


@everywhere
def test_columns_bound_what_is_written(kind: str, toy: Toy, prompts) -> None:
    tokens, mask = prompts(5, 3)
    for columns in (slice(20, 30), slice(0, 4), slice(None, -30)):
        got = decode(toy(**MODELS[kind]), tokens, LENGTH, mask=mask, columns=columns)
        assert set(got.tokens[:, 5:].flatten().tolist()) <= set(range(50)[columns]) - {MASK}
    all_columns = decode(toy(**MODELS[kind]), tokens, LENGTH, mask=mask, columns=slice(None))
    assert all_columns.tokens.equal(decode(toy(**MODELS[kind]), tokens, LENGTH, mask=mask).tokens)


@pytest.mark.parametrize("columns", [slice(5, 5), slice(2, 3), slice(0, 10, 2), slice(60, 70)])
def test_columns_that_leave_nothing_are_refused(columns: slice, toy: Toy) -> None:
    with pytest.raises(ValueError, match="expected a range of ids besides the mask id"):
        decode(toy(), torch.tensor([[3]]), 2, columns=columns)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"length": 0}, "length is 0, expected an integer number of tokens"),
        ({"length": -1}, "length is -1"),
        ({"length": 2.5}, "length is 2.5"),
        ({"length": float("nan")}, "length is nan"),
        ({"prompt": torch.zeros(0, 3, dtype=torch.long)}, "the prompt has no rows"),
        ({"prompt": torch.tensor([[3, 50]])}, r"prompt holds the id 50 at position \[0, 1\]"),
        ({"prompt": torch.tensor([[-100, 3]])}, r"prompt holds the id -100 at position \[0, 0\]"),
        ({"canvas": torch.tensor([[3, MASK, 99, 4]])}, r"canvas holds the id 99 at .* \[0, 2\]"),
        ({"prompt": torch.zeros(3, dtype=torch.long)}, r"prompt is \[3\], expected token ids"),
        ({"canvas": torch.zeros(2, 4)}, r"canvas is \[2, 4\], expected \[1, 4\]"),
        ({"mask": torch.ones(1, 2)}, r"mask is \[1, 2\], tokens are \[1, 3\]"),
    ],
)
def test_bad_arguments_are_named(given: dict, message: str, toy: Toy) -> None:
    call = {"prompt": torch.tensor([[3, 4, 5]]), "length": 4, **given}
    with pytest.raises(ValueError, match=message):
        decode(toy(), **call)


def test_ids_are_integers(toy: Toy) -> None:
    for prompt in (torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool)):
        with pytest.raises(TypeError, match="prompt holds torch.*expected token ids"):
            decode(toy(), prompt, 2)


@pytest.mark.parametrize("strategies", [(), "llada", "fast_dllm", "fast_dllm_dual"])
def test_in_bfloat16_too_padding_changes_no_row(strategies: object, golden: Path) -> None:
    """Attention leaves the padding out; the weights are random, so that near ties are common."""
    model = load(golden / "backbones" / "llada", dtype="bfloat16", device="cpu")
    draw = torch.Generator().manual_seed(3)
    sizes = torch.randint(3, 40, (16,), generator=draw).tolist()
    prompts = [torch.randint(0, 100, (size,), generator=draw) for size in sizes]
    padded = torch.stack([F.pad(p, (40 - len(p), 0), value=model.spec.pad_id) for p in prompts])
    mask = torch.arange(40) >= 40 - torch.tensor(sizes)[:, None]
    together = decode(model, padded, 16, strategies, mask=mask).tokens[:, 40:]
    alone = [decode(model, p[None], 16, strategies).tokens[0, len(p) :] for p in prompts]
    assert together.equal(torch.stack(alone))


@pytest.mark.parametrize("kind", MODELS)
def test_a_prompt_may_be_empty(kind: str, toy: Toy) -> None:
    """Alone, or in a batch with a longer one; equal to the logits of the canvas alone."""
    model, empty = toy(**MODELS[kind]), torch.zeros(1, 0, dtype=torch.long)
    canvas = torch.tensor([[7, MASK, 9, MASK]])
    if model.spec.shift:
        with pytest.raises(ValueError, match="the prompt is empty, but .* predicts the next"):
            decode(model, empty, 4, canvas=canvas)
        return
    alone = decode(model, empty, 4, canvas=canvas)
    assert alone.tokens.shape == (1, 4)
    assert alone.tokens[0, 0] == 7
    prompts, mask = torch.tensor([[0, 0], [3, 4]]), torch.tensor([[0, 0], [1, 1]])
    both = decode(model, prompts, 4, canvas=canvas.repeat(2, 1), mask=mask)
    assert both.tokens[0, 2:].equal(alone.tokens[0])
    assert both.tokens[1, 2:].equal(decode(model, prompts[1:], 4, canvas=canvas).tokens[0, 2:])
    if model.spec.attention == "full":
        logits = model.logits(canvas)[0].index_fill(1, torch.tensor([MASK]), -torch.inf)
        at = alone.history.step[0].tolist().index(0)
        assert alone.tokens[0, at] == logits[at].argmax()


def slow_decode(model: MultimodalDLM, prompt: Tensor, size: int, tau: float) -> tuple[list, list]:
    """Blocks and a threshold for one row, by hand: full recompute, Python numbers."""
    tokens, steps, step = prompt.tolist() + [MASK] * LENGTH, [-1] * LENGTH, 0
    for start in range(len(prompt), len(tokens), size):
        block = range(start, min(start + size, len(tokens)))
        while masked := [i for i in block if tokens[i] == MASK]:
            kind, turns = ("prefix" if model.spec.attention == "prefix" else "full"), len(prompt)
            sees = [
                [kind == "full" or i >= turns or j < turns for j in range(len(tokens))]
                for i in range(len(tokens))
            ]
            logits = model.logits(torch.tensor([tokens]), torch.tensor([sees]), "full")[0].double()
            logits[:, MASK] = -torch.inf
            sure, best = (x.tolist() for x in logits.softmax(-1).max(-1))
            top = max(masked, key=lambda i: (sure[i], -i))
            for i in masked:
                if sure[i] >= tau or i == top:
                    tokens[i], steps[i - len(prompt)] = best[i], step
            step += 1
    return tokens, steps


@pytest.mark.parametrize("kind", ["full", "full shifted", "prefix", "prefix shifted"])
@pytest.mark.parametrize(("size", "tau"), [(3, 0.25), (8, 0.15), (4, 0.6)])
def test_a_decode_is_what_it_is_by_hand(
    kind: str, size: int, tau: float, toy: Toy, prompts
) -> None:
    model = toy(**MODELS[kind])
    for prompt in prompts(6, 6, 6)[0]:
        tokens, steps = slow_decode(model, prompt, size, tau)
        got = decode(model, prompt[None], LENGTH, [Blocks(size), Threshold(tau)])
        assert got.tokens[0].tolist() == tokens
        assert got.history.step[0].tolist() == steps
        assert got.nfe == max(steps) + 1


def test_what_is_no_strategy_is_refused(toy: Toy) -> None:
    with pytest.raises(TypeError, match="give a list"):
        decode(toy(), torch.tensor([[3]]), 2, TopK())


def test_nan_is_not_decoded(toy: Toy, monkeypatch: pytest.MonkeyPatch, run) -> None:
    model, inner = toy(), toy().run
    monkeypatch.setattr(model, "run", lambda *given: inner(*given) * float("nan"))
    with pytest.raises(ValueError, match="no possible token: the model gave NaN"):
        run(model)


def test_a_full_canvas_needs_no_forward(toy: Toy) -> None:
    canvas = torch.tensor([[7, 8]])
    got = decode(toy(), torch.tensor([[3]]), 2, canvas=canvas)
    assert (got.tokens.tolist(), got.nfe) == ([[3, 7, 8]], 0)


def test_rows_known_from_the_start_cost_nothing(toy: Toy, watch) -> None:
    forwards = watch(toy())
    canvas = torch.tensor([[7, 8], [MASK, 9], [7, 9]])
    got = decode(toy(), torch.tensor([[3], [4], [5]]), 2, canvas=canvas)
    assert [len(forward.tokens) for forward in forwards] == [1]
    assert got.tokens[[0, 2]].tolist() == [[3, 7, 8], [5, 7, 9]]
    assert got.history.step.tolist() == [[-1, -1], [0, -1], [-1, -1]]


def test_a_finished_row_is_not_computed_any_more(toy: Toy, prompts, watch) -> None:
    model, (tokens, mask) = toy(), prompts(6, 4)
    canvas = torch.full((2, LENGTH), 2)
    canvas[0, 2:] = 9  # two masks left
    forwards = watch(model)
    decode(model, tokens, LENGTH, mask=mask, canvas=canvas)
    assert [len(f.tokens) for f in forwards] == [2, 2, 1, 1, 1, 1, 1, 1]
