import pytest
import torch
from torch import Tensor

from mmdlm.layout import (
    MEDIUM,
    PROMPT,
    TOKEN,
    Row,
    Turn,
    arrange,
    from_tokens,
    levels,
    visible,
)

PAD = 9


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.long)


def two_turns() -> Row:
    image = torch.arange(9.0).view(3, 3)
    return Row((image,), (Turn(ids(2, 3), ids(4, 4, 4)), Turn(ids(5), ids(6, 6))))


def test_rows_are_padded_on_the_left() -> None:
    sequence = arrange([Row((ids(1, 2, 3, 4),)), Row((ids(5),))], pad=PAD)
    assert sequence.tokens.tolist() == [[1, 2, 3, 4], [PAD, PAD, PAD, 5]]
    assert sequence.mask.tolist() == [[True] * 4, [False] * 3 + [True]]
    assert sequence.positions[1, 3] == 0
    assert sequence.media is None
    assert sequence.branch is None


def test_answers_of_unequal_prompts_align() -> None:
    rows = [Row((ids(1),), (Turn(ids(2), ids(7, 7)),)), Row((), (Turn(ids(2, 2, 2), ids(8, 8)),))]
    sequence = arrange(rows, pad=PAD)
    assert sequence.tokens[:, -2:].tolist() == [[7, 7], [8, 8]]
    assert sequence.is_answer[:, -2:].all()
    assert not sequence.is_answer[:, :-2].any()


def test_media_positions_have_the_pad_id_and_keep_their_order() -> None:
    first, second = torch.ones(2, 3), torch.zeros(1, 3)
    sequence = arrange([Row((ids(1), first, ids(2))), Row((second, ids(3)))], pad=PAD)
    assert sequence.tokens.tolist() == [[1, PAD, PAD, 2], [PAD, PAD, PAD, 3]]
    assert sequence.source[0].tolist() == [TOKEN, MEDIUM, MEDIUM, TOKEN]
    assert sequence.role.eq(PROMPT).all()
    assert torch.equal(sequence.media, torch.cat([first, second]))
    assert sequence.is_medium.sum() == 3
    assert not (sequence.is_medium & ~sequence.mask).any()


def test_turns_attend_to_the_shared_image_but_not_to_each_other() -> None:
    sequence = arrange([two_turns()], pad=PAD, attention="cascade")
    assert sequence.branch.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2]]
    assert sequence.positions.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 3, 4, 5]]
    seen = sequence.visible()[0]
    assert not seen[:3, 3:].any()
    assert seen[3:5, :5].all()
    assert not seen[3:5, 5:].any()
    assert seen[5:8, :8].all()
    assert not seen[3:8, 8:].any()
    assert not seen[8:, 3:8].any()
    assert seen[:, :3].all()


def test_turns_without_shared_parts_are_separate_in_any_attention() -> None:
    row = Row((), (Turn(ids(1, 2), ids(3)), Turn(ids(4), ids(5, 6))))
    seen = arrange([row], pad=PAD).visible()[0]
    assert seen[:3, :3].all()
    assert seen[3:, 3:].all()
    assert not seen[:3, 3:].any()
    assert not seen[3:, :3].any()


def test_shared_parts_that_attend_to_turns_are_rejected() -> None:
    for attention in ("full", "prefix", "block_causal"):
        with pytest.raises(ValueError, match="2 turns share media.*use cascade"):
            arrange([two_turns()], pad=PAD, attention=attention, block_size=2)
    row = Row((ids(1),), two_turns().turns)
    with pytest.raises(ValueError, match="2 turns share text"):
        arrange([row], pad=PAD, attention="cascade")


def test_cascade_levels() -> None:
    row = Row((torch.zeros(2, 3),), (Turn(ids(1, 1), ids(2, 2)),))
    seen = arrange([row], pad=PAD, attention="cascade").visible()[0]
    assert seen.int().tolist() == [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1],
    ]


def test_answers_are_block_causal_with_a_block_size() -> None:
    row = Row((), (Turn(ids(1), ids(2, 2, 2, 2)),))
    seen = arrange([row], pad=PAD, attention="prefix", block_size=2).visible()[0]
    assert seen.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1],
    ]


@pytest.mark.parametrize("block", [1, 2, 3, 7])
def test_block_causal_attends_to_the_same_and_earlier_blocks(block: int) -> None:
    seen = from_tokens(torch.zeros(1, 6, dtype=torch.long), None, "block_causal", block).visible()
    expected = [[j // block <= i // block for j in range(6)] for i in range(6)]
    assert (seen is None and block == 7) or seen[0].tolist() == expected


def test_blocks_of_a_padded_row_count_from_its_first_token() -> None:
    mask = torch.tensor([[False, False, True, True, True]])
    sequence = from_tokens(torch.zeros(1, 5, dtype=torch.long), mask, "block_causal", 2)
    assert sequence.visible()[0, 2:, 2:].tolist() == [
        [True, True, False],
        [True, True, False],
        [True, True, True],
    ]
    assert not sequence.visible()[0, :, :2].any()


def test_full_attention_without_padding_needs_no_mask() -> None:
    tokens = torch.zeros(2, 4, dtype=torch.long)
    assert from_tokens(tokens, None, "full", None).visible() is None
    assert from_tokens(tokens, torch.ones(2, 4), "full", None).visible() is None


def test_only_left_padding_shifts_positions() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    sequence = from_tokens(torch.zeros(4, 5, dtype=torch.long), mask, "full", None)
    assert sequence.positions[0, 2:].tolist() == [0, 1, 2]
    assert sequence.positions[1].tolist() == [0, 1, 2, 3, 4]
    assert sequence.positions[2, :3].tolist() == [0, 1, 2]
    assert (sequence.positions >= 0).all()


def test_mask_of_some_positions_equals_part_of_the_full_mask() -> None:
    sequence = arrange([two_turns(), Row((ids(1, 1),))], pad=PAD, attention="cascade")
    level, branch = sequence.level, sequence.branch
    part = visible(level[:, 3:6], level, sequence.mask, branch[:, 3:6], branch)
    assert torch.equal(part, sequence.visible()[:, 3:6])


def test_sequence_to_device_and_with_tokens() -> None:
    sequence = arrange([two_turns()], pad=PAD, attention="cascade")
    other = sequence.to("meta")
    assert other.tokens.is_meta
    assert other.media.is_meta
    changed = sequence.with_tokens(sequence.tokens + 1)
    assert torch.equal(changed.tokens, sequence.tokens + 1)
    assert changed.level is sequence.level


def test_invalid_layouts_are_rejected() -> None:
    tokens = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="got no rows, expected at least one"):
        arrange([], pad=PAD)
    with pytest.raises(ValueError, match=r"mask is \[1, 2\], tokens are \[1, 3\]"):
        from_tokens(tokens, torch.ones(1, 2), "full", None)
    with pytest.raises(ValueError, match="block_causal attention needs"):
        from_tokens(tokens, None, "block_causal", None)
    with pytest.raises(ValueError, match="attention 'causal' is unknown; expected full"):
        levels(tokens, tokens, tokens, tokens, "causal", None)
