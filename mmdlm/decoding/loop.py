"""One denoising step of all rows of a batch."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items

import torch
from torch import Tensor

from mmdlm.decoding import forward, rows
from mmdlm.decoding.caches.exact import Exact
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.numerics import log_odds
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.scores.greedy import Greedy
from mmdlm.decoding.scores.probability import Probability
from mmdlm.decoding.state import State
from mmdlm.decoding.strategy import Strategy, check_together
from mmdlm.decoding.view import View, ban_mask, settled

Owners = dict[str, list[Strategy]]
"""Hook name to the strategies that decide it; under "all", every strategy of the decode once."""

SHARED = (
    *("step", "block", "block_step", "block_masks", "block_size", "asked"),
    *("plan", "region", "opened", "held", "left_before", "_left", "shown"),
)
"""What an alternative prompt has in common with the rows: all about the answers."""
DEFAULTS = (Blocks(), Exact(), Greedy(), Probability(), TopK())
"""Strategies that decide the hooks which no other strategy decides."""


def assign(strategies: Items[Strategy]) -> Owners:
    """Hook name to the strategies that decide it, with the loop's own defaults filled in.

    Raises:
        ValueError: two strategies decide the same one-owner hook, or one takes away what another
            one requires.
    """
    owners: Owners = {}
    for strategy in strategies:
        for hook in strategy.hooks():
            owners.setdefault(hook, []).append(strategy)
    for hook in Strategy.ONE_OWNER:
        if len(owners.get(hook, ())) > 1:
            a, b = (type(s).__name__ for s in owners[hook][:2])
            raise ValueError(f"{a} and {b} both decide {hook!r}; keep one")
    check_together(strategies)
    for default in DEFAULTS:
        hooks = default.hooks()
        if not owners.keys() & {*hooks} & {*Strategy.ONE_OWNER}:
            for hook in hooks:
                owners.setdefault(hook, []).append(default)
    everyone = [*strategies, *(s for held in owners.values() for s in held)]
    owners["all"] = list({id(s): s for s in everyone}.values())
    return owners


def plan(state: State, owners: Owners) -> Tensor:
    """Opens positions for the next step, and sets the clocks of rows that begin a block.

    Returns:
        [B] bool on the host, rows that have something left to do.
    """
    owner, view = owners["plan"][0], View(state)
    if _steady(owners) and "revise" not in owners and "resize" not in owners:
        busy = (state.left & state.plan).any(1)
        if bool(busy.all()):
            return busy
    before, state.region = state.plan, owner.plan(view)
    for each in owners.get("narrow", ()):
        state.region = state.region & (each.narrow(view) | ~state.answer)
    planned = state.region & state.answer
    if owner.sliding:
        same = state.block >= 0
    else:
        # Of answers that change their length, the block that begins at the same place is the same.
        same = (planned == before).all(1) | (state.resized & _first(planned).eq(_first(before)))
        same &= state.block >= 0
    state.plan, state.opened = planned, planned.to(state.tokens.device)
    state.noted = {}
    state.resized = torch.zeros_like(same)
    if not bool(same.all()):
        new = ~same
        if state.model.spec.attention == "canvas":
            state.close(_first(planned)[:, None])
        state.block += new
        state.block_step.masked_fill_(new, 0)
        inside = state.left if owner.sliding else state.left & planned
        state.block_masks = torch.where(new, inside.sum(1), state.block_masks)
        sizes = [each.block_size(view) for each in owners.get("block_size", ())]
        if owner not in owners.get("block_size", ()):
            sizes.append(planned.sum(1))
        state.block_size = torch.where(new, torch.stack(sizes).amin(0), state.block_size)
    return planned.any(1)


def _steady(owners: Owners) -> bool:
    """Whether the open positions of a row stay the same until no mask is left in them."""
    return all(each.steady for each in (*owners["plan"], *owners.get("narrow", ())))


def _first(flags: Tensor) -> Tensor:
    """[B] the first True of each row [B L]."""
    return flags.int().argmax(1)


def lasts(state: State, owners: Owners) -> bool:
    """True if all rows certainly stay in their blocks, so that the host sync can be skipped."""
    if state.score_masked_only:
        return False
    if any(hook in owners for hook in ("stop", "edit", "hold", "revise", "end", "resize")):
        return False
    return _steady(owners) and owners["select"][0].lasts(View(state))


def step(state: State, owners: Owners, on_commit: Callable[[State], None] | None = None) -> None:
    """One step: the forward, what it commits, what is taken back, and the clocks.

    Args:
        state: the rows, planned.
        owners: the strategies.
        on_commit: called after the write.
    """
    view = View(state)
    state.refresh = owners["refresh"][0].refresh(view)
    read = active_positions(state, owners)
    state.focus(read)
    state.shown = owners["show"][0].show(view) if "show" in owners else None
    for other in state.alternatives.values():
        follow(other, state, read, owners["refresh"][0])
    for each in state.prompts:
        each.look = owners["look"][0].look(View(each)) if "look" in owners else None
        forward.prepare(each)
    logits = forward.run(state)
    for each in state.prompts:
        _cached(each)
    for strategy in owners["all"]:
        if strategy in owners.get("guide", ()):
            logits = strategy.guide(view, logits)
        if strategy in owners.get("observe", ()):
            strategy.observe(view, logits)
    logits = ban_mask(state, logits)
    picked = owners["pick"][0].pick(view, logits)
    state.candidates = picked + view.first_id
    state.log_odds = log_odds(logits, picked)
    confidence = owners["score"][0].score(view, logits, picked)
    state.confidence = confidence.masked_fill(~state.open, -torch.inf)
    _replan(state, owners)
    _commit(state, owners)
    if on_commit is not None:
        on_commit(state)
    _revise(state, owners)
    end(state, owners)
    for strategy in owners.get("resize", ()):
        source = strategy.resize(view)
        if source is not None:
            rows.resize(state, source)
            for each in state.prompts if "layout" in owners else ():
                each.set_levels(owners["layout"][0].layout(View(each)))
    if "look" in owners:
        rows.drop(state)
    state.wrote()
    state.step += 1
    state.block_step += 1


def follow(other: State, state: State, read: Tensor, owner: Strategy) -> None:
    """Prepares the forward of an alternative prompt with the answers as they are.

    Args:
        other: the rows after the alternative prompt.
        state: the rows.
        read: [B L] host bool, the positions scored.
        owner: the strategy that decides `refresh`.
    Raises:
        RuntimeError: the owner computes other positions after this prompt.
    """
    other.tokens[:, state.prompt :] = state.tokens[:, state.prompt :]
    if other.plan is not state.plan:
        other.noted = {}
    for name in SHARED:
        setattr(other, name, getattr(state, name))
    other.refresh = owner.refresh(View(other))
    other.focus(read)
    if bool((read & ~scorable(other)).any()):
        raise RuntimeError(
            f"{type(owner).__name__} computes other positions after the alternative prompt; "
            "use guidance without this cache"
        )


def scorable(state: State) -> Tensor:
    """[B L] host bool, the positions that the forward of this step can score."""
    if state.refresh.logits is not None:
        return state.level >= 0
    if not state.model.spec.shift:
        return state.refresh.compute
    scored = state.refresh.compute.roll(1, 1)
    scored[:, 0] = False
    return scored


def _cached(state: State) -> None:
    """Notes what the caches hold after a forward."""
    if not state.refresh.cached:
        return
    compute = state.refresh.compute
    if state.refresh.prefill is not None:
        compute = compute | state.refresh.prefill
    if state.one_level and bool(state.has_cache.all()):
        return
    low, level = settled(state)[:, None], state.level
    first = state.left_before.int().argmax(1, keepdim=True)
    floor = level.gather(1, first)
    missing = ((level >= low) & (level < floor) & ~compute).any(1)
    state.final = torch.where(missing, low[:, 0], floor[:, 0])
    state.has_cache |= compute.any(1)


def end(state: State, owners: Owners) -> None:
    """Fills what can only become end tokens, also after those that are given."""
    for strategy in owners.get("end", ()):
        ended = strategy.end(View(state)) & state.masked
        state.tokens.masked_fill_(ended, state.model.spec.eos_id)


def _replan(state: State, owners: Owners) -> None:
    """Closes open positions now that the candidates are known."""
    parts = [each.replan(View(state)) for each in owners.get("replan", ())]
    parts = [part for part in parts if part is not None]
    if not parts:
        return
    part = torch.stack(parts).all(0)
    state.region = state.region & (part | ~state.plan)
    state.plan = part & state.plan
    state.opened, state.noted = state.plan.to(state.tokens.device), {}
    state.open = state.open & state.here(state.opened)
    state.confidence = state.confidence.masked_fill(~state.open, -torch.inf)
    first = state.block_step == 0
    masks = (state.plan & state.left).sum(1)
    state.block_masks = torch.where(first, masks, state.block_masks)


def _commit(state: State, owners: Owners) -> None:
    """Writes what this step takes into the canvas, and records when and how surely."""
    view, is_open = View(state), state.open
    stopped = [strategy.stop(view) for strategy in owners.get("stop", ())]
    taken = _selected(state, owners) & is_open
    if stopped:
        finish = torch.stack(stopped).any(0)[:, None]
        taken = taken | (finish & state.here(state.masked))
    for strategy in owners.get("edit", ()):
        # Of what no mask can change any more, caches keep the keys.
        changing = state.unsettled.to(taken.device)
        written = state.here(state.writable & ~state.masked & changing)
        edited = strategy.edit(view) & written
        taken = taken | (edited & state.here(state.opened))
    if "hold" in owners:
        state.held = torch.zeros_like(state.plan)
    for strategy in owners.get("hold", ()):
        state.held = state.held | strategy.hold(view)
    state.taken = taken
    when = state.step[:, None].to(taken.device)
    state.put(state.tokens, taken, state.candidates)
    state.put(state.commit_step, taken, when.expand(taken.shape), state.prompt)
    state.put(state.commit_confidence, taken, state.log_odds.sigmoid(), state.prompt)


def _selected(state: State, owners: Owners) -> Tensor:
    """[B R] bool, the open positions that commit."""
    select, is_open = owners["select"][0], state.open
    only = state.refresh.only
    stuck = None
    if only is not None and bool((only & state.left).any()):
        stuck = (only & state.left).any(1, keepdim=True)
        if bool(stuck.all()):
            return is_open
        # Rows that fill one position do not select, nor do they draw.
        stuck = stuck.to(is_open.device)
        state.open = is_open & ~stuck
    taken = select.select(View(state))
    if not select.may_idle:
        taken = taken.scatter(1, state.confidence.argmax(1, keepdim=True), True)
    state.open = is_open
    return taken if stuck is None else torch.where(stuck, is_open, taken)


def _revise(state: State, owners: Owners) -> None:
    """Makes known positions masks again."""
    for strategy in owners.get("revise", ()):
        again = strategy.revise(View(state))
        again = again & (state.step < 2 * state.asked)[:, None].to(again.device)
        rows.mask_again(state, again)


def active_positions(state: State, owners: Owners) -> Tensor:
    """[B L] host bool, the positions this step scores: what hooks need of what is computed.

    Raises:
        RuntimeError: a row that has open masks scores none of them.
    """
    scored = scorable(state)
    left = state.left_before
    sees = {strategy.sees for strategy in owners["all"]}
    open_masks = state.plan & left
    if "answer" in sees:
        wanted = state.answer
        if not state.one_level:
            # As far as the open masks see; the other positions of the block may see further.
            scoring = state.level.roll(int(state.model.spec.shift), 1)
            masks = state.plan & state.left
            top = scoring.masked_fill(~masks, -1).amax(1, keepdim=True)
            wanted = wanted & state.unsettled & (scoring <= top)
    elif "block" in sees or not state.score_masked_only:
        wanted = state.plan
    else:
        wanted = open_masks
    read = scored & wanted
    if (only := state.refresh.only) is not None:
        only = only & state.left
        stuck = only.any(1, keepdim=True)
        # Such a row must know no more than the forward that scores its first position.
        read = (read & ~stuck) | (only & scored)
    if bool((open_masks.any(1) & ~(read & open_masks).any(1)).any()):
        name = type(owners["refresh"][0]).__name__
        raise RuntimeError(
            f"{name} computes positions that score no open mask of a row; its refresh must cover "
            "one in every row"
        )
    return read
