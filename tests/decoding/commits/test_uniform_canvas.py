"""The canvas rule on a model with masks; test_diffusion_gemma.py compares it with transformers."""

from __future__ import annotations

import torch

from mmdlm.decoding.commits.uniform_canvas import UniformCanvas
from mmdlm.decoding.decode import decode
from mmdlm.decoding.numerics import entropy, rank, within_bound
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.view import View

PROMPT = torch.tensor([[3, 4, 5], [6, 7, 8]])


def test_a_block_is_written_at_once_after_all_steps(toy) -> None:
    got = decode(toy(), PROMPT, 12, [Blocks(4), UniformCanvas(5, confident=0.0)])
    steps = got.history.step.view(2, 3, 4)
    assert steps[0].tolist() == steps[1].tolist() == [[4] * 4, [9] * 4, [14] * 4]
    assert got.nfe == 15


def test_what_is_written_are_the_likeliest_tokens_of_the_last_step(toy, monkeypatch) -> None:
    seen = []
    pick = UniformCanvas.pick

    def noted(self, view, logits):
        seen.append(logits.argmax(-1)[0].clone())
        return pick(self, view, logits)

    monkeypatch.setattr(UniformCanvas, "pick", noted)
    got = decode(toy(), PROMPT[:1], 6, [UniformCanvas(3, confident=0.0)])
    assert got.tokens[0, 3:].tolist() == seen[-1].tolist()


def test_all_but_accepted_tokens_are_random_in_every_step(toy, monkeypatch) -> None:
    shown, accepted = [], []
    show, pick = UniformCanvas.show, UniformCanvas.pick

    def noted_show(self, view: View):
        found = show(self, view)
        shown.append(found.tokens[0].clone())
        return found

    def noted_pick(self, view: View, logits):
        found = pick(self, view, logits)
        mine = view.memory(self)
        accepted.append((mine["accepted"][0].clone(), mine["sample"][0].clone()))
        nats = entropy(logits)[0]
        order = nats.argsort(stable=True)
        total = nats[order].cumsum(0) - nats[order]
        kept = torch.zeros_like(nats, dtype=torch.bool).scatter(0, order, total <= self.gamma)
        assert torch.equal(mine["accepted"][0], kept)
        return found

    monkeypatch.setattr(UniformCanvas, "show", noted_show)
    monkeypatch.setattr(UniformCanvas, "pick", noted_pick)
    decode(toy(), PROMPT[:1], 16, [UniformCanvas(6, gamma=2.0, confident=0.0)])
    fresh = 0
    for now, before, (kept, sample) in zip(shown[1:], shown, accepted, strict=False):
        assert torch.equal(now[kept], sample[kept])
        fresh += int((now != before)[~kept].sum())
    assert fresh > 20


def test_a_block_ends_early_when_it_is_confident(toy) -> None:
    sure = decode(toy(), PROMPT, 8, [UniformCanvas(40, stable=0, confident=10.0)])
    assert sure.nfe == 1
    unsure = decode(toy(), PROMPT, 8, [UniformCanvas(6, stable=0, confident=0.0)])
    assert unsure.nfe == 6
    stable = decode(toy(), PROMPT, 8, [UniformCanvas(6, stable=1, confident=10.0)])
    assert min(stable.forwards) > 1


def test_the_bound_is_on_the_sum_without_its_largest_term() -> None:
    nats = torch.tensor([[0.5, 0.125, 0.25, 2.0]])
    place = rank(-nats)
    assert within_bound(nats, place, 0.0).tolist() == [[False, True, False, False]]
    assert within_bound(nats, place, 0.125).tolist() == [[False, True, True, False]]
    assert within_bound(nats, place, 0.375).tolist() == [[True, True, True, False]]
    assert within_bound(nats, place, 0.875).all()
