"""Plain LaViDa: an image and a question as in the published inference, the baseline of answers.

As published, the tower is transformers' with unfused attention, all 729 tokens of a view are
projected and then pooled, and nothing is kept from one question to the next. The prompt is computed
once, with logits of all its positions. Each step computes the whole answer: cached keys are
concatenated and rotated again in every layer, and all logits go through a float64 softmax. It
shares no code with `encoders`, `adapters`, `mmdlm.processor` or `mmdlm.decoding`.

Source: jacklishufan/LaViDa: llava/mm_utils.py, llava/model/llava_arch.py,
llava/model/multimodal_encoder/siglip_encoder.py, llava/model/language_model/llada/generate.py. Two
differences, in favour of the baseline: it loads without the last layer of the tower, and builds no
causal bias, which the published attention ignores. A third: the mask id is never committed.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from mmdlm.model import MultimodalDLM
from tests.speed.plain import Found, Past, Plain, Schedule

TOWER = "model.vision_tower.vision_tower.vision_model."
PROJECTOR, NEWLINE = "model.mm_projector.", "model.image_newline"
SHIFT = 0.33


class PlainLaViDa(Plain):
    """A plain sampler of a LaViDa checkpoint with tiles, `spatial_unpad` and bilinear pooling.

    Args:
        model: the loaded checkpoint, whose language model is shared.
        folder: the checkpoint, from which tower and projector are read.
        config: its config.json.
    """

    def __init__(self, model: MultimodalDLM, folder: Path, config: dict[str, Any]) -> None:
        super().__init__(model)
        self.canvases, self.side = (
            config["image_grid_pinpoints"],
            config["vision_config"]["image_size"],
        )
        with safe_open(folder / "model.safetensors", "pt") as file:
            seen = (TOWER, PROJECTOR, NEWLINE)
            names = [n for n in file.keys() if n.startswith(seen)]  # noqa: SIM118
            weights = {n: file.get_tensor(n) for n in names}
        first, last = (_linear(weights, f"{PROJECTOR}{i}.") for i in (0, 2))
        self.projector = nn.Sequential(first, nn.GELU(), last).to(model.device, model.dtype)
        self.tower = _tower(config["vision_config"], weights).to(model.device, model.dtype)
        self.newline = weights[NEWLINE].to(model.device, model.dtype)

    @torch.inference_mode()
    def answer(
        self, image: Path, before: Tensor, after: Tensor, mode: str, length: int, steps: int
    ) -> Found:
        """The answer to a question about an image.

        Args:
            image: the file.
            before: [n] int64, the prompt's text before the image.
            after: [m] int64, its text after the image.
            mode: "none" or "prefix-lm", see `tests.speed.plain.MODES`.
            length: positions of the answer, in one block.
            steps: steps of the answer, with LaViDa's shift of 0.33.
        """
        self.forwards = 0
        parts = [F.embedding(before, self.embed), self.image(image), F.embedding(after, self.embed)]
        prompt = torch.cat(parts)[None]  # [1 P D]
        size = prompt.shape[1]
        self.cos, self.sin = self._angles(size + length, prompt.device)
        past: Past = []
        x = torch.full((1, size + length), self.mask_id, device=prompt.device)
        x[:, :size] = 0
        if mode == "prefix-lm":
            past = self.compute(prompt, 0)[1]  # its logits are computed, and not looked at
            x = x[:, size:]
        for count in shift_counts(length, steps):
            embedded = F.embedding(x, self.embed)
            if not past:
                embedded[:, :size] = prompt
            logits, _ = self.compute(embedded, size if past else 0, past)
            self._commit(x, logits, x.shape[1], count, Schedule(length, length, steps))
        return Found(x[:, -length:], self.forwards)

    def image(self, file: Path) -> Tensor:
        """Embeddings [N D] of an image."""
        image = Image.open(file).convert("RGB")
        views, canvas = tiled(image, self.canvases, self.side)
        pixels = torch.stack([normalised(view) for view in views]).to(self.newline)  # [V 3 y x]
        hidden = self.tower(pixels, output_hidden_states=True).hidden_states[-1]
        tokens = self.projector(hidden)  # [V 729 D]
        grid = math.isqrt(tokens.shape[1])
        maps = tokens.view(len(views), grid, grid, -1).permute(0, 3, 1, 2).contiguous()
        maps = F.interpolate(maps, size=[math.ceil(grid / 2)] * 2, mode="bilinear")
        return merged(maps, image.size, canvas, self.side, self.newline)


def _tower(sizes: dict[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    """transformers' tower without its last layer, with unfused attention as in the source."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    layers = sizes["num_hidden_layers"] - 1
    config = SiglipVisionConfig(
        **sizes | {"num_hidden_layers": layers, "vision_use_head": False},
        attn_implementation="eager",
    )
    tower = SiglipVisionModel(config).eval().requires_grad_(False)
    found = {n.removeprefix(TOWER): w for n, w in weights.items() if n.startswith(TOWER)}
    prefix = "vision_model." if any(n.startswith("vision_") for n in tower.state_dict()) else ""
    norm = {n: w for n, w in tower.state_dict().items() if "post_layernorm" in n}  # not read
    tower.load_state_dict(norm | {prefix + n: w for n, w in found.items()})
    return tower


def _linear(weights: dict[str, Tensor], prefix: str) -> nn.Linear:
    weight = weights[f"{prefix}weight"]
    layer = nn.Linear(weight.shape[1], weight.shape[0]).requires_grad_(False)
    layer.load_state_dict({"weight": weight, "bias": weights[f"{prefix}bias"]})
    return layer


def shift_counts(masks: int, steps: int) -> list[int]:
    """Tokens to commit in each step of the schedule "shift"."""
    t = torch.linspace(0, 1, steps + 1)
    sigma = SHIFT * t / (1 + (SHIFT - 1) * t)
    counts = (sigma * masks).to(torch.int64)
    counts = torch.clamp(counts[1:] - counts[:-1], min=1)
    place = 0
    while counts.sum() > masks:
        if counts[place] > 1:
            counts[place] -= 1
        place = (place + 1) % steps
    return counts.flip(0).tolist()


def tiled(
    image: Image.Image, canvases: list[tuple[int, int]], side: int
) -> tuple[list[Image.Image], tuple[int, int]]:
    """The overview and the tiles of an image, and the (width, height) of its canvas."""
    best, shown, wasted = None, -1, 0
    for wide, high in canvases:
        scale = min(wide / image.width, high / image.height)
        pixels = min(int(image.width * scale) * int(image.height * scale), math.prod(image.size))
        waste = wide * high - pixels
        if pixels > shown or (pixels == shown and waste < wasted):
            best, shown, wasted = (wide, high), pixels, waste
    wide, high = best
    if wide / image.width < high / image.height:
        size = wide, min(math.ceil(image.height * wide / image.width), high)
    else:
        size = min(math.ceil(image.width * high / image.height), wide), high
    page = Image.new("RGB", best)
    page.paste(image.resize(size), ((wide - size[0]) // 2, (high - size[1]) // 2))
    corners = [(x, y) for y in range(0, high, side) for x in range(0, wide, side)]
    tiles = [page.crop((x, y, x + side, y + side)) for x, y in corners]
    return [image.resize((side, side)), *tiles], best


def normalised(view: Image.Image) -> Tensor:
    """Pixels [3 side side] float32 from -1 to 1."""
    pixels = np.asarray(view).astype(np.float32) * np.float32(1 / 255)
    return torch.from_numpy(((pixels - 0.5) / 0.5).transpose(2, 0, 1).copy())


def merged(
    maps: Tensor, size: tuple[int, int], canvas: tuple[int, int], side: int, newline: Tensor
) -> Tensor:
    """Overview and unpadded map [N D] of pooled views [V D y x], merged as "spatial_unpad"."""
    columns, rows = canvas[0] // side, canvas[1] // side
    width, y, x = maps.shape[1:]
    overview = maps[0].flatten(1).T
    whole = maps[1:].view(rows, columns, width, y, x).permute(2, 0, 3, 1, 4)
    whole = whole.reshape(width, rows * y, columns * x)
    (w, h), (high, wide) = size, whole.shape[1:]
    if w / h > wide / high:
        cut = (high - int(h * (wide / w))) // 2
        whole = whole[:, cut : high - cut]
    else:
        cut = (wide - int(w * (high / h))) // 2
        whole = whole[:, :, cut : wide - cut]
    ends = newline[:, None, None].expand(-1, whole.shape[1], 1)
    whole = torch.cat([whole, ends], 2).flatten(1).T
    return torch.cat([overview, whole])
