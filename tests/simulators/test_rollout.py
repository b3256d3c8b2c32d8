import json
import math

import numpy as np
import pytest
import torch

from mmdlm.checkpoint import save
from mmdlm.simulators import video
from mmdlm.simulators.rollout import act, evaluate, rollout, simulators, wilson
from mmdlm.simulators.simulator import choose_gl
from mmdlm.simulators.toy import Toy
from mmdlm.tasks.act import Policy


class Expert:
    """The expert of the toy as a policy: chunks of equal actions."""

    def __init__(self, simulator, chunk=4):
        self.simulator, self.chunk, self.resets = simulator, chunk, 0

    def reset(self):
        self.resets += 1

    def infer(self, obs):
        actions = np.repeat(self.simulator.expert()[None], self.chunk, 0)
        return {"actions": actions, "timing": {}}


class Still(Expert):
    def infer(self, obs):
        return {"actions": np.zeros((4, 2), np.float32), "timing": {}}


@pytest.fixture(scope="module")
def policy(build):
    return Policy(build())


@pytest.mark.parametrize("execute", [1, 2])
def test_expert_succeeds_with_one_query_per_executed_actions(execute):
    simulator = Toy()
    expert = Expert(simulator)
    episode = rollout(expert, simulator, seed=3, execute=execute)
    assert episode.success
    assert episode.seed == 3
    assert episode.queries == math.ceil(episode.steps / execute)
    assert expert.resets == 1
    assert episode.reward < 0
    assert episode.frames == ()


def test_standing_still_ends_at_the_horizon():
    simulator = Toy(horizon=10)
    episode = rollout(Still(simulator), simulator, seed=0, execute=4)
    assert not episode.success
    assert episode.steps == 10
    assert episode.queries == 3


def test_execute_is_at_most_the_chunk():
    simulator = Toy()
    with pytest.raises(ValueError, match="execute is 5, expected 1 to 4"):
        rollout(Expert(simulator), simulator, seed=0, execute=5)


def test_frames_show_every_step_in_an_even_size():
    simulator = Toy()
    episode = rollout(Expert(simulator), simulator, seed=0, execute=2, film=True)
    assert len(episode.frames) == episode.steps + 1
    height, width, _ = episode.frames[0].shape
    assert min(height, width) >= 256
    assert height % 2 == width % 2 == 0
    assert (episode.frames[0][:256] != episode.frames[-1][:256]).any()


def test_images_are_rendered_only_for_queries(monkeypatch):
    observed = []
    draw = Toy._observe
    monkeypatch.setattr(Toy, "_observe", lambda toy: observed.append(1) or draw(toy))
    simulator = Toy(horizon=10)
    drawn = [rollout(Still(simulator), simulator, 0, execute=4, film=f) for f in (False, True)]
    assert drawn[0].to_dict() | {"infer_ms": 0} == drawn[1].to_dict() | {"infer_ms": 0}
    # One after the reset, then one before each further query; a video needs every step.
    assert len(observed) == (1 + 2) + (1 + 10)


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [
        (19, 20, 0.7639, 0.9911),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
    ],
)
def test_wilson_interval_is_the_published_one(successes, count, low, high):
    assert wilson(successes, count) == pytest.approx((low, high), abs=2e-4)


@pytest.mark.parametrize(("successes", "count"), [(1, 0), (3, 2), (-1, 2)])
def test_wilson_rejects_invalid_counts(successes, count):
    with pytest.raises(ValueError, match="expected"):
        wilson(successes, count)


def test_evaluate_records_seeds_and_settings(policy):
    result = evaluate(policy, "toy", [5, 6], execute=2, horizon=4, progress=False)
    assert [episode.seed for episode in result.episodes] == [5, 6]
    assert str(result).startswith(f"toy: {result.successes}/2 = ")
    settings = result.settings
    assert settings["horizon"] == 4
    assert settings["size"] == 32  # what the policy's image encoder takes
    assert settings["execute"] == 2
    assert settings["chunk"] == 3
    assert settings["strategies"][0]["class_path"] == "mmdlm.decoding.commits.top_k.TopK"
    assert settings["versions"]["torch"] == torch.__version__.partition("+")[0]
    again = evaluate(policy, "toy", [5, 6], execute=2, horizon=4, progress=False)
    assert [e.reward for e in again.episodes] == [e.reward for e in result.episodes]


def test_evaluate_rejects_another_robot_and_no_seeds(policy):
    class Arm(Toy):
        action_size = 4

    import mmdlm.simulators.toy as toy

    original, toy.Toy = toy.Toy, Arm
    try:
        with pytest.raises(ValueError, match="trained on another robot"):
            evaluate(policy, "toy", [0], progress=False)
    finally:
        toy.Toy = original
    with pytest.raises(ValueError, match="no seeds"):
        evaluate(policy, "toy", [], progress=False)


def test_simulators_are_named_by_commas_or_by_the_checkpoint():
    class Trained:
        tasks = ("drawer-close-v3", "toy")

    class Untold:
        tasks = ()

    assert simulators("toy, metaworld/reach-v3,toy", Untold) == ["toy", "metaworld/reach"]
    assert simulators(["trained"], Trained) == ["metaworld/drawer-close", "toy"]
    with pytest.raises(ValueError, match="lists no tasks"):
        simulators("trained", Untold)
    with pytest.raises(ValueError, match="expected a simulator"):
        simulators(" ,", Untold)


def test_act_prints_success_and_writes_results_and_video(policy, tmp_path, capsys):
    pytest.importorskip("imageio_ffmpeg", reason='pip install "mmdlm[sim]"')
    save(policy.model, tmp_path / "model")
    out, films = tmp_path / "deep" / "result.json", tmp_path / "films"
    status = act(
        "toy", 2, str(tmp_path / "model"), 7, 2, horizon=3, video=films, out=out, device="cpu"
    )
    assert status == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("toy: ")
    assert "/2 = " in printed[0]
    saved = json.loads(out.read_text())
    assert [episode["seed"] for episode in saved[0]["episodes"]] == [7, 8]
    assert saved[0]["count"] == 2
    assert saved[0]["settings"]["model"] == str(tmp_path / "model")
    import imageio_ffmpeg

    film = films / "toy-seed7.mp4"
    frames, _ = imageio_ffmpeg.count_frames_and_secs(str(film))
    assert frames == 14  # the start, three steps, and the end held
    facts = next(imageio_ffmpeg.read_frames(str(film)))
    assert facts["size"] == (256, 296)


def test_act_rejects_invalid_arguments(policy, tmp_path):
    with pytest.raises(ValueError, match="episodes is 0"):
        act("toy", episodes=0)
    save(policy.model, tmp_path)
    with pytest.raises(ValueError, match="did you mean"):
        act("toi", 1, str(tmp_path), device="cpu")


def test_video_needs_frames_and_the_suffix_mp4(tmp_path):
    frame = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(ValueError, match=r"name\.mp4"):
        video.write(tmp_path / "a.gif", [frame])
    with pytest.raises(ValueError, match="0 frames"):
        video.write(tmp_path / "a.mp4", [])


def test_long_captions_are_truncated():
    frame = np.zeros((63, 65, 3), np.uint8)
    page = video.annotate(frame, ["word " * 100, "no"], good=False)
    assert page.shape[0] % 2 == page.shape[1] % 2 == 0
    assert page.shape[1] < 400


@pytest.mark.sim
def test_metaworld_result_records_how_it_was_rendered(build):
    if choose_gl() is None:
        pytest.skip("nothing renders; apt-get install libegl1 libegl-mesa0")
    arm = Policy(build(size=4))
    result = evaluate(arm, "metaworld/drawer-close", [0], 2, horizon=5, filmed=1, progress=False)
    settings = result.settings
    assert settings["instruction"] == "close the drawer"
    assert settings["render_quality"] == "fast"
    assert settings["camera"]["name"] == "corner2"
    assert settings["gl"] in ("egl", "osmesa", "glfw")
    assert {"mujoco", "metaworld"} <= set(settings["versions"])
    assert result.episodes[0].steps == 5
    assert len(result.episodes[0].frames) == 6
