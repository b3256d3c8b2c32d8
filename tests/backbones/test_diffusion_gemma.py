"""DiffusionGemma: equal to transformers' own model, which is made here with random weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import mmdlm
from mmdlm import checkpoint
from mmdlm.backbones.diffusion_gemma import DiffusionGemma
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.commits.uniform_canvas import UniformCanvas
from mmdlm.decoding.view import View
from mmdlm.layout import Row, Turn, append_answer
from mmdlm.model import MultimodalDLM
from mmdlm.objectives.masked import Masked
from mmdlm.objectives.objective import Batch

VOCAB, CANVAS, WIDTH, EOS = 64, 8, 32, 1
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "use_bidirectional_attention": "vision",
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 12,
    "max_position_embeddings": 512,
}
VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "patch_size": 4,
    "pooling_kernel_size": 2,
    "position_embedding_size": 32,
}


@pytest.fixture(scope="module")
def oracle() -> nn.Module:
    """transformers' model; encoder and decoder have different output factors."""
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

    ids = {"image_token_id": 60, "boi_token_id": 61, "eoi_token_id": 62}
    config = DiffusionGemmaConfig(
        text_config=TEXT, vision_config=VISION, canvas_length=CANVAS, **ids
    )
    made = DiffusionGemmaForBlockDiffusion(config).eval()
    generator = torch.Generator().manual_seed(1)
    for name, weight in made.named_parameters():
        mean = 1.0 if "norm" in name or "scale" in name else 0.0
        # Rounding would grow from step to step with large weights of the self-conditioning.
        std = 0.02 if "self_conditioning" in name else 0.3
        nn.init.normal_(weight, mean=mean, std=std, generator=generator)
    for name, buffer in made.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.fill_(0.8 if "encoder" in name else 0.9)
    return made


@pytest.fixture(scope="module")
def folder(oracle: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("diffusion_gemma")
    oracle.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> MultimodalDLM:
    return mmdlm.load(folder, device="cpu")


def prompt_of(length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 60, (length,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("length", [3, 13])
@pytest.mark.parametrize("conditioned", [False, True])
def test_logits_of_a_canvas_equal_transformers(
    oracle: nn.Module, model: MultimodalDLM, length: int, conditioned: bool
) -> None:
    prompt, canvas = prompt_of(length), prompt_of(CANVAS, 1)
    before = torch.randn(1, CANVAS, VOCAB, generator=torch.Generator().manual_seed(2))
    expected = oracle(
        input_ids=prompt[None],
        decoder_input_ids=canvas[None],
        self_conditioning_logits=before if conditioned else None,
    ).logits[0]
    sequence = append_answer(model.spec, model.arrange([Row((prompt,))]), canvas[None])
    if conditioned:
        soft = torch.zeros(1, length + CANVAS, WIDTH)
        soft[:, length:] = model.backbone.soft(before)
        sequence = replace(sequence, soft=soft)
    got = model.logits_at(sequence, sequence.is_answer)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


class Draws:
    """Random numbers of our decode by block and step, and transformers' sampler with them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.noise: dict[tuple[int, int], Tensor] = {}
        self.samples: dict[tuple[int, int], Tensor] = {}
        uniform = View.uniform

        def recorded(view: View, *size: int, **more: Any) -> Tensor:
            found = uniform(view, *size, **more)
            key = int(view.block[0]), int(view.block_step[0])
            (self.samples if key in self.noise else self.noise)[key] = found[0]
            return found

        monkeypatch.setattr(View, "uniform", recorded)

    def replay(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Makes transformers' sampler use the recorded numbers."""
        from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
            EntropyBoundSampler,
        )

        at = [-1, 0]
        renoise = EntropyBoundSampler.renoise_canvas

        def initial(sampler: Any, batch_size: int, device: Any) -> Tensor:
            if not getattr(sampler, "renoising", False):
                at[:] = at[0] + 1, 0
            u = self.noise.get(tuple(at), torch.zeros(CANVAS))
            return (u * VOCAB).long()[None]

        def renoised(sampler: Any, canvas: Tensor, cur_step: Any) -> Tensor:
            at[1] += 1
            sampler.renoising = True
            found = renoise(sampler, canvas, cur_step)
            sampler.renoising = False
            return found

        def multinomial(probabilities: Tensor, num_samples: int) -> Tensor:
            total = probabilities.cumsum(-1)
            u = self.samples[tuple(at)][:, None]
            return torch.searchsorted(total, u * total[:, -1:]).clamp(max=VOCAB - 1)

        monkeypatch.setattr(EntropyBoundSampler, "initialize_canvas", initial)
        monkeypatch.setattr(EntropyBoundSampler, "renoise_canvas", renoised)
        monkeypatch.setattr(torch, "multinomial", multinomial)


def ended(tokens: list[int]) -> list[int]:
    """Tokens up to the first end token."""
    return tokens[: tokens.index(EOS)] if EOS in tokens else tokens


@pytest.mark.parametrize(
    ("length", "steps", "gamma", "stable", "confident", "hot", "ends_early"),
    [
        (5, 6, 0.1, 1, 0.005, 0.8, False),
        (13, 10, 2.0, 1, 5.0, 0.8, False),
        (13, 10, 100.0, 1, 5.0, 0.1, True),
        (13, 10, 100.0, 2, 5.0, 0.1, True),
        (9, 8, 1.0, 0, 2.5, 0.8, True),
    ],
)
def test_ids_over_two_canvases_equal_transformers_with_the_same_draws(
    oracle: nn.Module,
    model: MultimodalDLM,
    monkeypatch: pytest.MonkeyPatch,
    length: int,
    steps: int,
    gamma: float,
    stable: int,
    confident: float,
    hot: float,
    ends_early: bool,
) -> None:
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
        EntropyBoundSamplerConfig,
    )

    draws, prompt = Draws(monkeypatch), prompt_of(length, length)
    rule = UniformCanvas(steps, gamma, hot, hot / 2, stable, confident)
    got = mmdlm.decode(
        model, prompt[None], 2 * CANVAS, [rule], generator=torch.Generator().manual_seed(3)
    )
    draws.replay(monkeypatch)
    expected = oracle.generate(
        input_ids=prompt[None],
        max_new_tokens=2 * CANVAS,
        max_denoising_steps=steps,
        sampler_config=EntropyBoundSamplerConfig(entropy_bound=gamma),
        t_min=hot / 2,
        t_max=hot,
        stability_threshold=stable,
        confidence_threshold=confident,
        eos_token_id=None,
    )
    ids = getattr(expected, "sequences", expected)[0, length:].tolist()
    assert got.tokens[0, length:].tolist() == ids
    taken = got.history.step[0].view(2, CANVAS)
    assert (taken == taken[:, :1]).all()  # a canvas is written at once
    assert int(taken[1, 0]) + 1 == len(draws.noise) == got.nfe
    assert (got.nfe < 2 * steps) is ends_early


def test_rows_agree_alone_and_in_a_batch(model: MultimodalDLM) -> None:
    rule = [UniformCanvas(5, 1.0, confident=4.0)]
    prompts = [prompt_of(3, 5), prompt_of(17, 6), prompt_of(9, 7)]
    rows = model.arrange([Row((prompt,)) for prompt in prompts])
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    together = mmdlm.decode(model, rows, 20, rule, generator=generators)
    for i, prompt in enumerate(prompts):
        generator = [torch.Generator().manual_seed(i)]
        alone = mmdlm.decode(model, prompt[None], 20, rule, generator=generator)
        assert torch.equal(together.tokens[i, -20:], alone.tokens[0, -20:])
        assert torch.equal(together.history.step[i], alone.history.step[0])
        assert together.forwards[i] == alone.nfe
    assert len({tuple(row) for row in together.tokens[:, -20:].tolist()}) == 3


def test_known_tokens_of_an_answer_stay(model: MultimodalDLM) -> None:
    canvas = torch.full((1, 12), model.spec.mask_id)
    canvas[0, [2, 9]] = torch.tensor([40, 41])
    got = mmdlm.decode(model, prompt_of(5)[None], 12, [UniformCanvas(3)], canvas=canvas)
    answer = got.tokens[0, -12:]
    assert answer[[2, 9]].tolist() == [40, 41]
    assert (answer < VOCAB).all()


def test_the_canvas_rule_is_used_unless_another_one_decides(model: MultimodalDLM) -> None:
    prompt = prompt_of(5)[None]
    got = mmdlm.decode(model, prompt, 8, generator=torch.Generator().manual_seed(0))
    same = mmdlm.decode(
        model, prompt, 8, [UniformCanvas()], generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(got.tokens, same.tokens)
    with pytest.raises(ValueError, match="TopK and UniformCanvas both decide 'select'"):
        mmdlm.decode(model, prompt, 8, [TopK(4)])


def test_export_equals_the_folder_and_own_layout_decodes_the_same(
    folder: Path, model: MultimodalDLM, tmp_path: Path
) -> None:
    checkpoint.save_published(model, tmp_path)
    was, now = (load_file(each / "model.safetensors") for each in (folder, tmp_path))
    assert was.keys() == now.keys()
    assert all(torch.equal(was[name], tensor) for name, tensor in now.items())
    again = mmdlm.load(tmp_path, device="cpu")
    assert again.spec == model.spec
    checkpoint.save(model, tmp_path / "own")
    own = mmdlm.load(tmp_path / "own", device="cpu")
    assert own.spec == model.spec
    given = [torch.Generator().manual_seed(4) for _ in range(2)]
    found = [
        mmdlm.decode(each, prompt_of(5)[None], 8, [UniformCanvas(3)], generator=generator).tokens
        for each, generator in zip((model, own), given, strict=True)
    ]
    assert torch.equal(*found)


def test_settings_of_config_json(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    spec = DiffusionGemma.read(config, set())
    assert DiffusionGemma.read(DiffusionGemma.write(spec), set()) == spec
    gemma = spec.transformer.gemma
    assert (gemma.full, gemma.window, gemma.full_head_dim, gemma.full_kv_heads) == (
        (1, 2),
        6,
        16,
        1,
    )
    assert (spec.mask_id, spec.eos_id, spec.pad_id, spec.block_size) == (VOCAB, 1, 0, CANVAS)
    for changes, message in (
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        ({"hidden_activation": "silu"}, "hidden_activation"),
        ({"layer_types": ["sliding_attention"]}, "layer_types is"),
    ):
        text = config["text_config"] | changes
        with pytest.raises(ValueError, match=message):
            DiffusionGemma.read(config | {"text_config": text}, set())


def test_what_needs_a_mask_token_says_so(model: MultimodalDLM) -> None:
    with pytest.raises(ValueError, match="likelihood needs a model with a mask token"):
        mmdlm.likelihood(model, prompt_of(3), prompt_of(2, 1))
    rows = model.arrange([Row((prompt_of(3),), (Turn(prompt_of(2), prompt_of(4, 1)),))])
    batch = Batch(rows, torch.zeros(1, dtype=torch.long), torch.zeros(1).double())
    with pytest.raises(ValueError, match="training by masks needs a model with a mask token"):
        Masked().step(model, batch)
    with pytest.raises(ValueError, match="compile is not supported for DiffusionGemma"):
        model.compile()
