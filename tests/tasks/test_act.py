import numpy as np
import pytest

import mmdlm
from adapters.normalize import Normalizer
from adapters.robot import Robot
from mmdlm.checkpoint import save
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.simulators.toy import Toy
from mmdlm.tasks import act
from mmdlm.tasks.act import Policy, load_policy


@pytest.fixture(scope="module")
def model(build):
    return build()


@pytest.fixture(scope="module")
def policy(model):
    return Policy(model)


def observe(seed):
    return Toy(size=32).reset(seed)


def test_infer_returns_a_chunk_in_robot_units(policy):
    result = policy.infer(observe(0))
    actions = result["actions"]
    assert actions.shape == (3, 2)
    assert actions.dtype == np.float32
    assert np.abs(actions).max() <= 1
    assert result["timing"]["forwards"] == 1
    assert result["timing"]["infer_ms"] > 0


def test_robot_units_follow_the_statistics(model):
    far = {"q01": [100.0, -8.0], "q99": [200.0, -4.0]}
    old, model.robot = model.robot, Robot(model.robot.bins, Normalizer(far), model.robot.state, 3)
    try:
        actions = Policy(model).infer(observe(0))["actions"]
    finally:
        model.robot = old
    assert ((actions >= [100, -8]) & (actions <= [200, -4])).all()


@pytest.mark.parametrize("key", ["image", "state", "prompt"])
def test_every_part_of_the_observation_changes_the_output(policy, monkeypatch, key):
    sure = []

    def watched(*args, **kwargs):
        decoded = decode(*args, **kwargs)
        sure.append(decoded.history.confidence)
        return decoded

    monkeypatch.setattr(act, "decode", watched)
    base = observe(1)
    other = {"image": 255 - base["image"], "state": 0.7 - base["state"], "prompt": "a disc"}
    for obs in (base, base | {key: other[key]}, base):
        policy.infer(obs)
    assert (sure[0] != sure[1]).any()
    assert (sure[0] == sure[2]).all()


def test_batch_equals_single_queries(policy):
    observations = [observe(seed) for seed in range(4)]
    observations[1]["prompt"] = "go to the disc"  # unequal prompts are padded
    together = policy.infer_batch(observations)
    assert len(together) == 4
    for obs, both in zip(observations, together, strict=True):
        np.testing.assert_array_equal(both["actions"], policy.infer(obs)["actions"])


def test_openpi_keys_are_aliases(policy):
    obs = observe(2)
    renamed = {
        "observation/image": obs["image"],
        "observation/state": obs["state"].astype(np.float64),
        "prompt": obs["prompt"],
    }
    np.testing.assert_array_equal(policy.infer(renamed)["actions"], policy.infer(obs)["actions"])


def test_strategies_are_the_argument_or_the_checkpoint_default(model):
    assert Policy(model).strategies == [TopK(steps=1)]
    recipe = {"class_path": "mmdlm.decoding.commits.top_k.TopK", "init_args": {"steps": 3}}
    model.preset = {"act": {"strategies": [recipe], "tasks": ["toy"], "execute": 2}}
    try:
        saved = Policy(model)
        assert saved.infer(observe(0))["timing"]["forwards"] == 3
        assert saved.tasks == ("toy",)
        assert saved.execute == 2
        assert (
            Policy(model, strategies=[TopK(steps=2)]).infer(observe(0))["timing"]["forwards"] == 2
        )
    finally:
        model.preset = {}


def test_metadata(policy):
    facts = policy.metadata
    assert facts["chunk"] == 3
    assert facts["action_size"] == facts["state_size"] == 2
    assert facts["execute"] == 3
    assert facts["keys"] == ["image", "state", "prompt"]
    assert "disc" in facts["words"]
    assert not any(word.startswith("<") for word in facts["words"])


def without(key):
    return lambda obs: obs.pop(key)


def put(key, value):
    return lambda obs: obs.update({key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("image"), r"has keys \['prompt', 'state'\].*'image'.*missing"),
        (without("state"), "'state'.*missing"),
        (without("prompt"), "'prompt'.*missing"),
        (put("wrist", 0), r"\['wrist'\] unknown; expected \['image', 'state', 'prompt'\]"),
        (put("observation/image", 0), "both 'image' and 'observation/image'"),
        (put("state", np.array([np.nan, 0.0])), r"NaN or infinity at \[0\]"),
        (put("state", np.zeros(7)), r"\[7\], expected 2 numbers"),
        (put("image", np.zeros((3, 32, 32), np.uint8)), r"uint8 \[3, 32, 32\], expected uint8"),
        (put("image", np.zeros((32, 32, 3), np.float32)), "float32"),
        (put("image", np.zeros((0, 32, 3), np.uint8)), "expected uint8"),
        (put("prompt", "  "), "expected an instruction"),
        (put("prompt", "fly to the moon"), "lacks 'fly'"),
    ],
)
def test_invalid_observations_are_rejected(policy, change, message):
    obs = observe(0)
    change(obs)
    with pytest.raises(ValueError, match=message):
        policy.infer(obs)


def test_observation_that_is_not_a_dict(policy):
    with pytest.raises(TypeError, match="ndarray"):
        policy.infer(np.zeros(3))
    with pytest.raises(ValueError, match="got no observations"):
        policy.infer_batch([])


def test_model_without_statistics_is_rejected(build, tmp_path):
    model = build()
    model.robot = None
    with pytest.raises(ValueError, match="statistics.json"):
        Policy(model)
    save(model, tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path.name}.*statistics.json"):
        load_policy(tmp_path, device="cpu")


@pytest.mark.parametrize("execute", [0, 4])
def test_execute_outside_the_chunk(model, execute):
    with pytest.raises(ValueError, match="expected 1 to 3"):
        Policy(model, execute)


def test_statistics_are_saved_with_the_weights(model, policy, tmp_path):
    save(model, tmp_path)
    loaded = mmdlm.load_policy(tmp_path, device="cpu")
    obs = observe(3)
    np.testing.assert_array_equal(loaded.infer(obs)["actions"], policy.infer(obs)["actions"])


def test_autoregressive_model_decodes_token_by_token(build):
    twin = Policy(build(block_size=1, shift=True))
    assert twin.infer(observe(0))["timing"]["forwards"] == 6


def test_a_robot_with_one_number_takes_it_as_it_is(build):
    model = build()
    one = {"q01": [-1.0], "q99": [1.0]}
    model.robot = Robot(model.robot.bins, Normalizer(one), Normalizer(one), 3)
    policy = Policy(model)
    states = [policy._state(state) for state in (0.5, np.float32(0.5), [0.5], np.array([0.5]))]
    assert all(state.shape == (1,) and state.dtype == np.float32 for state in states)
    with pytest.raises(ValueError, match="expected 1 numbers"):
        policy._state([0.5, 0.5])
