"""Tests of every family on a tiny checkpoint with outputs of its reference code."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmdlm import discover
from mmdlm.checkpoint import load, save_published
from mmdlm.layout import from_tokens
from mmdlm.loading.published import family_of
from mmdlm.loading.shards import INDEX, SINGLE, index
from mmdlm.model import MultimodalDLM

TOLERANCE = {"atol": 1e-4, "rtol": 0.0}


@dataclass(frozen=True)
class Case:
    """A golden folder, read as its family or as another one that computes the same.

    Args:
        folder: name below tests/golden/backbones.
        family: name of the family file.
        config: changes of config.json.
        override: whether only `family=` can select it.
    """

    folder: str
    family: str
    config: tuple[tuple[str, Any], ...] = ()
    override: bool = False


LATER_DREAM = (("architectures", ["DreamForCausalLM"]), ("model_type", "Dream"))
QWEN2 = (("architectures", ["Qwen2ForCausalLM"]), ("model_type", "qwen2"))
CASES = {
    "llada": Case("llada", "llada"),
    "mmada": Case("mmada", "mmada"),
    "llada_v": Case("llada_v", "llada_v"),
    "dream": Case("dream", "dream"),
    "dream, successor": Case("sdar", "dream", LATER_DREAM),
    "llada_moe": Case("llada_moe", "llada_moe"),
    "llada2_moe": Case("llada2_moe", "llada2_moe"),
    "sdar": Case("sdar", "sdar"),
    "fast_dllm_v2": Case("fast_dllm_v2", "fast_dllm_v2"),
    "a2d, qwen2": Case("a2d_qwen2", "a2d"),
    "a2d, qwen3": Case("a2d_qwen3", "a2d"),
    "open_dllm": Case("a2d_qwen2", "open_dllm", QWEN2, override=True),
}


class Checkpoint:
    """One case: folder, model and recorded outputs."""

    def __init__(self, case: Case, golden: Path, folder: Path) -> None:
        self.folder = Path(shutil.copytree(golden / "backbones" / case.folder, folder))
        self.family, self.override = case.family, case.override
        config = json.loads((self.folder / "config.json").read_text()) | dict(case.config)
        (self.folder / "config.json").write_text(json.dumps(config))
        self.numbers = load_file(self.folder / "golden.safetensors")
        self.ids = self.numbers["input_ids"]
        self.model = self.load(self.folder)

    def load(self, folder: Path, **options: Any) -> MultimodalDLM:
        family = self.family if self.override else None
        return load(folder, family=family, device="cpu", **options)

    def weights(self, folder: Path | None = None) -> dict[str, Tensor]:
        files = (folder or self.folder).glob("model*.safetensors")
        return {k: v for file in files for k, v in load_file(file).items()}

    def changed(
        self,
        folder: Path,
        weights: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda w: w,
        config: Callable[[dict[str, Any]], dict[str, Any]] = lambda c: c,
    ) -> Path:
        """A copy of the checkpoint, in one file, with its tensors and config.json changed."""
        folder.mkdir()
        save_file(weights(self.weights()), folder / SINGLE)
        before = json.loads((self.folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config(before)))
        return folder


@pytest.fixture(scope="module", params=CASES)
def checkpoint(
    request: pytest.FixtureRequest, golden: Path, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    return Checkpoint(CASES[request.param], golden, tmp_path_factory.mktemp("golden") / "it")


def same(a: MultimodalDLM, b: MultimodalDLM) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def block_of(checkpoint: Checkpoint) -> int | None:
    """Block size of the recorded outputs."""
    given = [
        checkpoint.numbers[k] for k in ("block_size", "block_length") if k in checkpoint.numbers
    ]
    return int(given[0]) if given else checkpoint.model.spec.block_size


def assert_equals_raw(model: MultimodalDLM, ours: Tensor, raw: Tensor, real: Tensor) -> None:
    """Compares aligned logits with the unaligned reference, shifted by one in some families."""
    assert ours.isfinite().all()
    if model.spec.shift:
        ours, raw, real = ours[:, 1:], raw[:, :-1], real[:, 1:] & real[:, :-1]
    torch.testing.assert_close(ours[real], raw[real], **TOLERANCE)


def scored(model: MultimodalDLM, start: int, stop: int) -> slice:
    """The positions that the rows [start, stop) score."""
    return slice(start + model.spec.shift, stop + model.spec.shift)


def test_family_is_recognised_and_every_tensor_read(checkpoint: Checkpoint) -> None:
    model = checkpoint.model
    assert model.spec.family == checkpoint.family
    assert set(model.report.loaded) == set(checkpoint.weights())
    assert model.report.ignored == {}


@torch.inference_mode()
def test_family_logits_equal_the_reference(checkpoint: Checkpoint) -> None:
    model, numbers, ids = checkpoint.model, checkpoint.numbers, checkpoint.ids
    real = torch.ones_like(ids, dtype=torch.bool)
    block = block_of(checkpoint)
    kinds = {"logits": "full", "logits_full": "full", "logits_block_causal": "block_causal"}
    compared = 0
    for name, attention in kinds.items():
        if name in numbers:
            ours = model.logits(ids, attention=attention, block_size=block)
            assert_equals_raw(model, ours, numbers[name], real)
            compared += 1
    assert compared


@torch.inference_mode()
def test_family_hidden_states_equal_the_reference(checkpoint: Checkpoint) -> None:
    model, numbers, ids, states = checkpoint.model, checkpoint.numbers, checkpoint.ids, []
    recorded = [name for name in numbers if name.startswith("hidden_states.")]
    if not recorded:
        return
    hooks = [b.register_forward_hook(lambda *a: states.append(a[2])) for b in model.backbone.blocks]
    final = model.hidden(from_tokens(ids, None, "full", None))
    for hook in hooks:
        hook.remove()
    # The output of the last block is recorded only after the final norm.
    ours = [model.backbone.tokens(ids), *states[:-1], final]
    assert len(ours) == len(recorded)
    for i, state in enumerate(ours):
        torch.testing.assert_close(state, numbers[f"hidden_states.{i}"], **TOLERANCE)


@torch.inference_mode()
def test_family_masks_equal_the_reference(checkpoint: Checkpoint) -> None:
    model, numbers, ids = checkpoint.model, checkpoint.numbers, checkpoint.ids
    if "attention_mask" in numbers:
        real = numbers["attention_mask"].bool()
        for name, mask in (
            ("logits_masked", real),
            ("logits_bias", real[:, :, None] & real[:, None]),
        ):
            if name in numbers:
                assert_equals_raw(model, model.logits(ids, mask=mask), numbers[name], real)
    if "block_causal_mask" in numbers:
        mask = numbers["block_causal_mask"].bool().expand(len(ids), -1, -1)
        ours = model.logits(ids, mask=mask, attention="full")
        torch.testing.assert_close(ours, numbers["logits_block_causal"], **TOLERANCE)


@torch.inference_mode()
def test_family_block_on_top_of_cached_ones_equals_the_reference(checkpoint: Checkpoint) -> None:
    model, numbers = checkpoint.model, checkpoint.numbers
    if "logits_cached_block" not in numbers:
        return
    expected, start = numbers["logits_cached_block"], int(numbers["cache_split"])
    stop, ahead = start + expected.shape[1], int(model.spec.shift)
    block = block_of(checkpoint)
    canvas = from_tokens(checkpoint.ids[:1, :stop], None, "block_causal", block)
    kv = model.backbone.cache(1, stop)
    kv.end = start
    model.run(canvas, slice(0, start), slice(1, start), kv)
    kv.end = stop
    ours = model.run(canvas, slice(start, stop), slice(start + ahead, stop + ahead), kv)
    torch.testing.assert_close(ours, expected, **TOLERANCE)


@torch.inference_mode()
def test_family_prefix_cache_equals_the_reference(checkpoint: Checkpoint) -> None:
    model, numbers = checkpoint.model, checkpoint.numbers
    if "logits_prefix_cache" not in numbers:
        return
    old, new = (from_tokens(numbers[n], None, "full", None) for n in ("cache_ids", "cache_ids_new"))
    start, length = int(numbers["cache_split"]), old.tokens.shape[1]
    kv = model.backbone.cache(1, length)
    # The recorded rows are unaligned: in some families they score the next position.
    model.run(old, slice(0, length), scored(model, 0, length), kv)
    ours = model.run(new, slice(start, length), scored(model, start, length), kv)
    torch.testing.assert_close(ours, numbers["logits_prefix_cache"], **TOLERANCE)


@torch.inference_mode()
def test_family_dual_cache_equals_the_reference(checkpoint: Checkpoint) -> None:
    model, numbers = checkpoint.model, checkpoint.numbers
    if "logits_dual_cache" not in numbers:
        return
    length = numbers["cache_ids"].shape[1]
    kv = model.backbone.cache(1, length)
    start, stop = numbers["block"].tolist()
    read = scored(model, start, stop)
    model.run(from_tokens(numbers["cache_ids"], None, "full", None), slice(0, length), read, kv)
    for ids, expected in (
        ("cache_ids_new", "logits_dual_cache"),
        ("cache_ids_new2", "logits_dual_cache_2"),
    ):
        canvas = from_tokens(numbers[ids], None, "full", None)
        ours = model.run(canvas, slice(start, stop), read, kv)
        torch.testing.assert_close(ours, numbers[expected], **TOLERANCE)


@torch.inference_mode()
def test_family_cache_agrees_with_a_full_pass(checkpoint: Checkpoint) -> None:
    model, ids, shift = checkpoint.model, checkpoint.ids, int(checkpoint.model.spec.shift)
    n = ids.shape[1]
    canvas, full = from_tokens(ids, None, "full", None), model.logits(ids, attention="full")
    kv = model.backbone.cache(len(ids), n)
    model.run(canvas, slice(0, n), slice(shift, n), kv)
    # The second one reads fewer rows than it recomputes.
    for rows, read in (
        (slice(0, 5), slice(shift, 5)),
        (slice(8, n), slice(10, 13)),
        (slice(12, n), slice(12 + shift, n)),
    ):
        ours = model.run(canvas, rows, read, kv)
        torch.testing.assert_close(ours, full[:, read], **TOLERANCE)


@torch.inference_mode()
def test_family_mask_of_ones_equals_none(checkpoint: Checkpoint) -> None:
    model, ids = checkpoint.model, checkpoint.ids
    expected = model.logits(ids)
    square = torch.ones(*ids.shape, ids.shape[1], dtype=torch.bool)
    for mask in (torch.ones_like(ids), square):
        torch.testing.assert_close(model.logits(ids, mask=mask), expected, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_family_rows_left_padded_equal_rows_alone(checkpoint: Checkpoint) -> None:
    model, ids = checkpoint.model, checkpoint.ids
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :7] = False
    together = model.logits(ids, mask=mask)
    for row, start in ((0, 7), (1, 0)):
        alone = model.logits(ids[row : row + 1, start:])[0]
        torch.testing.assert_close(together[row, start:], alone, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize(("dtype", "least"), [("bfloat16", 0.9), ("float16", 0.95)])
@torch.inference_mode()
def test_family_runs_in_half_precision(checkpoint: Checkpoint, dtype: str, least: float) -> None:
    half = checkpoint.load(checkpoint.folder, dtype=dtype)
    ours, exact = (m.logits(checkpoint.ids) for m in (half, checkpoint.model))
    assert ours.isfinite().all()
    assert ours.dtype == torch.float32
    assert half.dtype == getattr(torch, dtype)
    assert (ours.argmax(-1) == exact.argmax(-1)).float().mean() >= least
    if dtype == "bfloat16" and "logits_bf16" in checkpoint.numbers:
        best, shift = ours.argmax(-1), int(half.spec.shift)
        theirs = checkpoint.numbers["logits_bf16"].argmax(-1)
        agree = best[:, shift:] == theirs[:, : theirs.shape[1] - shift]
        assert agree.float().mean() >= 0.9


@pytest.mark.parametrize("shard_bytes", [5e9, 1e5])
def test_family_export_equals_the_published_checkpoint(
    checkpoint: Checkpoint, tmp_path: Path, shard_bytes: float
) -> None:
    save_published(checkpoint.model, tmp_path, shard_bytes=shard_bytes)
    assert (tmp_path / INDEX).exists() == (shard_bytes < 5e9)
    first, second = checkpoint.weights(), checkpoint.weights(tmp_path)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    again = checkpoint.load(tmp_path)
    assert same(again, checkpoint.model)
    assert again.spec == checkpoint.model.spec
    ours, theirs = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path, checkpoint.folder)
    )
    differ = {k for k in ours.keys() & theirs.keys() if ours[k] != theirs[k]}
    assert differ <= {"torch_dtype"}


def test_family_in_one_file_equals_its_shards(checkpoint: Checkpoint, tmp_path: Path) -> None:
    assert same(checkpoint.load(checkpoint.changed(tmp_path / "one")), checkpoint.model)


@pytest.mark.parametrize("prefix", ["model.", "language_model."])
def test_family_inside_a_wrapper_is_found(
    checkpoint: Checkpoint, tmp_path: Path, prefix: str
) -> None:
    folder = checkpoint.changed(
        tmp_path / "wrapped", lambda weights: {prefix + k: v for k, v in weights.items()}
    )
    again = checkpoint.load(folder)
    assert again.report.prefix == prefix
    assert same(again, checkpoint.model)


def test_family_with_a_missing_or_extra_tensor_is_rejected(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    lost = sorted(name for name in checkpoint.weights() if "norm" in name)[0]

    def rename(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {("model.strange" if k == lost else k): v for k, v in weights.items()}

    folder = checkpoint.changed(tmp_path / "renamed", rename)
    with pytest.raises(ValueError, match=rf"missing \({lost}\); 1 .*unexpected \(model.strange\)"):
        checkpoint.load(folder)


def test_family_saved_again_by_transformers_5_is_the_same(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    table = "model.layers.0.self_attn.rotary_emb.inv_freq"

    def move(config: dict[str, Any]) -> dict[str, Any]:
        theta = config.pop("rope_theta")
        config.pop("rope_scaling", None)
        return config | {"rope_parameters": {"rope_theta": theta, "rope_type": "default"}}

    folder = checkpoint.changed(tmp_path / "again", lambda w: w | {table: torch.ones(8)}, move)
    again = checkpoint.load(folder)
    assert again.spec == checkpoint.model.spec
    assert again.report.ignored == {table: "rotary table, computed from config.json"}
    assert same(again, checkpoint.model)


def test_family_with_an_unknown_rotary_scaling_is_rejected(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    scaling = {"rope_scaling": {"rope_type": "mrope", "factor": 4.0}}
    folder = checkpoint.changed(tmp_path / "mrope", config=lambda c: c | scaling)
    with pytest.raises(ValueError, match="rotary scaling 'mrope' in rope_scaling is not"):
        checkpoint.load(folder)


def test_every_family_has_a_case() -> None:
    # That of DiffusionGemma is transformers' own model, see test_diffusion_gemma.py.
    covered = {case.family for case in CASES.values()} | {"diffusion_gemma"}
    assert covered == set(discover.names("mmdlm.backbones"))


def test_every_family_is_recognised_by_itself_only(golden: Path) -> None:
    known = discover.classes("mmdlm.backbones")
    for name, case in CASES.items():
        folder = golden / "backbones" / case.folder
        config = json.loads((folder / "config.json").read_text()) | dict(case.config)
        names = set(index(folder))
        fitting = {
            f.__module__.rpartition(".")[2] for f in known.values() if f.matches(config, names)
        }
        assert fitting == (set() if case.override else {case.family}), name


def test_every_family_lists_the_names_it_is_published_under(golden: Path) -> None:
    known = {
        f.__module__.rpartition(".")[2]: f for f in discover.classes("mmdlm.backbones").values()
    }
    for case in CASES.values():
        file = golden / "backbones" / case.folder / "config.json"
        config = json.loads(file.read_text()) | dict(case.config)
        called = [*(config.get("architectures") or ()), config.get("model_type")]
        listed = {str(name).lower() for name in called} & set(known[case.family].TYPES)
        assert listed or case.override or not any(called), case


@pytest.mark.parametrize(
    ("folder", "architecture", "model_type", "nearest"),
    [
        ("llada", "GPT2", "gpt2", "llada"),
        ("sdar", "SDARMoeForCausalLM", "sdar_moe", "sdar"),
        ("dream", "DreamVLModel", "dream_vl", "dream"),
        ("fast_dllm_v2", "Fast_dLLM_V3", "Fast_dLLM_V3", "fast_dllm_v2"),
        ("a2d_qwen3", "A2DQwen3_5LMHeadModel", "a2d-qwen3_5", "a2d"),
    ],
)
def test_error_for_an_unknown_checkpoint_names_the_nearest_family(
    golden: Path, folder: str, architecture: str, model_type: str, nearest: str
) -> None:
    names = set(index(golden / "backbones" / folder))
    config = {"architectures": [architecture], "model_type": model_type}
    with pytest.raises(ValueError, match=f"no family fits .*Nearest is '{nearest}'"):
        family_of(config, names, None)


def test_checkpoint_with_an_empty_config_is_rejected(golden: Path) -> None:
    names = set(index(golden / "backbones" / "dream"))
    with pytest.raises(ValueError, match="no family fits architectures None, model_type None"):
        family_of({}, names, None)
