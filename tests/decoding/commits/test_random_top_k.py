"""MaskGIT sampling of image codes: published schedules, temperatures and seeded decodes."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mmdlm
from mmdlm.decoding.caches.max_logit_cache import MaxLogitCache
from mmdlm.decoding.commits.random_top_k import RandomTopK
from mmdlm.decoding.decode import Decoded, decode
from mmdlm.decoding.guidance.cfg import CFG
from mmdlm.decoding.schedules import kept
from mmdlm.decoding.state import Streams
from mmdlm.model import MultimodalDLM

GOLDEN = Path(__file__).parents[2] / "golden" / "vision"
CODES = slice(64, 80)  # ids of the image codes in both goldens


def read(system: str, name: str):
    return json.loads((GOLDEN / system / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, MultimodalDLM]:
    found = {}
    for system in ("mmada", "lumina_dimoo"):
        folder = tmp_path_factory.mktemp(system)
        config = read(system, "config")["llm"] | {"eos_token_id": 61, "pad_token_id": 62}
        named = {"architectures": ["LLaDAModelLM"], "model_type": "llada"}
        (folder / "config.json").write_text(json.dumps(config | named))
        weights = (GOLDEN / system / "weights.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(weights)
        found[system] = mmdlm.load(folder)
    return found


def seeds(*given: int) -> Streams:
    return Streams.exactly([torch.Generator().manual_seed(seed) for seed in given])


@pytest.mark.parametrize("case", read("mmada", "masked_after_step"), ids=lambda c: str(c.values()))
def test_mmada_keeps_the_published_number_of_masks(case) -> None:
    count, steps, schedule = case["vq_tokens"], case["timesteps"], case["schedule"]
    table, left, found = kept(count, steps, schedule), count, []
    for share in table:
        left = max(1, min(left - 1, share))
        found.append(left)
    assert found == case["masked_after_step"]
    rule, left = RandomTopK(steps, schedule), count
    for step, want in enumerate(found[:-1]):
        left = rule._stay(count, steps, step, left)
        assert left == want
    assert rule._stay(count, steps, steps - 1, left) == 0


@pytest.mark.parametrize("case", read("lumina_dimoo", "kept_masked"), ids=lambda c: c["timesteps"])
def test_lumina_keeps_the_published_number_of_masks(case) -> None:
    count, steps, want = case["vq_tokens"], case["timesteps"], case["kept_masked"]
    assert [max(1, n) for n in kept(count, steps, "cosine")[:-1]] == want[:-1]
    rule, left = RandomTopK(steps, sampler="lumina"), count
    for step, most in enumerate(want):
        before, left = left, rule._stay(count, steps, step, left)
        assert left == min(most, before - 1) or before == 0


@pytest.mark.parametrize("steps", read("mmada", "temperature"))
def test_the_temperature_of_mmada_falls_like_the_published_one(steps) -> None:
    want = read("mmada", "temperature")[steps]
    rule = RandomTopK(int(steps))
    found = [rule._temperature(step, int(steps)) for step in range(int(steps))]
    assert found == pytest.approx(want, rel=1e-12, abs=1e-300)
    assert RandomTopK(8, temperature=0.5, sampler="lumina")._temperature(7, 8) == 0.5


def mmada(models, name: str, copies: int = 1) -> tuple[Decoded, torch.Tensor]:
    """A golden text-to-image decode of MMaDA, and its codes."""
    tensors = load_file(GOLDEN / "mmada" / "tensors.safetensors")
    given = read("mmada", "config")["gens"][name]
    before = tensors["input_ids"].shape[1] - 17  # 16 codes and the end of the image
    ids, bare = tensors["input_ids"], tensors["uncond_input_ids"]
    prompt = ids[:, :before][tensors["attention_mask"][:, :before].bool()]
    other = bare[:, :before][tensors["uncond_attention_mask"][:, :before].bool()]
    chosen = [RandomTopK(given["timesteps"], given.get("schedule", "cosine"), given["temperature"])]
    guided = given["guidance_scale"] > 0
    found = decode(
        models["mmada"],
        prompt.expand(copies, -1),
        17,
        [*chosen, *([CFG(given["guidance_scale"])] if guided else [])],
        generator=seeds(*[given["seed"]] * copies),
        columns=CODES,
        canvas=ids[:, before:].expand(copies, -1),
        alternatives={"text": other.expand(copies, -1)} if guided else None,
    )
    return found, tensors[f"t2i.{name}"]


@pytest.mark.parametrize("name", ["greedyish", "cfg", "linear"])
def test_mmada_draws_the_published_codes(models, name) -> None:
    for copies in (1, 3):
        found, want = mmada(models, name, copies)
        assert torch.equal(found.tokens[:, -17:-1] - CODES.start, want.expand(copies, -1))
        steps = read("mmada", "config")["gens"][name]["timesteps"]
        assert found.nfe == steps * (1 if name == "greedyish" else 2)


@pytest.mark.parametrize("name", ["nocfg", "cfg", "cfg_cache"])
def test_lumina_draws_the_published_codes(models, name) -> None:
    tensors = load_file(GOLDEN / "lumina_dimoo" / "tensors.safetensors")
    config = read("lumina_dimoo", "config")
    given, whole = config["gens"][name], tensors["prompt"]
    before = int((whole[0] == config["mask"]).nonzero()[0]) - 2
    chosen = [RandomTopK(given["timesteps"], temperature=given["temperature"], sampler="lumina")]
    if given["cfg_scale"]:
        chosen.append(CFG(given["cfg_scale"]))
    if given.get("use_cache"):
        ratios = (given["cache_ratio"], given["warmup_ratio"], given["refresh_interval"])
        chosen.append(MaxLogitCache(*ratios, given["timesteps"]))
    for copies in (1, 2):
        found = decode(
            models["lumina_dimoo"],
            whole[:, :before].expand(copies, -1),
            whole.shape[1] - before,
            chosen,
            generator=seeds(*[given["seed"]] * copies),
            columns=CODES,
            canvas=whole[:, before:].expand(copies, -1),
            alternatives={"text": tensors["uncond"].expand(copies, -1)}
            if given["cfg_scale"]
            else None,
        )
        rows, columns = config["grid"]
        codes = found.tokens[:, before + 2 : -2].reshape(copies, rows, columns + 1)
        assert bool((codes[:, :, -1] == config["newline"]).all())
        assert torch.equal(codes[:, :, :-1].flatten(1), tensors[f"t2i.{name}"].expand(copies, -1))


@pytest.mark.parametrize("case", read("lumina_dimoo", "refresh"), ids=lambda c: c["timesteps"])
def test_the_max_logit_cache_computes_everything_in_the_published_steps(case) -> None:
    settings = (case["warmup_ratio"], case["refresh_interval"], case["timesteps"])
    cache = MaxLogitCache(0.9, *settings)
    full = [step for step in range(case["timesteps"]) if cache.is_full(step)]
    assert full == case["refresh_steps"]


def test_sigmoid_and_float32_curves_are_those_computed_by_hand() -> None:
    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    low, high = sigmoid(-3), sigmoid(3)
    for i, count in enumerate(kept(1000, 7, "sigmoid")[:-1], 1):
        want = 1000 * (high - sigmoid(6 * i / 7 - 3)) / (high - low)
        assert count in (math.floor(want - 1e-3), math.floor(want + 1e-3))
    assert kept(64, 12, "cosine")[7] == 31  # cos(pi / 3) in float32 is a little less than 1/2


def test_the_last_mask_of_lumina_is_not_kept_and_that_of_mmada_is() -> None:
    assert RandomTopK(50, sampler="lumina")._stay(4, 50, 20, 1) == 0
    assert RandomTopK(50)._stay(4, 50, 20, 1) == 1


def test_codes_that_are_given_stay(models) -> None:
    canvas = torch.full((1, 16), 60)
    canvas[0, 3:9] = torch.tensor([64, 65, 66, 67, 68, 69])
    for sampler in ("mmada", "lumina"):
        found = decode(
            models["mmada"],
            torch.tensor([[51, 1, 7]]),
            16,
            [RandomTopK(6, sampler=sampler)],
            generator=seeds(0),
            columns=CODES,
            canvas=canvas,
        ).tokens[0, 3:]
        assert found[3:9].tolist() == [64, 65, 66, 67, 68, 69]
        assert bool(((found >= 64) & (found < 80)).all())
