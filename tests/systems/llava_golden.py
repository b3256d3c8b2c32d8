"""Golden folders of systems in LLaVA's layout, as published checkpoints."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from torch import Tensor

import mmdlm
from mmdlm.layout import ANSWER, Row, Sequence, Turn, arrange
from mmdlm.model import MultimodalDLM
from mmdlm.objectives.noise import Noise
from mmdlm.objectives.objective import Batch, Objective

ROOT = Path(__file__).parents[1] / "golden" / "vision"
WRITTEN = "".join(map(chr, range(32, 127))) + "\n"


class Golden:
    """One golden folder.

    Args:
        name: the folder.
        named: "architectures" and "model_type" of the published config.json.
    """

    def __init__(self, name: str, named: dict[str, Any]) -> None:
        self.folder, self.named = ROOT / name, named
        self.config = json.loads((self.folder / "config.json").read_text())
        self.length, self.mask = self.config["gen_len"], self.config["ids"]["mask"]
        self.images = [self.folder / f"img{i}.png" for i in range(3)]
        self.sizes = self.config["vision_tower"]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.folder / "tensors.safetensors")

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        return load_file(self.folder / "weights.safetensors")

    def flat(self) -> dict[str, Any]:
        """The golden's settings as one published config.json."""
        return {
            **self.named,
            **self.config["llm"],
            **self.config["mm"],
            "mask_token_id": self.config["ids"]["mask"],
            "eos_token_id": self.config["ids"]["eos"],
            "pad_token_id": self.config["ids"]["eos"],
            "vision_config": self.sizes,
        }

    def published(
        self, folder: Path, weights: dict[str, Tensor] | None = None, **changes: Any
    ) -> Path:
        """A folder as it is published: one flat config.json and model.safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({**self.flat(), **changes}))
        if weights is None:
            shutil.copy(self.folder / "weights.safetensors", folder / "model.safetensors")
        else:
            save_file(weights, folder / "model.safetensors")
        return folder

    def laid_out(self, model: MultimodalDLM, *rows: list[int], length: int = 0) -> Sequence:
        """Prompts of the golden with these images, then its text, and a masked canvas."""
        at = self.config["prompt"].index(self.config["image_token_index"])
        prompt = self.config["prompt"]
        before, after = torch.tensor(prompt[:at]), torch.tensor(prompt[at + 1 :])
        canvas = torch.full((length,), self.mask)
        laid = []
        for images in rows:
            parts, rest = [before], after[:0]
            prepared = [model.processor.prepare("image", self.images[i]) for i in images]
            for tokens in model.encode("image", prepared):
                parts += [rest, tokens]
                rest = after
            laid.append(Row(tuple(parts), (Turn(rest, canvas),)))
        return arrange(laid, pad=model.spec.pad_id)

    def training(self, model: MultimodalDLM, labels: Tensor) -> Batch:
        """The golden's training rows, as long as the longest by zero embeddings on the right.

        Args:
            model: the loaded golden.
            labels: [B L] targets after the images were spliced in, -100 elsewhere.
        """
        pad, ids = self.config["ids"]["eos"], self.tensors["train.input_ids"]
        new = self.tensors.get("train.full.new_input_ids")
        items = [model.processor.prepare("image", self.images[i]) for i in range(len(ids))]
        with torch.no_grad():
            media = [model.encode("image", [item])[0] for item in items]
        tokens = torch.full_like(labels, pad)
        source = torch.ones_like(tokens)
        embeddings = []
        for row, (given, image) in enumerate(zip(ids, media, strict=True)):
            at = int((given == self.config["image_token_index"]).nonzero()[0])
            length = len(given) - 1 + len(image)
            tokens[row, :at] = given[:at]
            tokens[row, at + len(image) : length] = given[at + 1 :]
            source[row, :at] = source[row, at + len(image) : length] = 0
            embeddings += [image, image.new_zeros(labels.shape[1] - length, image.shape[1])]
        target = labels != -100
        assert new is None or torch.equal(tokens[target], labels[target])
        sequence = Sequence(
            tokens,
            role=target.long(),
            source=source,
            mask=torch.ones_like(target),
            positions=torch.arange(labels.shape[1]).expand_as(labels),
            level=torch.zeros_like(tokens),
            media=torch.cat(embeddings),
        )
        zeros = torch.zeros(len(ids))
        return Batch(sequence, zeros.long(), zeros.double())

    def trained(
        self, model: MultimodalDLM, kind: str, objective: Objective
    ) -> tuple[Tensor, Tensor]:
        """The loss of the golden's training rows, and the logits [N V] of its masked targets.

        Args:
            model: the loaded golden.
            kind: "train", "train.full" or "train.prefix" (the prompt does not see the answer).
            objective: the objective of its recipe.
        """
        masked, p = self.tensors[f"{kind}.masked"], self.tensors[f"{kind}.p_mask"]
        copies = masked.split(len(p))  # two with complementary masks, or one
        targets = self.tensors[f"{kind}.labels" if len(copies) == 2 else "train.spliced_labels"]
        batch = self.training(model, torch.stack(targets.split(len(p))).amax(0))
        sequence = batch.sequence
        assert len(copies) == 1 or torch.equal(copies[0] | copies[1], sequence.is_answer)
        if kind == "train.prefix":
            first = sequence.is_answer.int().argmax(1, keepdim=True)
            level = (torch.arange(masked.shape[1]) >= first).long()
            sequence = replace(sequence, level=level)
        with torch.no_grad():
            noise = noise_of(batch, copies[0], p)
            loss = objective.loss(model, replace(batch, sequence=sequence), noise).mean()
            logits = [
                model.logits_at(replace(sequence, tokens=sequence.tokens.where(~at, self.mask)), at)
                for at in copies
            ]
        return loss, torch.cat(logits)

    def canvases(self, decoded: mmdlm.Decoded, row: int) -> Tensor:
        """[steps G] the answer after every step."""
        answer, step = decoded.tokens[row, -self.length :], decoded.history.step[row]
        last = int(step.max())
        return torch.stack([torch.where(step <= i, answer, self.mask) for i in range(last + 1)])


def is_answer(sequence: Sequence) -> Tensor:
    """[B L] bool."""
    return sequence.role == ANSWER


def noise_of(batch: Batch, masked: Tensor, p: Tensor) -> Noise:
    """The noise that the reference drew, [B L] bool, with its mask probability [B] or [B 1]."""
    p = p.reshape(-1, 1).expand(masked.shape).float()
    real = batch.sequence.mask
    return Noise(masked, batch.sequence.is_answer, real, p, slope=torch.ones_like(p))


def with_tokenizer(folder: Path, control: dict[str, int]) -> Path:
    """The folder with a tokenizer of single characters and these control tokens."""
    vocab = {character: number for number, character in enumerate(WRITTEN)} | control
    tokenizer = Tokenizer(BPE(vocab, []))
    tokenizer.decoder = Fuse()
    tokenizer.add_special_tokens(list(control))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def asked(*parts: Path | str) -> list[dict[str, Any]]:
    """A user's message of images (paths) and text."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": part}
        for part in parts
    ]
    return [{"role": "user", "content": content}]
