import torch

from mmdlm.decoding.decode import decode
from mmdlm.decoding.lengths.end_of_text import EndOfText
from mmdlm.decoding.plans.blocks import Blocks

EOS, MASK = 1, 2


def oracle(answer: list[int]) -> list[int]:
    """The answer with end tokens for the masks after its first end token, if none is before it."""
    for i, token in enumerate(answer):
        if token == MASK:
            return answer
        if token == EOS:
            return answer[: i + 1] + [EOS if t == MASK else t for t in answer[i + 1 :]]
    return answer


def test_ends_rows_whose_text_is_complete(moment) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        state = moment(torch.zeros(3, 6, 4), torch.zeros(3, 6).bool())
        state.model.spec.mask_id, state.model.spec.eos_id = MASK, EOS
        state.tokens[:, 1:] = torch.randint(1, 4, (3, 6), generator=generator)
        state.tokens[:, 0] = EOS  # in the prompt it ends nothing
        before = state.tokens.clone()
        ended = EndOfText().end(state)
        after = before.masked_fill(ended & (before == MASK), EOS)
        assert after[:, 1:].tolist() == [oracle(row) for row in before[:, 1:].tolist()]


def test_other_stop_ids_end_as_well(moment) -> None:
    state = moment(torch.zeros(1, 3, 4), torch.zeros(1, 3).bool())
    state.model.spec.mask_id, state.model.spec.stop_ids = MASK, (3,)
    state.tokens[0, 1:] = torch.tensor([5, 3, MASK])
    assert EndOfText().end(state).tolist() == [[False, False, False, True]]


def test_saves_forwards_and_changes_nothing_before_the_end(toy) -> None:
    model = toy(attention="block_causal", block_size=1)
    prompt = torch.randint(3, 50, (8, 3), generator=torch.Generator().manual_seed(2))
    plain = decode(model, prompt, 24, columns=slice(0, 12))
    ended = decode(model, prompt, 24, [EndOfText()], columns=slice(0, 12))
    shorter = 0
    for full, cut in zip(plain.tokens[:, 3:].tolist(), ended.tokens[:, 3:].tolist(), strict=True):
        end = full.index(EOS) + 1 if EOS in full else len(full)
        assert cut == full[:end] + [EOS] * (len(full) - end)
        shorter += end < len(full)
    assert shorter > 0
    assert (ended.history.step == -1).sum() == sum(
        24 - row.index(EOS) - 1 for row in plain.tokens[:, 3:].tolist() if EOS in row
    )


def test_an_end_in_a_later_place_does_not_end_what_is_open_before_it(toy) -> None:
    canvas = torch.full((1, 6), MASK)
    canvas[0, 3] = EOS
    got = decode(toy(), torch.tensor([[5, 6]]), 6, [EndOfText(), Blocks(6)], canvas=canvas)
    assert (got.history.step[0, :3] >= 0).all()
    assert not (got.tokens == MASK).any()


def test_a_given_end_ends_the_row_before_the_first_step(toy, watch) -> None:
    forwards = watch(toy())
    canvas = torch.tensor([[5, EOS, MASK, MASK], [EOS, 7, MASK, 8]])
    got = decode(toy(), torch.tensor([[3], [4]]), 4, [EndOfText()], canvas=canvas)
    assert got.tokens[:, 1:].tolist() == [[5, EOS, EOS, EOS], [EOS, 7, EOS, 8]]
    assert (got.nfe, len(forwards)) == (0, 0)
    assert (got.history.step == -1).all()
