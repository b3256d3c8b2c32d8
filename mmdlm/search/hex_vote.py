"""HEX: majority vote over decodes with several block sizes."""

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
from mmdlm.search.candidates import answer_ids, generators, select

Extract = Callable[[list[int]], Hashable | None]
"""Vote of an answer's token ids up to its end token; None: the answer does not vote."""


@dataclass(frozen=True)
class Votes:
    """Result of a vote.

    Args:
        winner: index of the selected candidate of each row.
        runs: (block size, seed) of each candidate.
        answers: votes of the candidates, for each row; None for no vote.
        candidates: decodes.
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
        """Number of votes per answer of a row, most frequent first; ties in candidate order."""
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
    """HEX: the majority answer over block sizes and seeds, for each batch row separately.

    A model trained on random masks can decode in any order, and the best order depends on the
    prompt. The first decode with the winning answer is returned; candidates are ordered by block
    size, then seed. Ties go to the earlier candidate.

    Source: HEX (arXiv 2510.05040), from the paper's description; its code is not public. Seeds,
    temperature and tie-breaking are our choice.

    Args:
        model: model.
        prompt: see `mmdlm.decode`.
        length: positions G to fill.
        strategies: strategies of every decode, see `mmdlm.decode`; none of them may define `plan`,
            nor `pick` if temperature > 0.
        blocks: block sizes, see `mmdlm.decoding.plans.blocks.Blocks`. Sizes larger than the answer
            are equivalent to its length, which is decoded once.
        seeds: seeds, used for every row; None: 0 to 4, or only 0 if temperature is 0.
        temperature: temperature of `mmdlm.decoding.scores.gumbel.Gumbel`; 0 for none.
        extract: vote of an answer; None: the whole answer. Example:
            `lambda ids: last_number(model.tokenizer.decode(ids))`.
        mask: see `mmdlm.decode`.
        canvas: see `mmdlm.decode`.
        columns: see `mmdlm.decode`.
    Returns:
        the winning decode, with `nfe` summed over all decodes, and the votes.
    Raises:
        ValueError: no block size or no seed is given, or see `mmdlm.decode`.
    """
    seeds = ((0, 1, 2, 3, 4) if temperature else (0,)) if seeds is None else tuple(seeds)
    sizes = sorted({min(size, max(1, length)) for size in blocks})
    if not sizes or not seeds:
        raise ValueError(f"blocks is {blocks} and seeds is {seeds}, expected at least one of each")
    sampling = [Gumbel(temperature)] if temperature else []
    shared = [*sampling, *preset.strategies(strategies)]
    runs = tuple((size, seed) for size in sizes for seed in seeds)
    given = {"mask": mask, "columns": columns, "canvas": canvas}

    def run(size: int, seed: int) -> Decoded:
        seeded = generators(model, prompt, seed)
        return decode(model, prompt, length, [Blocks(size), *shared], generator=seeded, **given)

    candidates = tuple(run(*each) for each in runs)
    answers = zip(*(answer_ids(model, candidate) for candidate in candidates), strict=True)
    vote = tuple if extract is None else extract
    votes = tuple(tuple(vote(ids) for ids in row) for row in answers)
    winner = tuple(_majority(row) for row in votes)
    return select(model, candidates, winner), Votes(winner, runs, votes, candidates)


def _majority(votes: tuple[Hashable | None, ...]) -> int:
    """Index of the first candidate with the most frequent answer; 0 if no candidate voted."""
    count = Counter(answer for answer in votes if answer is not None)
    return max(range(len(votes)), key=lambda i: (count[votes[i]], -i))
