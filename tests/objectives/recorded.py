"""Reads the recorded cases of published training code, and stands in for their models."""

import json
from pathlib import Path
from types import SimpleNamespace

import jsonargparse
import pytest
import torch
import yaml

from mmdlm.layout import ANSWER, Sequence
from mmdlm.objectives.noise import Noise
from mmdlm.objectives.objective import Batch, Objective

PRESETS = Path(__file__).parents[2] / "configs" / "objectives"
FILE = Path(__file__).parents[1] / "golden" / "training.json"
RECORDED = json.loads(FILE.read_text())
CASES, MASK = RECORDED["cases"], RECORDED["mask_id"]


def preset(name):
    """The objective of a file in configs/objectives, as `mmdlm fit` makes it."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--objective", type=Objective)
    given = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())["model"]
    return parser.instantiate(parser.parse_object(given)).objective


def tensor(entry):
    dtype = getattr(torch, entry["dtype"])
    return torch.tensor(entry["data"], dtype=dtype).reshape(entry["shape"])


def case(name):
    """Parameters, inputs and outputs; tensors where the file has tensors."""
    data = CASES[name]
    read = [
        {k: tensor(v) if isinstance(v, dict) and "shape" in v else v for k, v in data[part].items()}
        for part in ("inputs", "outputs")
    ]
    return data["params"], *map(lambda values: SimpleNamespace(**values), read)


class Table:
    """A model whose logits are given, one tensor per forward."""

    def __init__(self, *logits, shift=False, block_size=None):
        self.spec = SimpleNamespace(
            require_masks=lambda what: None,
            mask_id=MASK,
            eos_id=0,
            shift=shift,
            block_size=block_size,
            attention="block_causal",
        )
        self.backbone = SimpleNamespace(out=False, head=lambda hidden, columns=None: hidden)
        self.logits, self.seen = list(logits), []

    def hidden_at(self, sequence, at):
        self.seen.append(sequence)
        if self.spec.shift:
            at = torch.cat([at[:, 1:], torch.zeros_like(at[:, :1])], 1)
        return self.logits.pop(0)[at]


def sequence_of(tokens, answer, block_size=None):
    """Rows without padding, answers where `answer` is True."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    zeros = torch.zeros_like(tokens)
    level = positions // block_size if block_size else zeros
    mask = torch.ones_like(tokens, dtype=torch.bool)
    return Sequence(tokens, answer.long() * ANSWER, zeros, mask, positions, level)


def batch_of(sequence):
    rows = len(sequence.tokens)
    return Batch(sequence, torch.arange(rows), torch.zeros(rows).double())


def noise_of(masked, maskable, p, slope=None):
    p = p.reshape(len(masked), -1).expand(masked.shape).float()
    slope = torch.ones_like(p) if slope is None else slope[:, None].expand_as(p).float()
    return Noise(masked, maskable, torch.ones_like(masked), p, slope)


def is_near(found, want):
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6, check_dtype=False)
    return True


def is_rounded(found, want, p):
    """Whether values agree as far as the reference's float32 allows, which rounds 1 - p and p."""
    allowed = want * (1e-5 + 2**-23 / p.minimum(1 - p))
    return bool(((found - want).abs() <= allowed + 1e-6).all())


def is_gradient(found, want):
    """Whether a gradient has the recorded norm, sum and first entries."""
    (want,) = want
    assert found.norm().item() == pytest.approx(want["norm"], rel=1e-4, abs=1e-6)
    assert found.abs().sum().item() == pytest.approx(want["sum_abs"], rel=1e-4, abs=1e-6)
    first = found.flatten()[:8]
    torch.testing.assert_close(first, tensor(want["first8"]), rtol=1e-4, atol=1e-6)
    return True


def target(given):
    """Clean tokens, and which of them belong to the answer."""
    labels = getattr(given, "labels", None)
    tokens = given.input_ids if hasattr(given, "input_ids") else labels.clamp(min=0)
    if labels is not None:
        return tokens, labels != -100
    return tokens, torch.arange(tokens.shape[1]) >= given.prompt_lengths[:, None]
