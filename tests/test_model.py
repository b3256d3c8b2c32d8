import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from adapters.mlp import MLP
from encoders.state import StateEncoder
from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.family import Spec
from mmdlm.checkpoint import load
from mmdlm.layout import Row, Turn, from_tokens
from mmdlm.model import MultimodalDLM, align
from mmdlm.text import Tokenizer

WORDS = ["what", "colour", "red", "is", "the", "ball", "?"]
SPEC = Spec(
    family="llada",
    transformer=TransformerConfig(vocab=12, width=16, layers=2, heads=2, inner=24),
    mask_id=2,
    eos_id=1,
    pad_id=0,
)


def build(**changes: object) -> MultimodalDLM:
    spec = replace(SPEC, **changes)
    model = MultimodalDLM(
        spec,
        {"state": StateEncoder.tiny()},
        {"state": MLP(32, 16)},
        Tokenizer.from_words(WORDS),
    )
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        with torch.no_grad():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return model.eval()


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 12, shape, generator=torch.Generator().manual_seed(1))


def state(seed: int) -> np.ndarray:
    return StateEncoder.example(seed)


def encode(model: MultimodalDLM, *seeds: int) -> list[Tensor]:
    return model.encode("state", [model.processor.prepare("state", state(seed)) for seed in seeds])


@torch.inference_mode()
@pytest.mark.parametrize("bad", [12, -1, -100])
def test_ids_outside_the_vocabulary_are_refused(bad: int) -> None:
    """On a GPU the embedding would end the process, so this is checked before."""
    model = build()
    with pytest.raises(ValueError, match=rf"tokens holds the id {bad} at position \[0, 2\]"):
        model.logits(torch.tensor([[3, 4, bad]]))
    rows = [Row((torch.tensor([3]),)), Row((), (Turn(torch.tensor([4, bad]), ids(2)),))]
    with pytest.raises(ValueError, match=rf"row 1 of the batch holds the id {bad} at position \[1"):
        model.embed(rows)
    with pytest.raises(TypeError, match="tokens holds torch.float32, expected token ids"):
        model.logits(torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"tokens is \[3\], expected token ids \[B L\]"):
        model.logits(torch.tensor([3, 4, 5]))


def test_logits_with_a_mask_of_ones_equal_those_without() -> None:
    model, tokens = build(), ids(2, 6)
    plain = model.logits(tokens)
    assert plain.shape == (2, 6, 12)
    assert plain.dtype == torch.float32
    ones = torch.ones(2, 6, 6, dtype=torch.bool)
    for mask in (torch.ones(2, 6), ones, ones[:, None], ones.long(), torch.zeros(2, 6, 6)):
        torch.testing.assert_close(model.logits(tokens, mask=mask), plain)


@pytest.mark.parametrize("shift", [False, True])
@torch.inference_mode()
def test_logits_of_a_padded_row_equal_those_of_a_single_row(shift: bool) -> None:
    model, tokens = build(shift=shift), ids(2, 7)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, :3] = False
    logits = model.logits(tokens, mask=mask)
    torch.testing.assert_close(logits[1, 3:], model.logits(tokens[1:, 3:])[0])
    torch.testing.assert_close(logits[0], model.logits(tokens[:1])[0])


@torch.inference_mode()
def test_logits_do_not_depend_on_padded_tokens() -> None:
    model, tokens = build(), ids(1, 6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    other = tokens.clone()
    other[:, 4:] = 3
    torch.testing.assert_close(
        model.logits(tokens, mask=mask)[:, :4], model.logits(other, mask=mask)[:, :4]
    )


@torch.inference_mode()
def test_logits_with_a_block_causal_mask_equal_that_attention() -> None:
    model, tokens = build(), ids(2, 8)
    at = torch.arange(8) // 3
    mask = (at[None] <= at[:, None]).expand(2, -1, -1)
    torch.testing.assert_close(
        model.logits(tokens, mask=mask),
        model.logits(tokens, attention="block_causal", block_size=3),
    )
    own = build(attention="block_causal", block_size=3)
    own.load_state_dict(model.state_dict())
    torch.testing.assert_close(own.logits(tokens), model.logits(tokens, mask=mask))
    torch.testing.assert_close(own.logits(tokens, attention="full"), model.logits(tokens))


@pytest.mark.parametrize("attention", ["full", "block_causal"])
@pytest.mark.parametrize("blocked", [-torch.inf, torch.finfo(torch.float32).min])
@torch.inference_mode()
def test_mask_formats_give_equal_logits(attention: str, blocked: float) -> None:
    model, tokens = build(attention=attention, block_size=3), ids(2, 8)
    seen = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(2)) < 0.7
    seen[0, :3] = False  # queries without any key
    seen |= torch.eye(8, dtype=torch.bool) & (torch.arange(8) > 2)
    expected = model.logits(tokens, mask=seen)
    assert expected.isfinite().all()
    additive = torch.zeros(2, 8, 8).masked_fill(~seen, blocked)
    for mask in (seen[:, None], seen.int(), additive, additive[:, None], additive.double()):
        logits = model.logits(tokens, mask=mask)
        assert logits.isfinite().all()
        rows = seen.any(-1)
        torch.testing.assert_close(logits[rows], expected[rows])
    for dtype in (torch.bfloat16, torch.float16):
        model.to(dtype)
        pair = model.logits(tokens, mask=additive), model.logits(tokens, mask=seen)
        assert all(logits.isfinite().all() for logits in pair)
        torch.testing.assert_close(*(logits[rows] for logits in pair), atol=0.1, rtol=0.02)


@torch.inference_mode()
def test_additive_mask_of_logits_is_within_the_attention() -> None:
    model, tokens = build(), ids(2, 8)
    mask = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(2))
    block = torch.arange(8) // 3
    both = mask.masked_fill(block > block[:, None], -torch.inf)
    blocks = {"attention": "block_causal", "block_size": 3}
    logits = model.logits(tokens, mask=mask, **blocks)
    torch.testing.assert_close(logits, model.logits(tokens, mask=both))
    assert not torch.allclose(logits, model.logits(tokens, **blocks), atol=1e-2)


@torch.inference_mode()
def test_mask_of_queries_and_keys_equals_the_reference(golden: Path) -> None:
    folder = golden / "backbones" / "mmada"
    model, numbers = load(folder), load_file(folder / "golden.safetensors")
    tokens, seen = numbers["input_ids"], numbers["attention_bias"].bool()
    least = torch.finfo(torch.float32).min
    additive = torch.where(seen, 1.0, least)  # as in MMaDA
    rows = numbers["attention_mask"].bool()
    for mask in (seen, additive):
        logits = model.logits(tokens, mask=mask)
        assert logits.isfinite().all()
        torch.testing.assert_close(logits[rows], numbers["logits_bias"][rows], atol=1e-4, rtol=0)


@torch.inference_mode()
def test_shifted_family_is_aligned() -> None:
    plain, shifted = build(), build(shift=True)
    tokens = ids(2, 5)
    raw, aligned = plain.logits(tokens), shifted.logits(tokens)
    assert torch.equal(aligned[:, 1:], raw[:, :-1])
    assert torch.equal(aligned[:, 0], raw[:, 0])


def test_align_starts_at_the_first_real_row() -> None:
    raw = torch.arange(5.0).expand(2, -1)[..., None]
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]).bool()
    assert align(raw, mask)[0, :, 0].tolist() == [0, 0, 1, 2, 3]
    assert align(raw, mask)[1, 2:, 0].tolist() == [2, 2, 3]


@pytest.mark.parametrize("shift", [False, True])
@torch.inference_mode()
def test_all_logits_methods_agree(shift: bool) -> None:
    model, tokens = build(shift=shift), ids(2, 6)
    expected = model.logits(tokens)
    sequence = from_tokens(tokens, None, "full", None)
    at = torch.zeros(2, 6, dtype=torch.bool)
    at[0, 3], at[1, 1], at[1, 5] = True, True, True
    torch.testing.assert_close(model.logits_at(sequence, at), expected[at])
    torch.testing.assert_close(model.logits_at(sequence, at, slice(2, 7)), expected[at][:, 2:7])
    whole, read = slice(0, 6), slice(2, 5)
    torch.testing.assert_close(model.run(sequence, whole, read, None), expected[:, read])
    kv = model.backbone.cache(2, 6)
    torch.testing.assert_close(model.run(sequence, whole, read, kv), expected[:, read])
    part = model.run(sequence, slice(1, 5), read, kv, slice(3, 9))
    torch.testing.assert_close(part, expected[:, read, 3:9])


def test_scoring_positions_that_are_not_computed_is_rejected() -> None:
    sequence = from_tokens(ids(1, 6), None, "full", None)
    with pytest.raises(ValueError, match="need rows"):
        build().run(sequence, slice(0, 3), slice(2, 5), None)
    with pytest.raises(ValueError, match="need rows"):
        build(shift=True).run(sequence, slice(3, 6), slice(3, 5), None)


def test_mask_of_another_shape_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"mask is \[2, 5\], tokens are \[2, 6\]"):
        build().logits(ids(2, 6), mask=torch.ones(2, 5))
    for shape in ((1, 6, 6), (2, 6, 5), (2, 2, 6, 6), (6,)):
        with pytest.raises(ValueError, match=re.escape(f"mask is {list(shape)}, expected")):
            build().logits(ids(2, 6), mask=torch.ones(shape))


@torch.inference_mode()
def test_row_with_media_in_a_batch_equals_a_single_row() -> None:
    for attention in ("full", "prefix", "cascade"):
        model = build(attention=attention)
        media = encode(model, 0, 1)
        assert [list(m.shape) for m in media] == [[2, 16], [2, 16]]
        rows = [
            Row((media[0],), (Turn(torch.tensor([4, 5, 6]), torch.tensor([2, 2])),)),
            Row((), (Turn(torch.tensor([7]), torch.tensor([2, 2])),)),
            Row((media[1],), (Turn(torch.tensor([8]), torch.tensor([2, 2])),)),
        ]
        together = model.arrange(rows)
        batch = model.logits_at(together, together.is_answer).view(3, 2, 12)
        for row, expected in zip(rows, batch, strict=True):
            alone = model.arrange([row])
            torch.testing.assert_close(model.logits_at(alone, alone.is_answer), expected)


@torch.inference_mode()
def test_turns_of_one_row_equal_separate_rows() -> None:
    # Exact with cascade attention only: in the others, media attend to the prompt.
    model = build(attention="cascade")
    [media] = encode(model, 0)
    turns = [Turn(torch.tensor([4, 5]), torch.tensor([2, 2])), Turn(torch.tensor([6]), ids(3))]
    packed = model.arrange([Row((media,), tuple(turns))])
    logits = model.logits_at(packed, packed.is_answer)
    alone = [model.arrange([Row((media,), (turn,))]) for turn in turns]
    expected = [model.logits_at(s, s.is_answer) for s in alone]
    torch.testing.assert_close(logits, torch.cat(expected))


@torch.inference_mode()
def test_media_are_spliced_into_recomputed_positions() -> None:
    model = build()
    media = encode(model, 0, 1)
    rows = [Row((torch.tensor([4]), m), (Turn(torch.tensor([5]), ids(3)),)) for m in media]
    sequence = model.arrange(rows)
    length = sequence.tokens.shape[1]
    kv = model.backbone.cache(2, length)
    full = model.run(sequence, slice(0, length), slice(0, length), kv)
    for start in range(length):
        part = model.run(sequence, slice(start, length), slice(start, length), kv)
        torch.testing.assert_close(part, full[:, start:])


def test_missing_modality_is_named() -> None:
    with pytest.raises(ValueError, match="takes state, not image"):
        build().processor.prepare("image", None)


def test_robot_state_is_normalised_before_encoding() -> None:
    class Halves:
        def normalize_state(self, item: np.ndarray) -> Tensor:
            return torch.as_tensor(item) / 2

    model = build()
    plain = model.processor.prepare("state", state(0)).tensor
    model.robot = Halves()
    torch.testing.assert_close(model.processor.prepare("state", state(0)).tensor, plain / 2)


def test_encoder_without_adapter_is_rejected() -> None:
    with pytest.raises(ValueError, match="every encoder needs an adapter"):
        MultimodalDLM(SPEC, {"state": StateEncoder.tiny()})


def test_prompt_gives_token_ids() -> None:
    model = build()
    prompt = model.prompt("What colour is the ball?")
    assert model.tokenizer.decode(prompt.tolist()) == "what colour is the ball?"


def test_prompt_with_the_mask_token_is_rejected() -> None:
    class Spells:
        template = None

        def encode(self, text: str) -> list[int]:
            return [4, SPEC.mask_id]

    model = build()
    model.tokenizer = Spells()
    with pytest.raises(ValueError, match="holds the mask token"):
        model.prompt("what <mask>")


def test_prompt_without_a_tokenizer_is_rejected() -> None:
    with pytest.raises(ValueError, match="neither tokenizer.json nor"):
        MultimodalDLM(SPEC).prompt("what")


TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi <|im_end|>"},
]


def test_prompt_of_a_chat_model_is_a_user_message(speller) -> None:
    model = speller(["<|im_start|>", "<|im_end|>"], template="chatml_system")
    said = model.tokenizer.backend.decode(model.prompt("hi").tolist(), skip_special_tokens=False)
    assert said == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert model.prompt("hi", chat=False).tolist() == model.tokenizer.encode("hi")
    end = model.tokenizer.id("<|im_end|>")
    assert (model.prompt(TALK) == end).sum() == 2
    # Without a template, special tokens in a text are encoded as such.
    assert model.prompt("<|im_end|>", chat=False).tolist() == [end]


def test_prompt_without_a_chat_template_is_the_text(speller) -> None:
    for model in (speller(template="chatml"), speller(["<|im_start|>", "<|im_end|>"])):
        assert model.prompt("hi").tolist() == model.tokenizer.encode("hi")
        with pytest.raises(ValueError, match="no chat template"):
            model.prompt(TALK)
        with pytest.raises(ValueError, match="no chat template"):
            model.prompt("hi", chat=True)


def test_models_with_encoders_use_their_chat_template(speller) -> None:
    model = speller(["<|im_start|>", "<|im_end|>"], template="chatml")
    spec, tokenizer = model.spec, model.tokenizer
    seeing = MultimodalDLM(spec, {"state": StateEncoder.tiny()}, {"state": MLP(32, 16)}, tokenizer)
    assert torch.equal(seeing.prompt("hi"), model.prompt("hi"))
    assert torch.equal(seeing.prompt("hi", chat=False), model.prompt("hi", chat=False))
    with pytest.raises(ValueError, match="contains media"):
        seeing.prompt([{"role": "user", "content": [{"type": "image", "image": "a.png"}]}])


@pytest.mark.parametrize("chat", [None, False])
def test_mask_in_a_prompt_is_rejected_in_any_template(speller, chat: bool | None) -> None:
    model = speller(["<|im_start|>", "<|im_end|>"], template="chatml")
    with pytest.raises(ValueError, match="holds the mask token"):
        model.prompt("a <|mask|> b", chat=chat)


def test_conversation_with_chat_false_is_rejected(speller) -> None:
    with pytest.raises(ValueError, match="chat is False"):
        speller().prompt(TALK, chat=False)
