"""Dream-VLA from a folder in its published layout: prompt, logits, decodes and actions."""

from __future__ import annotations

import json
from collections.abc import Sequence as Items
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor

import mmdlm
from adapters.robot import Robot
from mmdlm.blueprint import Blueprint, build, describe
from mmdlm.checkpoint import save, save_published
from mmdlm.decoding.commits.timesteps import Timesteps
from mmdlm.decoding.scores.entropy import Entropy
from mmdlm.decoding.scores.probability import Probability
from mmdlm.layout import Row
from mmdlm.model import MultimodalDLM
from mmdlm.systems.dream_vla import DreamVLA
from mmdlm.tasks.act import Policy
from mmdlm.text import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "action"
META = json.loads((GOLDEN / "dreamvla_meta.json").read_text())
IO = load_file(GOLDEN / "dreamvla_io.safetensors")
SCORES = {"maskgit_plus": Probability(), "entropy": Entropy()}
IMAGE = META["config"]["image_token_id"]
HEADS = "proprio_projector/"


def publish(folder: Path, proprio: bool, **config: Any) -> Path:
    """The golden model as it is published."""
    folder.mkdir(exist_ok=True)
    extra = {"proprio_dim": 8} if proprio else {}
    ids = {"answer_end_ids": [META["im_end_id"], META["newline_id"]]}
    settings = META["config"] | {"model_type": "dream-vla"} | ids | extra | config
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "dataset_statistics.json").write_text(json.dumps(META["stats"]))
    save_file(load_file(GOLDEN / "dreamvla_model.safetensors"), folder / "model.safetensors")
    if proprio:
        heads = load_file(GOLDEN / "dreamvla_heads.safetensors")
        own = {k.removeprefix(HEADS): v for k, v in heads.items() if k.startswith(HEADS)}
        save_file(own, folder / "proprio_projector.safetensors")
    return folder


@pytest.fixture(params=["noproprio", "proprio"])
def case(request, tmp_path: Path) -> tuple[str, MultimodalDLM]:
    """The name the goldens have for a policy without or with state, and the loaded model."""
    folder = publish(tmp_path / "vla", request.param == "proprio")
    return request.param, mmdlm.load(folder)


@torch.inference_mode()
def parts(model: MultimodalDLM, images: int = 2) -> tuple[Tensor, ...]:
    """The golden prompt: state, two ids, images, the other ids."""
    ids = IO["input_ids"][0]
    text = ids[ids != IMAGE]
    pixels = [IO[f"image.{i}"].numpy() for i in range(images)]
    seen = model.encode("image", [model.processor.prepare("image", each) for each in pixels])
    state = []
    if "state" in model.encoders:
        state = model.encode("state", [model.processor.prepare("state", IO["proprio"][0].numpy())])
    return (*state, text[:2], *seen, text[2:])


def answer(model: MultimodalDLM, *rows: tuple[Tensor, ...], **options: Any) -> mmdlm.Decoded:
    sequence = model.arrange([Row(row) for row in rows])
    return mmdlm.decode(model, sequence, model.robot.length, **options)


@torch.inference_mode()
def test_prompt_logits_equal_the_reference(tmp_path):
    model = mmdlm.load(publish(tmp_path / "vla", proprio=False))
    raw = model.backbone.head(model.hidden(model.arrange([Row(parts(model))])))
    torch.testing.assert_close(raw, IO["prompt.logits"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("steps", [1, 3, 8])
@pytest.mark.parametrize("score", SCORES)
def test_decodes_equal_the_reference(case, score, steps):
    kind, model = case
    golden = f"dd.{kind}.{score}.steps{steps}."
    got = answer(model, parts(model), strategies=[Timesteps(steps), SCORES[score]])
    ids = got.tokens[0, -model.robot.length :]
    assert torch.equal(ids, IO[golden + "sequence"][0, -model.robot.length :])
    committed = got.history.step[0] <= torch.arange(steps)[:, None]
    history = IO[golden + "history"][:, 0, -model.robot.length :]
    assert torch.equal(committed, history != META["mask_id"])
    actions = model.robot.decode(ids)
    np.testing.assert_allclose(actions, IO[golden + "actions"].numpy(), atol=1e-6)


def test_prompts_of_one_and_two_images_in_a_batch_equal_each_alone(case):
    kind, model = case
    strategies = [Timesteps(8), SCORES["maskgit_plus"]]
    rows = [parts(model, images) for images in (1, 2, 2)]
    together = answer(model, *rows, strategies=strategies)
    for i, row in enumerate(rows):
        alone = answer(model, row, strategies=strategies)
        assert torch.equal(together.tokens[i, -58:], alone.tokens[0, -58:])
        assert torch.equal(together.history.step[i], alone.history.step[0])
    golden = IO[f"dd.{kind}.maskgit_plus.steps8.sequence"][0, -58:]
    assert torch.equal(together.tokens[1, -58:], golden)
    assert not torch.equal(together.tokens[0, -58:], golden)


@torch.inference_mode()
def test_one_forward_over_zero_embeddings_equals_the_reference(case):
    """The other discrete objective: open positions hold zeros, the end of the answer is given."""
    kind, model = case
    robot, tail = model.robot, torch.tensor(model.robot.tail)
    count = robot.length - len(tail)
    zeros = torch.zeros(count, model.spec.transformer.width)
    sequence = model.arrange([Row((*parts(model), zeros, tail))])
    at = torch.zeros_like(sequence.mask)
    at[:, -robot.length : -len(tail)] = True
    ids = model.logits_at(sequence, at).argmax(-1)
    actions = robot.decode(torch.cat([ids, tail]))
    golden = IO[f"discrete_onestep.{kind}.actions"].numpy()
    np.testing.assert_allclose(actions, golden, atol=1e-6)


def tensors(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {f"{f.name}/{name}": each for f in files for name, each in load_file(f).items()}


def is_bit_equal(first: Path, second: Path) -> bool:
    a, b = tensors(first), tensors(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("proprio", [False, True])
def test_export_to_the_published_layout_is_bit_equal(proprio, tmp_path):
    model = mmdlm.load(publish(tmp_path / "vla", proprio))
    save_published(model, tmp_path / "again")
    assert is_bit_equal(tmp_path / "vla", tmp_path / "again")
    before, after = (json.loads((tmp_path / d / "config.json").read_text()) for d in DIRS)
    assert {key: after[key] for key in before} == before
    again = mmdlm.load(tmp_path / "again")
    assert describe(again) == describe(model)


DIRS = ("vla", "again")


def test_own_layout_keeps_everything(case, tmp_path):
    kind, model = case
    save(model, tmp_path / "own")
    again = mmdlm.load(tmp_path / "own")
    assert describe(again) == describe(model)
    got = answer(again, parts(again), strategies=[Timesteps(3), SCORES["entropy"]])
    golden = IO[f"dd.{kind}.entropy.steps3.sequence"]
    assert torch.equal(got.tokens[0, -58:], golden[0, -58:])


OTHER: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 1,
    "mask_token_id": 60,
    "pad_token_id": 3,
    "rope_theta": 1e4,
    "n_action_bins": 16,
    "model_type": "dream-vla",
    "norm_stats": {
        "bridge_orig": {
            "action": {"q01": [-1.0, 0.0], "q99": [1.0, 2.0], "mask": [True, True]},
            "proprio": {"q01": [0.0] * 5, "q99": [2.0] * 5},
        },
        "libero_goal_no_noops": {"action": {"q01": [0.0] * 3, "q99": [4.0] * 3}},
    },
    "vision_config": {
        "depth": 2,
        "embed_dim": 24,
        "hidden_size": 20,
        "mlp_ratio": 3,
        "num_heads": 3,
        "patch_size": 4,
        "spatial_merge_size": 3,
        "temporal_patch_size": 1,
    },
}
LIMITS = {"min_pixels": 144, "max_pixels": 1440, "patch_size": 4, "merge_size": 3}


def other(names: Items[str] = (), **config: Any) -> Blueprint:
    """The blueprint of a checkpoint of other sizes."""
    return DreamVLA.read(OTHER | config, set(names))


@pytest.mark.parametrize("proprio", [False, True])
def test_other_sizes_are_read_run_and_written_back(proprio, tmp_path):
    names = ["proprio_projector.fc1.weight"] if proprio else []
    config = {"unnorm_key": "bridge_orig", "preprocessor_config.json": LIMITS}
    model = build(replace(other(names, **config), system="dream_vla"))
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.data.normal_(0, 0.3, generator=generator)
    save_published(model, tmp_path / "vla")
    again = mmdlm.load(tmp_path / "vla")
    save_published(again, tmp_path / "again")
    assert is_bit_equal(tmp_path / "vla", tmp_path / "again")
    assert describe(again) == describe(model)
    robot = again.robot
    assert (robot.chunk, robot.action_size, robot.ids, list(robot.bins.ids)[::15]) == (
        5,
        2,
        None,
        [61, 76],
    )
    images = [np.random.default_rng(i).integers(0, 256, (30, 50, 3), np.uint8) for i in range(3)]
    with torch.inference_mode():
        seen = again.encode("image", [again.processor.prepare("image", each) for each in images])
        state = (
            again.encode("state", [again.processor.prepare("state", np.ones(5))]) if proprio else []
        )
    assert [len(each) for each in seen] == [8, 8, 8]  # 24 x 48 pixels
    row = (*state, *seen, torch.tensor([4, 5, 6]))
    sequence = again.arrange([Row(row)])
    got = mmdlm.decode(again, sequence, robot.length, [Timesteps(2)], columns=slice(61, 77))
    actions = robot.decode(got.tokens[0, -robot.length :])
    assert actions.shape == (5, 2)
    low, high = [-1.0, 0.0], [1.0, 2.0]
    assert ((actions >= low) & (actions <= high)).all()


def test_the_published_config_is_read():
    """DreamLM/Dream-VLX: vl/train/dreamvl/config.json, with what the trainer adds."""
    published = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "mrope_section": [16, 24, 24],
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "vocab_size": 152064,
        "full_attn_mask": True,
        "projector_hidden_act": "gelu",
        "norm_stats": {"libero_spatial_no_noops": {"action": {"q01": [0.0] * 7, "q99": [1.0] * 7}}},
    }
    made = DreamVLA.read(published, set())
    spec, robot = made.spec, made.outputs["actions"]
    assert (spec.mask_id, spec.eos_id, spec.pad_id, spec.shift) == (151666, 151643, 151643, True)
    assert (spec.transformer.width, spec.transformer.kv_heads, spec.transformer.eps) == (
        3584,
        4,
        1e-6,
    )
    assert (robot["bins"]["last_id"], robot["bins"]["bins"]) == (151922, 256)
    assert (robot["chunk"], robot["tail"]) == (8, [151645, 198])
    tower = made.encoders["image"]["init_args"]
    assert (tower["depth"], tower["width"], tower["dim"], tower["heads"]) == (32, 1280, 3584, 16)
    assert (tower["min_pixels"], tower["max_pixels"]) == (3136, 3211264)


@pytest.mark.parametrize(
    ("key", "name", "chunk", "size"),
    [("bridge_orig", "bridge_orig", 5, 2), ("libero_goal", "libero_goal_no_noops", 8, 3)],
)
def test_the_chosen_data_set_decides(key, name, chunk, size):
    robot = Robot.from_dict(other(unnorm_key=key).outputs["actions"])
    assert (robot.dataset, robot.chunk, robot.action_size) == (name, chunk, size)
    longer = Robot.from_dict(other(unnorm_key=key, num_actions_chunk=2).outputs["actions"])
    assert (longer.chunk, longer.length) == (2, 2 * size + 2)


def test_the_data_set_must_be_known_and_chosen():
    with pytest.raises(ValueError, match="bridge_orig', 'libero_goal_no_noops'.*unnorm_key"):
        other()
    with pytest.raises(ValueError, match="'fractal'.*bridge_orig"):
        other(unnorm_key="fractal")


def test_load_completes_the_config(tmp_path):
    statistics = META["stats"] | {"other": META["stats"]["toy"]}
    folder = publish(tmp_path / "vla", proprio=False)
    (folder / "dataset_statistics.json").write_text(json.dumps(statistics))
    with pytest.raises(ValueError, match="unnorm_key"):
        mmdlm.load(folder)
    model = mmdlm.load(folder, config={"unnorm_key": "other", "num_actions_chunk": 3})
    assert (model.robot.dataset, model.robot.chunk) == ("other", 3)
    save_published(model, tmp_path / "again")
    written = json.loads((tmp_path / "again" / "dataset_statistics.json").read_text())
    assert written == statistics
    assert mmdlm.load(tmp_path / "again").robot.dataset == "other"
    save(model, tmp_path / "own")
    with pytest.raises(ValueError, match="no effect on .*own layout"):
        mmdlm.load(tmp_path / "own", config={"unnorm_key": "toy"})


def test_statistics_must_be_there_and_agree():
    one = OTHER["norm_stats"]["bridge_orig"]
    with pytest.raises(ValueError, match="neither dataset_statistics.json nor norm_stats"):
        other(norm_stats=None)
    with pytest.raises(ValueError, match="differ about \\['bridge_orig'\\]"):
        other(**{"dataset_statistics.json": {"bridge_orig": one | {"num_transitions": 3}}})
    both = other(unnorm_key="new", **{"dataset_statistics.json": {"new": one}})
    assert both.outputs["actions"]["dataset"] == "new"


def test_a_state_needs_statistics_or_a_size():
    names = ["proprio_projector.fc1.weight"]
    made = other(names, unnorm_key="bridge_orig")
    assert list(made.encoders) == ["image", "state"]
    assert made.encoders["state"]["init_args"]["size"] == 5
    robot = Robot.from_dict(made.outputs["actions"])
    assert robot.normalize_state(np.array([0, 1, 2, 3, -9])).tolist() == pytest.approx(
        [-1, 0, 1, 1, -1], abs=1e-6
    )
    with pytest.raises(ValueError, match="no 'proprio' statistics.*proprio_dim"):
        other(names, unnorm_key="libero_goal")
    normalised = other(names, unnorm_key="libero_goal", proprio_dim=4)
    robot = Robot.from_dict(normalised.outputs["actions"])
    assert robot.normalize_state(np.array([3.0, 1, 2, 3])).tolist() == [3, 1, 2, 3]


def test_the_tokenizer_decides_about_ids():
    made = other(unnorm_key="bridge_orig")
    assert made.outputs["actions"]["tail"] == [3, 3]
    words = {"<|im_end|>": 7, "\u010a": 9, "<|action_0|>": 70, "a": 1}
    tokenizer = Tokenizer(Backend(WordLevel(words, unk_token="a")))
    robot = DreamVLA.with_tokenizer(made, tokenizer).outputs["actions"]
    assert (robot["bins"]["last_id"], robot["tail"]) == (85, [7, 9])
    without = Tokenizer(Backend(WordLevel({"a": 1}, unk_token="a")))
    assert DreamVLA.with_tokenizer(made, without) == made


def test_preprocessing_must_fit_the_tower():
    with pytest.raises(ValueError, match="patch_size of preprocessor_config.json"):
        other(unnorm_key="bridge_orig", **{"preprocessor_config.json": {"patch_size": 14}})
    edges = {"size": {"shortest_edge": 400, "longest_edge": 800}}
    made = other(unnorm_key="bridge_orig", **{"preprocessor_config.json": edges})
    tower = made.encoders["image"]["init_args"]
    assert (tower["min_pixels"], tower["max_pixels"]) == (400, 800)


def test_unpublished_settings_are_refused():
    with pytest.raises(ValueError, match="projector_hidden_act"):
        other(unnorm_key="bridge_orig", projector_hidden_act="relu")
    with pytest.raises(ValueError, match="hidden_act"):
        other(unnorm_key="bridge_orig", vision_config={"hidden_act": "silu"})


def test_dream_vl_is_another_system():
    names = {"visual.patch_embed.proj.weight", "projector.linear_1.weight"}
    assert DreamVLA.matches({"model_type": "dream-vla"}, names)
    assert DreamVLA.matches({"architectures": ["DreamVLAForActionPrediction"]}, names)
    assert not DreamVLA.matches({"model_type": "dream-vl"}, names)
    assert not DreamVLA.matches({"model_type": "dream-vla"}, {"model.embed_tokens.weight"})


WORDS = [f"w{i}" for i in range(44)]
INSTRUCTION = " ".join(f"w{i}" for i in IO["input_ids"][0].tolist()[10:])
OURS = "{% for m in messages %}{{ 'w30 w31 ' + m.content }}{% endfor %}"


def policy_folder(folder: Path, proprio: bool, **config: Any) -> Path:
    """The golden model with a tokenizer and a template that write the golden prompt."""
    backend = Backend(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    backend.pre_tokenizer = Whitespace()
    publish(folder, proprio, **config)
    Tokenizer(backend, OURS).save(folder)
    return folder


def observation(kind: str, images: int = 2) -> dict[str, Any]:
    found = {"image": IO["image.0"].numpy(), "prompt": INSTRUCTION}
    if images > 1:
        found["wrist_image"] = IO["image.1"].numpy()
    if kind == "proprio":
        found["state"] = IO["proprio"][0].numpy()
    return found


@pytest.fixture(params=["noproprio", "proprio"])
def policy_case(request, tmp_path: Path) -> tuple[str, Policy]:
    folder = policy_folder(tmp_path / "vla", request.param == "proprio")
    policy = mmdlm.load_policy(folder)
    policy.prompt = "{instruction}"  # the golden prompt has no words around it
    return request.param, policy


def test_policy_equals_the_reference(policy_case):
    kind, policy = policy_case
    got = policy.infer(observation(kind))
    assert (got["actions"].shape, got["actions"].dtype) == ((8, 7), np.float32)
    assert got["timing"]["forwards"] == 1
    golden = IO[f"dd.{kind}.maskgit_plus.steps1.actions"].numpy()
    np.testing.assert_allclose(got["actions"], golden, atol=1e-6)
    assert policy.execute == 8
    for score, steps in (("maskgit_plus", 8), ("entropy", 3), ("entropy", 8)):
        slower = Policy(policy.model, strategies=[Timesteps(steps), SCORES[score]])
        slower.prompt = policy.prompt
        golden = IO[f"dd.{kind}.{score}.steps{steps}.actions"].numpy()
        got = slower.infer(observation(kind))
        np.testing.assert_allclose(got["actions"], golden, atol=1e-6)
        assert got["timing"]["forwards"] == steps


def test_cameras_may_be_named_or_listed(policy_case):
    kind, policy = policy_case
    expected = policy.infer(observation(kind))["actions"]
    obs = observation(kind, 1)
    both = [IO["image.0"].numpy(), IO["image.1"].numpy()]
    listed = obs | {"image": both}
    openpi = {f"observation/{k}": v for k, v in observation(kind).items() if k != "prompt"}
    for other_form in (listed, openpi | {"prompt": INSTRUCTION}):
        assert np.array_equal(policy.infer(other_form)["actions"], expected)
    alone = policy.infer(obs)["actions"]
    swapped = policy.infer(obs | {"image": both[::-1]})["actions"]
    assert not np.array_equal(alone, expected)
    assert not np.array_equal(swapped, expected)
    together = policy.infer_batch([observation(kind), obs, listed])
    for result, actions in zip(together, (expected, alone, expected), strict=True):
        assert np.array_equal(result["actions"], actions)
    assert policy.metadata["cameras"] == ["image", "wrist_image"]
    with pytest.raises(ValueError, match="is an empty list, expected at least one image"):
        policy.infer(obs | {"image": []})
    with pytest.raises(ValueError, match=r"obs\['wrist_image'\] is float64"):
        policy.infer(obs | {"wrist_image": np.zeros((56, 56, 3))})


@pytest.mark.parametrize("kind", ["noproprio", "proprio"])
def test_policy_trained_on_zero_embeddings_equals_the_reference(kind, tmp_path):
    folder = policy_folder(tmp_path / "vla", kind == "proprio", use_discrete_diffusion=False)
    policy = mmdlm.load_policy(folder)
    policy.prompt = "{instruction}"
    assert policy.placeholder == "zero"
    golden = IO[f"discrete_onestep.{kind}.actions"].numpy()
    together = policy.infer_batch([observation(kind, 1), observation(kind)])
    np.testing.assert_allclose(together[1]["actions"], golden, atol=1e-6)
    alone = policy.infer(observation(kind, 1))
    assert np.array_equal(alone["actions"], together[0]["actions"])
    assert alone["timing"]["forwards"] == 1
    with pytest.raises(ValueError, match="strategies have no effect"):
        Policy(policy.model, strategies=[Timesteps(2)])


def test_state_that_the_policy_does_not_read_is_ignored(tmp_path):
    policy = mmdlm.load_policy(policy_folder(tmp_path / "vla", proprio=False))
    policy.prompt = "{instruction}"
    obs = observation("noproprio")
    expected = policy.infer(obs)["actions"]
    assert np.array_equal(policy.infer(obs | {"state": np.zeros(3)})["actions"], expected)
    assert policy.metadata["keys"] == ["image", "prompt"]


@pytest.mark.parametrize("case", json.loads((GOLDEN / "prompts.json").read_text()).values())
def test_prompts_are_written_as_published(case, speller, monkeypatch):
    """One image slot per camera directly before the question; the state before everything."""
    names = [f"<|action_{i}|>" for i in range(16)]
    tokenizer = speller(special=["<|im_start|>", "<|im_end|>", *names]).tokenizer
    first = tokenizer.id("<|action_0|>")
    made = other(
        ["proprio_projector.fc1.weight"],
        unnorm_key="bridge_orig",
        vocab_size=len(tokenizer),
        mask_token_id=258,
        use_discrete_diffusion=False,
    )
    model = build(DreamVLA.with_tokenizer(made, tokenizer), tokenizer)
    assert model.robot.bins.ids == range(first, first + 16)
    assert model.robot.tail == (tokenizer.id("<|im_end|>"), tokenizer.id("\u010a"))
    model.to_empty(device="cpu")
    for weight in model.parameters():
        weight.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    rows = []
    embed = model.embed

    def watched(given, *rest):
        rows.extend(given)
        return embed(given, *rest)

    monkeypatch.setattr(model, "embed", watched)
    images = [np.full((40, 40, 3), 50 * i, np.uint8) for i in range(case["images"])]
    obs = {"image": images, "state": np.ones(5), "prompt": case["instruction"]}
    Policy(model).infer(obs)
    slots = {"image": "<|image_pad|>", "state": "<state>"}
    shown = "".join(
        slots[part.kind]
        if not isinstance(part, Tensor)
        else tokenizer.backend.decode(part.tolist(), skip_special_tokens=False)
        for part in rows[0].parts
        if not (isinstance(part, Tensor) and part.is_floating_point())
    )
    assert shown == "<state>" + case["inference"] + "<|im_end|>\n"
