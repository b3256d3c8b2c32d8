"""The noise of a row depends on its seed alone."""

import torch

from mmdlm.objectives.noise import stratified, uniform, uniform_at


def test_rows_do_not_depend_on_the_batch():
    seeds = torch.tensor([3, 1 << 61, 7, 12345])
    together = uniform(seeds, 40, stream=2)
    alone = torch.cat([uniform(seeds[i : i + 1], 40, stream=2) for i in range(4)])
    assert torch.equal(together, alone)


def test_numbers_are_uniform_and_independent():
    draws = uniform(torch.arange(400), 500)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.005
    assert abs(draws.var() - 1 / 12) < 0.002
    histogram = torch.histc(draws.float(), bins=20, min=0, max=1) / draws.numel()
    assert (histogram - 0.05).abs().max() < 0.003
    neighbours = torch.corrcoef(torch.stack([draws[:-1].flatten(), draws[1:].flatten()]))
    assert abs(neighbours[0, 1]) < 0.01
    positions = torch.corrcoef(torch.stack([draws[:, :-1].flatten(), draws[:, 1:].flatten()]))
    assert abs(positions[0, 1]) < 0.01


def test_streams_differ():
    seeds = torch.arange(50)
    a, b = uniform(seeds, 20, stream=1), uniform(seeds, 20, stream=2)
    assert not torch.isclose(a, b).any(1).all(0).any()
    assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.05


def test_matches_python_integers():
    """The int64 arithmetic wraps and shifts as the unsigned reference does."""
    mask = (1 << 64) - 1

    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    for seed in (0, 1, 987654321, (1 << 62) - 1):
        want = [(mix((mix(seed) + mix(i + (3 << 32))) & mask) >> 11) * 2.0**-53 for i in range(6)]
        assert uniform(torch.tensor([seed]), 6, stream=3)[0].tolist() == want


def test_numbers_at_indices_are_those_of_the_row():
    seeds, at = torch.tensor([3, 9]), torch.tensor([[4, 0, 4], [1, 2, 5]])
    assert torch.equal(uniform_at(seeds, at, 2), uniform(seeds, 6, 2).gather(1, at))


def test_stratified_numbers_fill_every_part():
    numbers = stratified(torch.rand(50))
    assert torch.equal((numbers * 50).floor().long().sort().values, torch.arange(50))
