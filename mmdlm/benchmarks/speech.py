"""Transcription of new phrases: word error rate and share of exact phrases."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from mmdlm.benchmarks.answers import answer, hits, ways
from mmdlm.benchmarks.captions import SEED, drawn, score
from mmdlm.benchmarks.report import Score
from mmdlm.data import speech
from mmdlm.messages import Example
from mmdlm.model import MultimodalDLM

SPLITS = ("held_out", "new_voice")


def speech_parts(
    count: int, data: Path | None = None, seed: int = SEED
) -> dict[str, list[Example]]:
    """Clips of held-out phrases, by known and by new voices.

    Args:
        count: clips per part.
        data: folder with the folders "held_out" and "new_voice" of `mmdlm.data.speech.make`; None:
            synthesise new clips, which needs the extra `speech`.
        seed: seed of the new clips; training uses 0.
    """
    if data is not None:
        sets = {split: speech.Speech(Path(data) / split) for split in SPLITS}
        return {s: drawn(clips, min(count, len(clips))) for s, clips in sets.items()}
    with TemporaryDirectory(prefix="mmdlm-speech-") as folder:
        made = {s: speech.make(Path(folder) / s, count, s, seed) for s in SPLITS}
        return {s: drawn(speech.Speech(root), count) for s, root in made.items()}


def words_wrong(
    model: MultimodalDLM,
    parts: dict[str, list[Example]],
    decodings: str,
    name: str = "",
    batch: int = 32,
) -> list[Score]:
    """Word error rate and share of exact phrases, for every part and decoding.

    Args:
        model: the model.
        parts: samples by the name of their part.
        decodings: see `mmdlm.benchmarks.answers.ways`.
        name: name of the checkpoint in the report.
        batch: samples decoded together.
    """
    try:
        import jiwer
    except ImportError as error:
        raise ImportError('word error rates need the extra: pip install "mmdlm[eval]"') from error
    scores = []
    for way, strategies in ways(model, "transcribe", decodings).items():
        for part, samples in parts.items():
            found = answer(model, samples, strategies, batch)
            references = [turn.answer for sample in samples for turn in sample.turns]
            right = sum(hits(model, samples, found))
            whole = score("speech", part, name, way, "exact", right, found, batch)
            wrong = float(jiwer.wer(references, found.texts))
            scores.append(replace(whole, metric="WER", value=wrong, low=None, high=None))
            scores.append(whole)
    return scores
