"""Every preset on a tiny checkpoint of every family, and on the bundled model."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import mmdlm
from mmdlm.data import scenes
from mmdlm.decoding.decode import Decoded
from mmdlm.model import MultimodalDLM

pytestmark = [
    pytest.mark.filterwarnings("ignore:AdaBlock. the model has no tokenizer with a line break"),
    pytest.mark.filterwarnings("ignore:.*changes nothing in an answer of"),
]

TESTS = Path(__file__).parents[1]
FAMILIES = sorted(path.name for path in (TESTS / "golden" / "backbones").iterdir())
PRESETS = sorted(path.stem for path in (TESTS.parent / "configs" / "decoding").glob("*.yaml"))
LENGTH = 12
LENGTHS = {"daedal": 1, "dystruct": 4}  # the answer grows to 32
SIZES = (27, 18, 25)  # blocks of 32 end within the answers of two rows, at different columns
ALL_ROWS = ("dream", "sdar")  # compared with rows alone; of each of the many other families, one

IN_BLOCKS = ("fast_dllm_v2", "llada2_moe", "sdar")
FULL = "requires full attention, but this model has {} attention; leave"
ORDER = "requires an answer that can be filled in any order, .* block_causal attention in blocks of"
NOT_FULL = {
    **{"daedal": "DAEDAL", "dllm_cache": "DLLMCache", "dystruct": "Dystruct"},
    **{"lavida": "PrefixLM", "learn2pd": "EndCut"},
}
REASONS = {
    **{preset: f"{name} {FULL.format('block_causal')}" for preset, name in NOT_FULL.items()},
    "elastic": f"ElasticCache {ORDER}",
    "window_diffusion": f"WindowDiffusion {ORDER}",
}
REFUSED = {(family, preset): why for family in IN_BLOCKS for preset, why in REASONS.items()}
"""All pairs that do not work, with what the error says."""

REFUSED_BY_TINY = {preset: f"{name} {FULL.format('cascade')}" for preset, name in NOT_FULL.items()}

PAIRS = [(family, preset) for family in FAMILIES for preset in PRESETS]
FINE = [pair for pair in PAIRS if pair not in REFUSED]
Family = Callable[[str], MultimodalDLM]


@pytest.fixture(scope="session")
def family(golden: Path) -> Family:
    """family(name): its tiny checkpoint, read once."""
    loaded: dict[str, MultimodalDLM] = {}

    def load(name: str) -> MultimodalDLM:
        if name not in loaded:
            folder = golden / "backbones" / name
            unknown = mmdlm.load(folder, device="meta").spec
            mask = {"mask_id": unknown.transformer.vocab - 1} if unknown.mask_id is None else {}
            loaded[name] = mmdlm.load(folder, device="cpu", **mask)
        return loaded[name]

    return load


def unequal(model: MultimodalDLM) -> tuple[Tensor, Tensor]:
    """Prompts of random words as one left-padded batch, with its mask."""
    spec, generator = model.spec, torch.Generator().manual_seed(5)
    special = torch.tensor([spec.mask_id, spec.eos_id, spec.pad_id, *spec.stop_ids])
    ids = torch.arange(spec.transformer.vocab)
    ids = ids[~torch.isin(ids, special)]
    shape = len(SIZES), max(SIZES)
    tokens = ids[torch.randint(len(ids), shape, generator=generator)]
    real = torch.arange(max(SIZES)) >= max(SIZES) - torch.tensor(SIZES)[:, None]
    return tokens.where(real, spec.pad_id), real


def fill(
    model: MultimodalDLM, preset: str, tokens: Tensor, mask: Tensor | None, *seeds: int
) -> Decoded:
    """The batch decoded, every row with a seed of its own."""
    sources = [torch.Generator().manual_seed(seed) for seed in seeds]
    length = LENGTHS.get(preset, LENGTH)
    return mmdlm.decode(model, tokens, length, preset, mask=mask, generator=sources)


def test_the_table_of_refusals_names_what_exists() -> None:
    assert set(REFUSED) <= set(PAIRS)
    assert set(REFUSED_BY_TINY) <= set(PRESETS)


@pytest.mark.parametrize(("name", "preset"), FINE)
def test_a_preset_fills_the_answers_of_a_family(name: str, preset: str, family: Family) -> None:
    model = family(name)
    tokens, mask = unequal(model)
    got = fill(model, preset, tokens, mask, 8, 9, 10)
    answers = got.tokens[:, max(SIZES) :]
    assert got.tokens[:, : max(SIZES)].equal(tokens)
    assert not (answers == model.spec.mask_id).any()
    assert max(got.forwards) <= 4 * answers.shape[1]
    if preset == "odd":
        return  # its rows are meant to look at each other
    turn = FAMILIES.index(name) + PRESETS.index(preset)
    for i in range(len(SIZES)) if name in ALL_ROWS else [turn % len(SIZES)]:
        size = SIZES[i]
        row = fill(model, preset, tokens[i : i + 1, -size:], None, 8 + i).tokens[0, size:]
        rest = answers.shape[1] - len(row)  # others of the batch may have grown longer
        assert answers[i].tolist() == row.tolist() + [model.spec.eos_id] * rest


@pytest.mark.parametrize(("name", "preset"), REFUSED)
def test_a_preset_that_cannot_work_says_why_before_it_starts(
    name: str, preset: str, family: Family, watch
) -> None:
    model = family(name)
    forwards = watch(model)
    with pytest.raises(ValueError, match=REFUSED[name, preset]):
        fill(model, preset, *unequal(model), 8, 9, 10)
    assert not forwards


@pytest.fixture(scope="module")
def tiny() -> MultimodalDLM:
    return mmdlm.load("tiny", device="cpu")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_describes_a_scene_and_fills_a_template(
    preset: str, tiny: MultimodalDLM, watch
) -> None:
    scene = scenes.random_scene(np.random.default_rng(3), 2)
    picture, right = scenes.draw(scene), "a large white triangle above a small yellow cross"
    template = "a large [MASK] triangle above a small yellow [MASK]"
    assert scenes.describe(scene) == right
    how = {"strategies": preset, "seed": 0}
    asked = {**how, "prompt": "describe the picture"}
    if preset not in REFUSED_BY_TINY:
        assert mmdlm.caption(tiny, picture, **how) == right
        assert mmdlm.infill(tiny, template, picture, **asked) == right
        return
    forwards = watch(tiny)
    for ask, given in ((mmdlm.caption, [picture]), (mmdlm.infill, [template, picture])):
        with pytest.raises(ValueError, match=REFUSED_BY_TINY[preset]):
            ask(tiny, *given, **how)
    assert not forwards
