import math
from pathlib import Path

import pytest
import torch

from mmdlm.decoding import aux_network
from mmdlm.decoding.caches.dual_cache import DualCache
from mmdlm.decoding.commits.learn2pd import KIND, Filter, Learn2PD
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.decoding.plans.blocks import Blocks


def random_filter(path: Path, size: int, hidden: int | None = None, seed: int = 0) -> Filter:
    network = Filter(size, hidden)
    generator = torch.Generator().manual_seed(seed)
    for weight in network.parameters():
        weight.data.normal_(generator=generator)
    aux_network.save(path, KIND, network, {"size": network.size, "hidden": network.hidden})
    return network


def by_hand(network: Filter, vector: list[float]) -> list[float]:
    """Probability of being final, with Python numbers."""
    layers = [
        (layer.weight.tolist(), layer.bias.tolist()) for layer in (network.inner, network.outer)
    ]
    for i, (matrix, bias) in enumerate(layers):
        vector = [
            sum(w * x for w, x in zip(row, vector, strict=True)) + b
            for row, b in zip(matrix, bias, strict=True)
        ]
        if i == 0:
            vector = [max(0.0, x) for x in vector]
    return [1 / (1 + math.exp(-x)) for x in vector]


def test_commits_what_the_filter_accepts_and_the_best(tmp_path, cases, moment, softmax) -> None:
    size, accept = 3, 0.6
    path = tmp_path / "filter.safetensors"
    network = random_filter(path, size, 5)
    strategy, accepted = Learn2PD(path, accept), 0
    for logits, masked in cases(3):
        got = strategy.select(moment(logits, masked, strategy)) & masked
        for row, is_open, taken in zip(logits.tolist(), masked.tolist(), got.tolist(), strict=True):
            sure = [max(softmax(z)) for z in row]
            vector = sure + [1.0] * (-len(row) % size)  # the missing part of the last block
            final = [
                p
                for i in range(0, len(vector), size)
                for p in by_hand(network, vector[i : i + size])
            ]
            # By the total of the others: probabilities above 1 - 1e-16 are 1 in Python too.
            rest = [sum(sorted(math.exp(x - max(z)) for x in z)[:-1]) for z in row]
            best = min(
                (i for i in range(len(row)) if is_open[i]), key=lambda i: rest[i], default=-1
            )
            want = [is_open[i] and (final[i] > accept or i == best) for i in range(len(row))]
            accepted += sum(want) - any(want)
            assert taken == want
    assert accepted > 20


def test_a_filter_for_blocks_of_32_has_two_thousand_weights() -> None:
    assert sum(w.numel() for w in Filter(32).parameters()) == 2112


def same(one, two) -> None:
    assert one.tokens.equal(two.tokens)
    assert one.history.step.equal(two.history.step)


def test_without_a_filter_or_with_one_that_accepts_nothing_it_is_top_k(toy, run, tmp_path) -> None:
    path = tmp_path / "filter.safetensors"
    random_filter(path, 4)
    for steps in (None, 3):
        plain = run(toy(), Blocks(4), TopK(steps))
        same(run(toy(), Blocks(4), Learn2PD(steps=steps)), plain)
        same(run(toy(), Blocks(4), Learn2PD(path, accept=1.1, steps=steps)), plain)
    assert run(toy(), Blocks(4), Learn2PD(path, accept=0.0)).nfe == 2


@pytest.mark.parametrize(
    "kind",
    [{}, {"shift": True}, {"attention": "prefix"}, {"attention": "block_causal", "block_size": 4}],
)
@pytest.mark.parametrize("size", [3, 4, 16])
def test_a_row_in_a_batch_equals_the_row_alone(kind, size, toy, prompts, tmp_path) -> None:
    path, sizes, model = tmp_path / "filter.safetensors", (7, 4, 6), toy(**kind)
    random_filter(path, size, seed=size)
    tokens, mask = prompts(*sizes)
    own = [] if "block_size" in kind else [Blocks(5)]
    chosen = [*own, Learn2PD(path, 0.5)]
    batch = decode(model, tokens, 10, chosen, mask=mask)
    assert max(batch.forwards) < max(decode(model, tokens, 10, own, mask=mask).forwards)
    for i, n in enumerate(sizes):
        alone = decode(model, tokens[i : i + 1, -n:], 10, chosen)
        assert batch.tokens[i, 7:].tolist() == alone.tokens[0, n:].tolist()
        assert batch.forwards[i] == alone.nfe


@pytest.mark.parametrize("shift", [False, True])
def test_works_with_a_cache(shift, toy, run, tmp_path) -> None:
    path = tmp_path / "filter.safetensors"
    random_filter(path, 4)
    same(
        run(toy(shift=shift), Blocks(1), DualCache(), Learn2PD(path)),
        run(toy(shift=shift), Blocks(1)),
    )
    got = run(toy(shift=shift), Blocks(4), DualCache(), Learn2PD(path, 0.5))
    assert max(got.forwards) < 8


def test_a_filter_is_read_as_it_was_written(tmp_path) -> None:
    path = tmp_path / "new" / "filter.safetensors"
    written = random_filter(path, 6, 9)
    read = aux_network.load(path, KIND, Filter)
    probe = torch.rand(4, 6)
    assert read(probe).equal(written(probe))
    assert (read.size, read.hidden) == (6, 9)


def test_files_without_a_filter_are_refused(tmp_path, toy, run) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file .*none"):
        run(toy(), Learn2PD(tmp_path / "none"))
    other, broken = tmp_path / "other", tmp_path / "broken"
    aux_network.save(other, "hat", torch.nn.Linear(1, 1), {})
    with pytest.raises(ValueError, match="holds: hat; expected: learn2pd filter"):
        run(toy(), Learn2PD(other))
    random_filter(broken, 4)
    broken.write_bytes(broken.read_bytes()[:-8])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        run(toy(), Learn2PD(broken))
    aux_network.save(broken, KIND, Filter(4), {"size": 5})
    with pytest.raises(ValueError, match="does not fit its description"):
        run(toy(), Learn2PD(broken))
    with pytest.raises(ValueError, match="accept is -1"):
        Learn2PD(accept=-1)
    with pytest.raises(ValueError, match="steps is 0"):
        Learn2PD(steps=0)
