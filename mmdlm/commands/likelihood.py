"""`mmdlm likelihood`: how probable given answers are."""

from __future__ import annotations

import json

from mmdlm.commands.shown import Run
from mmdlm.tasks.likelihood import Method


def likelihood(
    prompt: str,
    answers: list[str],
    run: Run,
    image: list[str] | None = None,
    audio: list[str] | None = None,
    method: Method | None = None,
    samples: int = 128,
    cfg: float = 0.0,
    length: int | None = None,
    seed: int = 0,
) -> int:
    """Score how probable given answers are: a bound on the log likelihood, in nats.

    mmdlm likelihood "describe the picture" "a red circle" "a blue star" --image scene.png
    mmdlm likelihood "The capital of France is" " Paris." --model owner/text-model --json

    Higher is more probable. A masked-diffusion model gives a lower bound, so perplexities are upper
    bounds: compare them with each other, not with those of autoregressive models. Short answers are
    computed exactly; for longer ones masks are drawn, and the standard error is shown after the
    sign +-.

    Args:
        prompt: the question or the beginning of the text.
        answers: one answer or more.
        run: which model runs, and where.
        image: an image before the prompt; may be given several times.
        audio: a recording before the prompt; may be given several times.
        method: exact, monte_carlo (LLaDA's), stratified, complementary or quadrature; by default
            exact where it takes at most as many forwards as samples, else complementary.
        samples: masks that are drawn per block of an answer.
        cfg: scale of classifier-free guidance.
        length: score a canvas of so many tokens, padded with end tokens as in training.
        seed: of the masks.
    """
    from mmdlm.tasks.likelihood import likelihood as score

    asked: object = prompt
    if image or audio:
        parts = [{"type": "image", "image": file} for file in image or ()]
        parts += [{"type": "audio", "audio": file} for file in audio or ()]
        asked = [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]
    found = score(
        run.load(),
        asked,
        list(answers),
        method=method,
        samples=samples,
        cfg=cfg,
        length=length,
        batch_size=run.batch_size,
        seed=seed,
        details=True,
    )
    for answer, one in zip(answers, found, strict=True):
        if run.json:
            print(json.dumps({"prompt": prompt, "answer": answer, **one.to_dict()}))
            continue
        error = "" if not one.standard_error else f" +- {one.standard_error:.3f}"
        print(
            f"{one.bound:.3f}{error} nats, {one.tokens} tokens, perplexity {one.perplexity:.3f} "
            f"({one.method}, {one.forwards} forwards): {answer}"
        )
    return 0
