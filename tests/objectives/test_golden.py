"""Every recorded case of published training code whose objective exists."""

import json
from dataclasses import replace

import pytest
import torch

from mmdlm.layout import ANSWER, Sequence
from mmdlm.objectives.block_diffusion import paired
from mmdlm.objectives.draw import Draw
from mmdlm.objectives.mask_plans import mask_sizes
from mmdlm.objectives.masked import Masked
from mmdlm.objectives.objective import Batch
from mmdlm.objectives.schedule import Schedule
from mmdlm.objectives.weights import cart
from mmdlm.training.learn2pd import filter_loss
from tests.objectives.recorded import (
    CASES,
    MASK,
    Table,
    batch_of,
    case,
    is_gradient,
    is_near,
    is_rounded,
    noise_of,
    preset,
    sequence_of,
    target,
)

# Recorded cases without an objective yet, by the start of their names. Who adds one moves its cases
# into the golden file; a case there without a check fails.
WITHOUT = (
    *("dscd.lambda", "repr_align", "jacobi_forcing.", "diffretriever", "rainbow_padding."),
    *("diffu_grpo.", "coupled_grpo", "advantage.", "mdpo.", "tracerl.", "bgpo.", "ppo_clip."),
    *("espo.", "ebpo.", "vrpo_dpo", "spg.", "cj_grpo.", "igpo.", "maskgrpo."),
)

# The objective of each case whose output is a loss, from configs/objectives where there is one.
DLLM = preset("dllm")
LOSSES = {
    "mdlm_sft.LinearAlphaScheduler.scheduler.token.shift0": DLLM,
    "mdlm_sft.LinearAlphaScheduler.scheduler.token.shift1": DLLM,
    "mdlm_sft.LinearAlphaScheduler.scheduler.sequence.shift0": replace(DLLM, normaliser="row"),
    "mdlm_sft.LinearAlphaScheduler.scheduler.batch.shift0": replace(DLLM, normaliser="rows"),
    "mdlm_sft.LinearAlphaScheduler.uniform.token.shift0": replace(DLLM, weight="one"),
    "mdlm_sft.CosineAlphaScheduler.scheduler.token.shift0": replace(
        DLLM, schedule=Schedule("cosine", guard=1e-6)
    ),
    "d1_sft": preset("d1"),
    "diffa_sft": preset("d1"),
    "llada_v_sft": preset("llada_v"),
    "dream_vl_sft.original": replace(preset("dream_vl"), weight="1/t"),
    "dream_vl_sft.linear": replace(preset("dream_vl"), weight="linear"),
    "dream_vl_sft.none": replace(preset("dream_vl"), weight="one"),
    "dream_vl_sft.cart": preset("dream_vl"),
    "block_sft.sdar": preset("sdar").objective,
}
SCHEDULES = {
    "schedule.LinearAlphaScheduler": DLLM.schedule,
    "schedule.CosineAlphaScheduler": Schedule("cosine", guard=1e-6),
    "noise.mdlm.LogLinearNoise": preset("mdlm").schedule,
    "noise.mdlm.CosineNoise": Schedule("mdlm_cosine", high=0.999),
    "noise.mdlm.CosineSqrNoise": Schedule("cosine_squared", high=0.999),
    "noise.mdlm.GeometricNoise": Schedule("geometric"),
    "noise.bd3lm.LogLinearNoise": Schedule("linear"),
    "noise.bd3lm.CosineNoise": Schedule("mdlm_cosine", low=1e-3, guard=1e-3),
    "noise.bd3lm.ExpNoise2": Schedule("power", power=2.0),
    "noise.bd3lm.ExpNoise0.5": Schedule("power", power=0.5),
    "noise.bd3lm.LogarithmicNoise": Schedule("logarithmic"),
}


def check_loss(name):
    objective = LOSSES[name]
    params, given, want = case(name)
    tokens, answer = target(given)
    masked, slope = given.masked, None
    if name.startswith("mdlm_sft."):
        p, slope = objective.schedule(given.t.double())
    elif name == "block_sft.sdar":
        p = torch.ones(masked.shape).masked_scatter(masked, given.p_mask_of_masked)
    else:
        p = given.t if hasattr(given, "t") else given.p_mask
    logits = getattr(given, "logits", getattr(given, "logits_half", None)).requires_grad_()
    shift = params.get("right_shift_logits", name.startswith("dream"))
    batch, noise = batch_of(sequence_of(tokens, answer)), noise_of(masked, answer, p, slope)
    loss = objective.loss(Table(logits, shift=shift), batch, noise).mean()
    loss.backward()
    return is_near(loss, want.loss) and is_gradient(logits.grad, want.grad_logits)


def check_schedule(name):
    _, given, want = case(name)
    t, schedule = given.t.double(), SCHEDULES[name]
    p, slope = schedule(t)
    if hasattr(want, "alpha"):
        assert is_near(1 - p, want.alpha)
        assert is_near(-slope, want.alpha_prime)
        return is_rounded(schedule.weight(t), want.weight, p)
    if hasattr(want, "sigma"):
        assert is_rounded(-torch.log1p(-p), want.sigma, p)
        assert is_rounded(slope / (1 - p), want.dsigma, p)
    assert is_near(p, want.mask_prob.double())
    return is_rounded(schedule.weight(t), want.ce_weight, p)


def check_level(name):
    params, given, want = case(name)
    draw = Draw(level=params["policy"], **params["policy_args"])
    u = given.base_draw.double()
    u = torch.special.ndtr(u) if params["policy"] == "logit_normal" else u
    return is_near(draw.shaped(u), want.t.double())


def check_antithetic(name):
    params, given, want = case(name)
    drawn = given.u if given.u.ndim == 2 else given.u[:, None]
    blocks, rows = params.get("block_size"), len(drawn)
    clip = (params["eps_min"], params["eps_max"]) if blocks else None
    draw = Draw(per="block" if blocks else "row", spread="stratified", clip=clip)
    tokens = torch.zeros(rows, want.t.shape[-1] if blocks else 1, dtype=torch.long)
    sequence = sequence_of(tokens, torch.ones_like(tokens).bool(), blocks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmdlm.objectives.draw.uniform", lambda *_, **__: drawn.double())
        levels = draw.levels(batch_of(sequence), draw.groups(sequence), params.get("eps", 0.0))
    return is_near(levels.reshape(want.t.shape), want.t.double())


def check_mask_probability(name):
    """SMDM: the reference draws its masks with the recorded probability."""
    params, given, want = case(name)
    objective = Masked(eps=params["eps"], draw=Draw(per="row"))
    sequence = sequence_of(given.input_ids, torch.ones_like(want.masked))
    batch = Batch(sequence, torch.arange(len(given.t)), given.t.double())
    noise = objective.corrupt(batch)
    return is_near(noise.p, want.p_mask[:, None].expand_as(noise.p))


def check_cart_weight(name):
    params, given, want = case(name)
    masked = given.masked
    sequence = sequence_of(masked.long(), masked)
    found = cart(~masked, sequence, params["p"])
    return is_near(found * masked, want.weights)


def check_cart_matrix(name):
    params, _, want = case(name)
    alone = torch.eye(params["n"], dtype=torch.bool)
    found = cart(alone, sequence_of(alone.long(), alone), params["p"])
    return is_near(found.T, want.matrix)


def check_complementary(name):
    _, given, want = case(name)
    tokens, answer = target(given)
    logits = given.logits_both.requires_grad_()
    table = Table(logits)
    noise = noise_of(given.draw_masked & answer, answer, given.p_mask)
    loss = preset("lavida").loss(table, batch_of(sequence_of(tokens, answer)), noise).mean()
    loss.backward()
    assert torch.equal(table.seen[0].tokens == MASK, given.masked_both)
    return is_near(loss, want.loss) and is_gradient(logits.grad, want.grad_logits)


def check_mixed(name):
    """MMaDA: three groups of rows, each with its own objective."""
    params, given, want = case(name)
    logits = given.logits.requires_grad_()
    total = 0.0
    text = "llada_sft" if name.endswith("answer_len") else "llada_pretrain"
    kinds = {"t2i": "mmada_image", "lm": text, "mmu": "llada_sft"}
    for kind, objective in kinds.items():
        rows = params[f"rows_{kind}"]
        tokens, masked = given.labels[rows].clamp(min=0), given.noised_ids[rows] == MASK
        length = tokens.shape[1]
        if kind == "t2i":  # the image starts after the text and two markers
            answer = (torch.arange(length) > params["t2i_text_prefix"]).expand_as(masked)
            masked = masked & answer & (given.labels[rows] != -100)
        else:
            lengths = given.answer_lengths[rows][:, None]
            answer = torch.arange(length) >= length - lengths
        noise = noise_of(masked, answer, given.p_mask[rows])
        batch = batch_of(sequence_of(tokens, answer))
        loss = preset(objective).loss(Table(logits[rows]), batch, noise).mean()
        assert is_near(loss, getattr(want, f"loss_{kind}"))
        total = total + loss
    total.backward()
    return is_gradient(logits.grad, want.grad_logits_of_sum)


def check_subs(name):
    _, given, want = case(name)
    logits, everywhere = given.logits.requires_grad_(), torch.ones_like(given.x0).bool()
    objective = preset("mdlm")
    p, slope = objective.schedule(given.t.double())
    noise = noise_of(given.xt == MASK, everywhere, p, slope)
    losses = objective.loss(Table(logits), batch_of(sequence_of(given.x0, everywhere)), noise)
    losses.mean().backward()
    assert is_near(losses.sum, want.nll_per_token.sum())
    return is_near(losses.mean(), want.loss) and is_gradient(logits.grad, want.grad_logits)


def check_block_mask(name):
    params, _, want = case(name)
    lengths = params.get("packed_lengths", [params.get("n")])
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    document = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths, 1)])[None]
    ones = torch.ones_like(positions)
    sequence = Sequence(
        *(ones, ones * ANSWER, 0 * ones, ones.bool(), positions),
        positions // params["block_size"],
        document if len(lengths) > 1 else None,
    )
    start, pair = paired(sequence, shift=False)
    assert start == 0
    # The reference puts the copies of a document side by side.
    both = document.repeat(1, 2)[0]
    order = (both * 2 + (torch.arange(len(both)) >= len(both) // 2)).argsort(stable=True)
    found = pair.visible()[0][order][:, order]
    return torch.equal(found, want.allowed.reshape(found.shape))


def check_block_sft(name):
    params, given, want = case(name)
    tokens, answer = target(given)
    logits = given.logits_2L.requires_grad_()
    length = tokens.shape[1]
    table = Table(logits, block_size=params["block_size"])
    batch = batch_of(sequence_of(tokens, answer, params["block_size"]))
    noise = noise_of(given.concat_ids[:, :length] == MASK, answer, given.t)
    loss = preset("dllm_block").loss(table, batch, noise).mean()
    loss.backward()
    assert torch.equal(table.seen[0].tokens, given.concat_ids)
    assert torch.equal(table.seen[0].positions, given.position_ids)
    return is_near(loss, want.loss) and is_gradient(logits.grad, want.grad_logits)


def check_dparallel(name):
    params, given, want = case(name)
    answer = given.masked_a | given.masked_b
    noise = noise_of(given.masked_a, answer, torch.tensor([0.5]))
    a, b = given.logits_a.requires_grad_(), given.logits_b.requires_grad_()
    table = Table(torch.cat([a, b]), shift=params["shifted"])
    objective = preset("dparallel_dream" if params["shifted"] else "dparallel")
    assert objective.certainty == params["certainty_weight"]
    batch = batch_of(sequence_of(given.input_ids, answer))
    loss = objective.loss(table, batch, noise).mean()
    loss.backward()
    assert torch.equal(table.seen[0].tokens, torch.cat([given.noised_a, given.noised_b]))
    assert is_gradient(a.grad, want.grad_logits_a)
    return is_near(loss, want.loss) and is_gradient(b.grad, want.grad_logits_b)


def check_dscd(name):
    params, given, want = case(name)
    tokens, answer = target(given)
    student = given.student_logits.requires_grad_()
    noise = noise_of(given.student_masked, answer, torch.tensor([0.5] * len(tokens)))
    objective = replace(preset("dscd"), clamp=params["clamp_max"])
    batch = batch_of(sequence_of(tokens, answer))
    table = Table(given.teacher_logits, student)
    loss = objective.loss(table, batch, noise, given.teacher_masked).mean()
    loss.backward()
    return is_near(loss, want.loss) and is_gradient(student.grad, want.grad_student_logits)


def check_path(name):
    """Open-dLLM, from the cross entropy of each token on."""
    _, given, want = case(name)
    n = len(given.token_ce)
    # Logits of two tokens whose cross entropy is the recorded one.
    other = torch.log(torch.expm1(given.token_ce.double())).float()
    logits = torch.stack([torch.zeros(n), other], 1)[None].requires_grad_()
    masked = torch.ones(1, n, dtype=torch.bool)
    noise = noise_of(masked, masked, given.mask_ratio)
    batch = batch_of(sequence_of(torch.zeros(1, n, dtype=torch.long), masked))
    loss = preset("open_dllm").loss(Table(logits), batch, noise).mean()
    loss.backward()
    slope = 1 - torch.exp(-given.token_ce)  # d CE / d other
    return is_near(loss, want.loss) and is_gradient(logits.grad[0, :, 1] / slope, want.grad_ce)


def check_filter(name):
    _, given, want = case(name)
    logits = given.filter_logits.requires_grad_()
    loss = filter_loss(logits, given.is_correct, torch.ones_like(logits))
    loss.backward()
    return is_near(loss, want.loss) and is_gradient(logits.grad, want.grad)


def check_mask_sizes(name):
    """The reference draws the size of the first mask; the others follow from it."""
    _, given, want = case(name)
    length = int(given.attention[given.prompt_len :].sum())
    sizes = mask_sizes(int(want.count[0]), len(want.count), length)
    assert is_near(sizes / length, want.p_mask)
    return torch.equal(sizes, want.count)


CHECKS = {
    **dict.fromkeys(LOSSES, check_loss),
    **dict.fromkeys(SCHEDULES, check_schedule),
    "lavida.sample_t.": check_level,
    "sample_t.": check_antithetic,
    "smdm.": check_mask_probability,
    "cart_weight.": check_cart_weight,
    "cart_matrix.": check_cart_matrix,
    "lavida_complementary": check_complementary,
    "mmada_mixed.": check_mixed,
    "mdlm_subs_loss": check_subs,
    "block_mask.": check_block_mask,
    "block_sft.dllm": check_block_sft,
    "dparallel.": check_dparallel,
    "dscd.loss.": check_dscd,
    "open_dllm_mdm_path": check_path,
    "learn2pd.filter_loss": check_filter,
    "elbo_mask.bgpo_vrpo": check_mask_sizes,
}


@pytest.mark.parametrize("name", CASES)
def test_equals_published_code(name):
    checks = [check for start, check in CHECKS.items() if name.startswith(start)]
    assert len(checks) == 1, f"{name} has {len(checks)} checks, expected 1; see CHECKS"
    assert checks[0](name)


def test_most_recorded_cases_have_an_objective(golden):
    # Those of likelihoods are checked in test_mask_plans.py and tasks/test_likelihood.py.
    likelihoods = json.loads((golden / "objectives" / "likelihood.json").read_text())["cases"]
    assert len(CASES) + len(likelihoods) >= 60
    assert not [name for name in CASES if name.startswith(WITHOUT)]
    unused = [start for start in CHECKS if not any(name.startswith(start) for name in CASES)]
    assert not unused
