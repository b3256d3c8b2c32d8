"""DLLMCache; tokens equal to LLaDA-V's own implementation: tests/systems/test_llada_v.py."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmdlm.backbones.kv import Pass
from mmdlm.decoding.caches.dllm_cache import DLLMCache, Partial
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.decoding.session import Finished, Session

PROMPT, LENGTH = torch.tensor([[3, 4, 5, 6]]), 8


@pytest.mark.parametrize("shift", [False, True])
def test_the_prompt_and_the_answer_have_their_own_intervals(shift: bool, toy, watch) -> None:
    model = toy(shift=shift)
    forwards = watch(model)
    decode(model, PROMPT, LENGTH, [DLLMCache(prompt=3, answer=2)])
    assert [f.rows if isinstance(f.rows, tuple) else None for f in forwards] == [
        (0 if step % 3 == 0 else 4 - shift, 12) for step in range(LENGTH)
    ]


def test_each_layer_computes_the_positions_whose_values_changed_most(
    toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = toy(), []
    enter = Partial.enter

    def noted(self: Partial, layer: int, now: Pass) -> Pass:
        cached = self.values[layer].clone()
        found = enter(self, layer, now)
        if self.within is not None:
            block = model.backbone.blocks[layer]
            values = block.attn.project(block.attn_norm(self.all.x), None)[2]
            seen.append((found.rows[0], changes(values, cached[:, :, self.start :])))
        return found

    monkeypatch.setattr(Partial, "enter", noted)
    decode(model, PROMPT, LENGTH, [DLLMCache(prompt=99, answer=99, ratio=0.4), TopK(4)])
    assert len(seen) == 3 * 3  # all steps but the first, in three layers
    for rows, change in seen:
        chosen = rows - 4
        assert len(chosen) == 3
        others = [i for i in range(LENGTH) if i not in chosen.tolist()]
        assert change[chosen].min() >= change[others].max() - 1e-4


def changes(new: Tensor, old: Tensor) -> Tensor:
    """[G] one minus the cosine of the values [1 KV G hd] of each position."""
    new, old = (x.transpose(1, 2).flatten(2) for x in (new, old))
    return 1 - F.cosine_similarity(new, old, dim=-1)[0]


def test_a_request_that_joins_later_gets_what_it_gets_alone(toy) -> None:
    model, chosen = toy(), [DLLMCache(3, 2, 0.4), TopK(5)]
    prompts = [PROMPT[0], torch.tensor([7, 8, 9, 10, 11, 12])]
    session, done = Session(model, chosen), {}
    keys = [session.add(prompts[0], LENGTH)]
    for step in range(12):
        if step == 2:
            keys.append(session.add(prompts[1], 6))
        done |= {e.key: e for e in session.step() if isinstance(e, Finished)}
    for key, prompt, length in zip(keys, prompts, (LENGTH, 6), strict=True):
        alone = decode(model, prompt[None], length, [DLLMCache(3, 2, 0.4), TopK(5)])
        assert done[key].tokens.tolist() == alone.tokens[0, len(prompt) :].tolist()
        assert done[key].step.tolist() == alone.history.step[0].tolist()


def test_a_model_of_another_attention_is_rejected(toy) -> None:
    with pytest.raises(ValueError, match="requires full attention"):
        decode(toy(attention="prefix"), PROMPT, 2, [DLLMCache()])
