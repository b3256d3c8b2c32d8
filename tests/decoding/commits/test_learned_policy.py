from math import erf, exp, sqrt
from pathlib import Path

import numpy as np
import pytest
import torch

from mmdlm.decoding import aux_network
from mmdlm.decoding.caches.dual_cache import DualCache
from mmdlm.decoding.commits.learned_policy import KIND, LearnedPolicy, Policy
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.decoding.plans.blocks import Blocks

SIZES = {"width": 8, "heads": 2, "inner": 12, "time": 6, "period": 10.0, "top": 2}


def random_policy(path: Path, seed: int = 0, bias: float = 0.0, **sizes) -> Policy:
    sizes = SIZES | sizes
    network = Policy(**sizes)
    generator = torch.Generator().manual_seed(seed)
    for weight in network.parameters():
        weight.data.normal_(std=0.6, generator=generator)
    network.output_proj.bias.data.fill_(bias)
    aux_network.save(path, KIND, network, sizes)
    return network


def norm(x, scale, shift):
    mean, spread = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(spread + 1e-5) * scale + shift


def gelu(x):
    return np.vectorize(lambda v: v * (1 + erf(v / sqrt(2))) / 2)(x)


def by_hand(network: Policy, masked, confidences, progress: float, heads: int) -> list[float]:
    """Log-odds of one row, position by position, in float64."""
    w = {name: p.detach().numpy().astype(float) for name, p in network.named_parameters()}

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    half = network.time // 2
    angles = np.array([progress * network.period ** (-i / half) for i in range(half)])
    wave = torch.tensor(np.concatenate([np.cos(angles), np.sin(angles)])).float().bfloat16()
    t = linear("time_mlp.0", wave.double().numpy())
    t = linear("time_mlp.2", t / (1 + np.exp(-t)))
    condition = w["mask_embedding.weight"][np.array(masked, dtype=int)] + t
    x = linear("confidence_proj", np.array(confidences, dtype=float))
    length, width = x.shape
    size = width // heads
    for i in range(len(network.transformer_blocks)):
        at = f"transformer_blocks.{i}."
        s1, b1, o1, s2, b2, o2 = np.split(linear(at + "ada_conditioning", condition), 6, -1)
        h = norm(x, w[at + "norm1.weight"], w[at + "norm1.bias"]) * (1 + s1) + b1
        q, k, v = (linear(at + f"{name}_proj", h) for name in "qkv")
        mixed = np.zeros_like(x)
        for head in range(heads):
            channels = slice(head * size, (head + 1) * size)
            for a in range(length):
                scores = []
                for b in range(length):
                    score = 0.0
                    for j in range(0, size, 2):
                        # The rotation depends on the distance of the two positions.
                        angle = (a - b) / 10_000 ** (j / size)
                        qe, qo = q[a, channels][j : j + 2]
                        ke, ko = k[b, channels][j : j + 2]
                        score += (qe * ke + qo * ko) * np.cos(angle)
                        score += (qe * ko - qo * ke) * np.sin(angle)
                    scores.append(score / sqrt(size))
                share = np.exp(np.array(scores) - max(scores))
                mixed[a, channels] = share / share.sum() @ v[:, channels]
        x = x + linear(at + "out_proj", mixed) * (1 + o1)
        h = norm(x, w[at + "norm2.weight"], w[at + "norm2.bias"]) * (1 + s2) + b2
        x = x + linear(at + "linear2", gelu(linear(at + "linear1", h))) * (1 + o2)
    x = norm(x, w["final_norm.weight"], w["final_norm.bias"])
    return linear("output_proj", x)[:, 0].tolist()


@pytest.mark.parametrize("sizes", [{}, {"heads": 1, "blocks": 2}, {"period": 1.0, "top": 1}])
def test_a_policy_equals_the_computation_by_hand(sizes, tmp_path) -> None:
    network = random_policy(tmp_path / "policy", **sizes)
    heads = (SIZES | sizes)["heads"]
    generator = torch.Generator().manual_seed(1)
    masked = torch.rand(3, 7, generator=generator) < 0.6
    confidences = torch.rand(3, 7, network.top, generator=generator)
    progress = torch.tensor([[0.0], [0.3], [0.9]])
    got = network(masked, confidences, progress)
    for i in range(3):
        want = by_hand(
            network, masked[i].tolist(), confidences[i].tolist(), progress[i].item(), heads
        )
        torch.testing.assert_close(got[i], torch.tensor(want), atol=1e-5, rtol=1e-5)


def test_positions_not_seen_do_not_matter(tmp_path) -> None:
    network = random_policy(tmp_path / "policy")
    generator = torch.Generator().manual_seed(2)
    confidences = torch.rand(1, 9, 2, generator=generator)
    masked, progress = torch.rand(1, 9, generator=generator) < 0.5, torch.tensor([[0.2]])
    seen = torch.zeros(1, 9, dtype=torch.bool)
    seen[:, 3:7] = True
    part = network(masked[:, 3:7], confidences[:, 3:7], progress)
    # Positions count from elsewhere, but only their distances matter.
    whole = network(masked, confidences, progress, seen)[:, 3:7]
    torch.testing.assert_close(whole, part, atol=1e-5, rtol=1e-5)


def test_the_published_sizes_have_a_third_of_a_million_weights() -> None:
    # Below 0.01 % of an 8B model, as the paper says.
    assert 300_000 < sum(w.numel() for w in Policy().parameters()) < 350_000


@pytest.mark.parametrize("whole", [True, False])
def test_a_decode_commits_what_the_policy_selects(whole, toy, prompts, tmp_path, softmax) -> None:
    """One row decoded by hand: full recompute, Python numbers."""
    path, model, length, size = tmp_path / "policy", toy(), 9, 4
    network, forwards = random_policy(path, seed=2, bias=-0.6, whole=whole), []
    mask_id = model.spec.mask_id
    for prompt in prompts(6, 6, 6)[0]:
        tokens, when, step = prompt.tolist() + [mask_id] * length, [-1] * length, 0
        for start in range(0, length, size):
            block = range(start, min(start + size, length))
            while any(tokens[6 + i] == mask_id for i in block):
                logits = model.logits(torch.tensor([tokens]))[0, 6:].double().tolist()
                best = [sorted(softmax(z))[:-3:-1] for z in logits]
                masked = [t == mask_id for t in tokens[6:]]
                seen = range(length) if whole else block
                odds = by_hand(
                    network, [masked[i] for i in seen], [best[i] for i in seen], step / length, 2
                )
                odds = dict(zip(seen, odds, strict=True))
                free = [i for i in block if masked[i]]
                taken = [i for i in free if odds[i] > 0]
                for i in taken or [max(free, key=lambda i: odds[i])]:
                    row = list(logits[i])
                    row[mask_id] = -float("inf")
                    tokens[6 + i], when[i] = int(np.argmax(row)), step
                step += 1
        got = decode(model, prompt[None], length, [Blocks(size), LearnedPolicy(path)])
        assert got.tokens[0].tolist() == tokens
        assert got.history.step[0].tolist() == when
        forwards.append(got.nfe)
    assert 3 < max(forwards) < length


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    ("kind", "cache"),
    [
        ({}, []),
        ({"shift": True}, []),
        ({}, [DualCache()]),
        ({"shift": True}, [DualCache()]),
        ({"attention": "prefix"}, []),
        ({"attention": "block_causal", "block_size": 4}, []),
    ],
)
def test_the_policy_decides_in_a_batch_as_alone(
    kind, cache, whole, temperature, toy, prompts, seeds, tmp_path
) -> None:
    path, model, sizes = tmp_path / "policy", toy(**kind), (7, 4, 6)
    random_policy(path, seed=2, bias=-0.6, whole=whole)
    tokens, mask = prompts(*sizes)
    canvas = torch.full((3, 10), model.spec.mask_id)
    canvas[0, :4], canvas[2, 7] = 17, 23  # the rows are in other blocks, for other numbers of steps
    own = [] if "block_size" in kind else [Blocks(5)]
    chosen = [*own, *cache, LearnedPolicy(path, temperature)]
    given = {"canvas": canvas, "generator": seeds(1, 2, 3)}
    batch = decode(model, tokens, 10, chosen, mask=mask, **given)
    for i, n in enumerate(sizes):
        given = {"canvas": canvas[i : i + 1], "generator": seeds(i + 1)}
        alone = decode(model, tokens[i : i + 1, -n:], 10, chosen, **given)
        assert batch.tokens[i, 7:].tolist() == alone.tokens[0, n:].tolist()
        assert batch.forwards[i] == alone.nfe


def test_a_policy_may_take_all_positions_or_only_its_best(toy, run, tmp_path) -> None:
    path = tmp_path / "policy"
    random_policy(path, bias=1e4)
    assert run(toy(), LearnedPolicy(path)).nfe == 1
    random_policy(path, bias=-1e4)
    one = run(toy(), LearnedPolicy(path))
    assert one.nfe == 8
    assert not one.history.step.equal(run(toy()).history.step)  # not the most probable position
    drawn = run(toy(), LearnedPolicy(path, temperature=1.0))
    assert drawn.history.step.equal(one.history.step)


def test_a_high_temperature_takes_each_position_with_probability_one_half(
    toy, prompts, tmp_path
) -> None:
    path = tmp_path / "policy"
    random_policy(path, bias=-2.0)
    tokens = prompts(5)[0].expand(60, -1)
    generator = torch.Generator().manual_seed(0)
    chosen = [LearnedPolicy(path, temperature=1e6)]
    got = decode(toy(), tokens, 8, chosen, generator=generator)
    share = (got.history.step == 0).float().mean().item()
    assert abs(share - 0.5) < 0.1
    assert 1 / (1 + exp(2 / 1e6)) == pytest.approx(0.5, abs=1e-6)


def test_works_with_a_cache_that_scores_one_block(toy, run, tmp_path) -> None:
    path = tmp_path / "policy"
    random_policy(path, bias=-1.0)
    got = run(toy(), Blocks(4), DualCache(), LearnedPolicy(path))
    assert not (got.tokens[:, 7:] == toy().spec.mask_id).any()


def test_without_a_policy_the_most_confident_position_commits(toy, run) -> None:
    one, other = run(toy(), LearnedPolicy()), run(toy(), TopK())
    assert one.tokens.equal(other.tokens)
    assert one.history.step.equal(other.history.step)


def test_files_without_a_policy_are_refused(toy, run, tmp_path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no file .*none; give a safetensors file \(unmasking policy\)"
    ):
        run(toy(), LearnedPolicy(tmp_path / "none"))
    aux_network.save(tmp_path / "hat", "hat", torch.nn.Linear(1, 1), {})
    with pytest.raises(ValueError, match="holds: hat; expected: unmasking policy"):
        run(toy(), LearnedPolicy(tmp_path / "hat"))
    with pytest.raises(ValueError, match="temperature is -1"):
        LearnedPolicy(temperature=-1)


def test_fewer_columns_than_probabilities_per_position(toy, tmp_path) -> None:
    random_policy(tmp_path / "policy.safetensors", top=5)
    chosen = [LearnedPolicy(tmp_path / "policy.safetensors")]
    got = decode(toy(), torch.tensor([[3, 4]]), 4, chosen, columns=slice(7, 9))
    assert set(got.tokens[0, 2:].tolist()) <= {7, 8}
