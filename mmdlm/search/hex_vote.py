"""One prompt decoded with several block sizes, and a vote among the answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from collections.abc import Sequence as Items
from dataclasses import dataclass

from torch import Tensor

from mmdlm.decoding import preset
from mmdlm.decoding.decode import Decoded, decode
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.scores.gumbel import Gumbel
from mmdlm.layout import Sequence
from mmdlm.model import MultimodalDLM
from mmdlm.search.candidates import answers, chosen, sources

Extract = Callable[[list[int]], Hashable | None]
"""From the ids of an answer, up to its end, to what is voted on; None for an answer that says
nothing and does not vote."""


@dataclass(frozen=True)
class Votes:
    """How a vote went.

    Args:
        winner: for each row, which candidate was kept.
        runs: (block size, seed) of each candidate, in the order of the vote.
        answers: for each row, what each candidate voted for; None for no vote.
        candidates: the decodes.
    """

    winner: tuple[int, ...]
    runs: tuple[tuple[int, int], ...]
    answers: tuple[tuple[Hashable | None, ...], ...]
    candidates: tuple[Decoded, ...]

    @property
    def nfe(self) -> int:
        """Forwards of all candidates together."""
        return sum(candidate.nfe for candidate in self.candidates)

    def count(self, row: int = 0) -> dict[Hashable, int]:
        """Votes for each answer of a row, most first, ties in the order of the vote."""
        return dict(Counter(a for a in self.answers[row] if a is not None).most_common())


def hex_vote(
    model: MultimodalDLM,
    prompt: Tensor | Sequence,
    length: int,
    strategies: preset.Choice = (),
    *,
    blocks: Items[int] = (8, 16, 32, 64, 128),
    seeds: Items[int] | None = None,
    temperature: float = 0.9,
    extract: Extract | None = None,
    mask: Tensor | None = None,
    canvas: Tensor | None = None,
    columns: slice | None = None,
) -> tuple[Decoded, Votes]:
    """The answer that most decodes agree on, over block sizes and seeds.

    A model trained on random masks has learnt every order of filling, and which order is right
    depends on the question; where the decodes disagree, the majority decides, for every row of the
    batch alone. The first decode with the winning answer is kept, small blocks and early seeds
    coming first; of answers with as many votes the one that was given first wins.

    HEX (arXiv 2510.05040), from the paper's description, not checked against its code, which is not
    public: seeds and temperature are our choice, and so is what happens to ties.

    Args:
        model: the model.
        prompt: see `mmdlm.decode`.
        length: positions G to fill.
        strategies: of every decode, see `mmdlm.decode`; none that decides `plan`, and with a
            temperature none that decides `pick`.
        blocks: positions per block, see `mmdlm.decoding.plans.blocks.Blocks`. Blocks larger than
            the answer are the same as one of its length, which runs once.
        seeds: every row draws from a generator of this seed. None: 0 to 4, without temperature
            only 0.
        temperature: of `mmdlm.decoding.scores.gumbel.Gumbel`; 0 for none.
        extract: what is voted on, None for the whole answer. With a tokenizer it can be
            `lambda ids: last_number(model.tokenizer.decode(ids))`.
        mask: see `mmdlm.decode`.
        canvas: see `mmdlm.decode`.
        columns: see `mmdlm.decode`.
    Returns:
        the winning decode, its forwards being those of all decodes, and how the vote went.
    Raises:
        ValueError: no block size or no seed is given, or see `mmdlm.decode`.
    """
    seeds = ((0, 1, 2, 3, 4) if temperature else (0,)) if seeds is None else tuple(seeds)
    sizes = sorted({min(size, max(1, length)) for size in blocks})
    if not sizes or not seeds:
        raise ValueError(f"blocks is {blocks} and seeds is {seeds}; give at least one of each")
    drawing = [Gumbel(temperature)] if temperature else []
    shared = [*drawing, *preset.strategies(strategies)]
    runs = tuple((size, seed) for size in sizes for seed in seeds)
    given = {"mask": mask, "columns": columns, "canvas": canvas}

    def run(size: int, seed: int) -> Decoded:
        drawn, ways = sources(model, prompt, seed), [Blocks(size), *shared]
        return decode(model, prompt, length, ways, generator=drawn, **given)

    candidates = tuple(run(*each) for each in runs)
    said = zip(*(answers(model, candidate) for candidate in candidates), strict=True)
    take = tuple if extract is None else extract
    votes = tuple(tuple(take(ids) for ids in row) for row in said)
    winner = tuple(_first_of_the_most(row) for row in votes)
    return chosen(model, candidates, winner), Votes(winner, runs, votes, candidates)


def _first_of_the_most(votes: tuple[Hashable | None, ...]) -> int:
    """Index of the first candidate with the most frequent answer; 0 where nobody votes."""
    count = Counter(answer for answer in votes if answer is not None)
    return max(range(len(votes)), key=lambda i: (count[votes[i]], -i))
