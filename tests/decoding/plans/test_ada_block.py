import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmdlm.decoding.caches.prefix_lm import PrefixLM
from mmdlm.decoding.caches.sub_block_cache import SubBlockCache
from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.decoding.delimiters import line_breaks
from mmdlm.decoding.plans.ada_block import AdaBlock
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.strategy import Strategy
from mmdlm.text import Tokenizer

FILE = Path(__file__).parents[2] / "golden" / "decoding" / "schedules.json"
METHODS = {name: m["cases"] for name, m in json.loads(FILE.read_text())["methods"].items()}
LENGTH = 16
OFTEN = tuple(range(3, 30))  # a toy model predicts one of these soon


def each(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", METHODS[name], ids=range(len(METHODS[name])))


@each("adablock_block_length")
def test_a_block_is_as_long_as_that_of_the_reference(case: dict, synthetic, monkeypatch) -> None:
    params, logits = case["params"], torch.tensor(case["logits"])
    size = {"seed": 0, "vocab": logits.shape[1], "scale": 1, "mix": 0, "eos_slope": 0}
    model = synthetic({**size, "eos_id": None, "mask_id": logits.shape[1], "shift": 0})
    monkeypatch.setattr(model, "run", lambda sequence, rows, read, *_: logits[None, read])
    canvas = torch.full((1, params["gen_length"]), model.spec.mask_id)
    canvas[:, : params["generated_length"]] = 0
    strategy = AdaBlock(
        params["default_block_length"],
        float(params["delimiter_threshold"]),
        tuple(params["delimiter_ids"]),
    )
    prompt = torch.zeros(1, params["prompt_len"], dtype=torch.long)
    got = decode(
        model, prompt, params["gen_length"], [strategy, Threshold(0)], canvas=canvas
    ).history.step[0]
    assert (got == 0).sum() == case["output"]


@each("adablock_generate")
def test_rollout_is_that_of_ada_block(case: dict, synthetic) -> None:
    params, output, prompt = case["params"], case["output"], case["prompt"]
    strategy = AdaBlock(
        params["init_block_length"],
        float(params["delimiter_threshold"]),
        tuple(params["delimiter_ids"]),
    )
    got = decode(
        synthetic(case["model"]),
        torch.tensor([prompt]),
        params["gen_length"],
        [strategy, Threshold(params["threshold"])],
    )
    steps = got.history.step[0]
    assert got.tokens.tolist() == [output["sequence"]]
    assert got.nfe == sum(output["nfe_per_block"])
    found = [(len(prompt) + (steps == i).nonzero()[:, 0]).tolist() for i in range(got.nfe)]
    assert found == output["commits"]


@pytest.mark.parametrize("more", [[Threshold(0.2)], [TopK(4)]])
@pytest.mark.parametrize("strategy", [AdaBlock(5, math.inf, OFTEN), AdaBlock(5, 0.1, ())])
def test_without_a_sure_delimiter_blocks_are_fixed(
    strategy: Strategy, more: list, toy, prompts
) -> None:
    tokens, mask = prompts(7, 4, 6)
    ours, fixed = (
        decode(toy(), tokens, LENGTH, [plan, *more], mask=mask) for plan in (strategy, Blocks(5))
    )
    assert ours.tokens.equal(fixed.tokens)
    assert ours.history.step.equal(fixed.history.step)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(
    "more", [[], [Threshold(0.15)], [SubBlockCache(), Threshold(0.2)], [PrefixLM(), TopK(8)]]
)
def test_rows_with_blocks_of_their_own_are_what_they_are_alone(
    more: list, shift: bool, toy, prompts
) -> None:
    model, sizes = toy(shift=shift), (7, 4, 6, 5)
    tokens, mask = prompts(*sizes)
    chosen = [AdaBlock(5, 0.05, OFTEN, share=0.5), *more]
    batch = decode(model, tokens, LENGTH, chosen, mask=mask)
    opened = decode(model, tokens, LENGTH, [chosen[0], Threshold(0)], mask=mask).history.step
    assert len({int((row == 0).sum()) for row in opened}) > 1  # or nothing is shown
    for i, size in enumerate(sizes):
        alone = decode(model, tokens[i : i + 1, -size:], LENGTH, chosen)
        assert batch.tokens[i, 7:].tolist() == alone.tokens[0, size:].tolist()


def test_line_breaks_come_from_the_tokenizer(toy) -> None:
    tokenizer = Tokenizer.from_words(["a", "<0x0A>", "b"])
    assert line_breaks(SimpleNamespace(tokenizer=tokenizer)) == [tokenizer.id("<0x0A>")]
    assert line_breaks(SimpleNamespace(tokenizer=Tokenizer.from_words(["a"]))) == []
    with pytest.warns(UserWarning, match="no tokenizer with a line break, so all blocks are of 32"):
        decode(toy(), torch.tensor([[3, 4]]), 4, [AdaBlock()])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": 0}, "AdaBlock.size is 0"),
        ({"threshold": -1.0}, "AdaBlock.threshold is -1.0"),
        ({"share": 1.5}, "AdaBlock.share is 1.5"),
    ],
)
def test_bad_arguments_of_ada_block(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaBlock(**given)


def test_a_given_delimiter_ends_no_block(toy) -> None:
    everything, given = tuple(range(50)), torch.full((1, 8), 2)
    given[0, 1::2] = 9
    strategy = AdaBlock(size=3, threshold=0.0, delimiters=everything, share=1.0)
    for prompt in torch.randint(3, 50, (6, 1, 4), generator=torch.Generator().manual_seed(0)):
        got = decode(toy(), prompt, 8, [strategy, Threshold(0)], canvas=given)
        best = decode(toy(), prompt, 8, canvas=given)
        # The block ends after the most probable mask, whatever is predicted where tokens are.
        last = int((best.history.step[0] == 0).nonzero())
        assert (got.history.step[0] == 0).nonzero()[:, 0].tolist() == list(range(0, last + 1, 2))
