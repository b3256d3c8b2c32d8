"""`mmdlm demo`: one of everything the bundled model does, offline, with files to look at."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import soundfile
from PIL import Image
from rich.markup import escape
from rich.table import Table

from mmdlm.benchmarks.answers import OWN, ways
from mmdlm.benchmarks.report import terminal
from mmdlm.checkpoint import load
from mmdlm.data import scenes
from mmdlm.decoding.strategy import Strategy
from mmdlm.messages import Turn
from mmdlm.model import MultimodalDLM
from mmdlm.simulators.rollout import evaluate, save_video, simulators
from mmdlm.simulators.simulator import GL_PACKAGES, choose_gl
from mmdlm.tasks.act import Policy
from mmdlm.tasks.answer import answer
from mmdlm.tasks.caption import caption
from mmdlm.tasks.generate import Answer
from mmdlm.tasks.trace import draw_trace
from mmdlm.tasks.transcribe import transcribe

FAVOURITE = "metaworld/drawer-close"


@dataclass
class Part:
    """One line of the summary.

    Args:
        name: what was done.
        said: the model's answer, or why there is none.
        right: what is true, where it is known.
        files: written for it.
        seconds: wall time, everything included.
        forwards: of the backbone for the answer.
    """

    name: str
    said: str = ""
    right: str = ""
    files: list[Path] = field(default_factory=list)
    seconds: float = 0.0
    forwards: int = 0


def demo(out: Path = Path("demo_out"), model: str = "tiny", seed: int = 12345) -> int:
    """Captions, answers, reads a digit, transcribes and drives a robot, and says what it wrote.

    Everything happens on this machine, without a network. A part whose optional package or
    graphics library is missing says so in one line and the others go on.

    Args:
        out: folder for the pictures, sound and video.
        model: bundled name, folder or hub id.
        seed: of the picture, the phrase and the questions; the bundled model trained on 0.
    Returns:
        0.
    """
    console, begin = terminal(), time.perf_counter()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    loaded = load(model, device="cpu")
    size = sum(p.numel() for p in loaded.parameters()) / 1e6
    ready = time.perf_counter() - begin
    console.print(f"{model}: {size:.1f} million parameters, ready in {ready:.1f} s", markup=False)
    parts: list[Part] = []
    for make in (_picture, _digit, _speech, _robot):
        for part in _tried(make, loaded, out, seed):
            parts.append(part)
            true = f"   (true: {part.right})" if part.right else ""
            console.print(f"{part.name}: {part.said}{true}", markup=False, soft_wrap=True)
    sheet = _sheet(parts, out)
    console.print(_summary(parts, out))
    console.print(f"all on one page: {sheet}", markup=False)
    console.print(f"{time.perf_counter() - begin:.1f} s in all; files in {out}/", markup=False)
    return 0


def _tried(make: Callable[..., list[Part]], *given: MultimodalDLM | Path | int) -> list[Part]:
    """The parts of one function, or the line that says what to install."""
    try:
        return make(*given)
    except ImportError as error:
        return [Part(make.__name__.strip("_"), f"left out: {error}")]


def _part(name: str, model: MultimodalDLM, found: Answer, truth: str, begin: float) -> Part:
    right = model.tokenizer.decode(model.tokenizer.encode(truth))  # punctuation set as in answers
    return Part(name, found.text, right, [], time.perf_counter() - begin, found.forwards)


def _picture(model: MultimodalDLM, out: Path, seed: int) -> list[Part]:
    """A caption with the order its words came in, and two questions."""
    scene = scenes.Scenes(objects=(2,), seed=seed, count=1).scene(0)
    pixels = scenes.draw(scene)
    Image.fromarray(pixels).save(out / "picture.png")
    begin = time.perf_counter()
    found = caption(
        model,
        pixels,
        prompt=scenes.CAPTION_PROMPT,
        length=scenes.CAPTION_LENGTH,
        strategies=_own(model, "caption"),
        details=True,
    )
    parts = [_part("caption", model, found, scenes.describe(scene), begin)]
    title = f"{scenes.CAPTION_PROMPT}: {found.text}"
    parts[0].files.append(out / "picture.png")
    for name in ("caption.png", "caption.gif"):
        drawn = draw_trace(found, out / name, image=Image.fromarray(pixels), title=title)
        parts[0].files.append(drawn)
    for turn in scenes.questions(scene, np.random.default_rng(seed), 2):
        parts.append(_asked(turn.prompt, model, turn, pixels))
    return parts


def _asked(name: str, model: MultimodalDLM, turn: Turn, pixels: np.ndarray) -> Part:
    """The answer to a question about a picture."""
    begin, own = time.perf_counter(), _own(model, "answer")
    given = {"prompt": "{question}", "length": turn.length, "strategies": own, "details": True}
    found = answer(model, turn.prompt, pixels, **given)
    return _part(name, model, found, turn.answer, begin)


def _own(model: MultimodalDLM, task: str) -> list[Strategy]:
    return next(iter(ways(model, task, OWN).values()))


def _digit(model: MultimodalDLM, out: Path, seed: int) -> list[Part]:
    """A handwritten digit that training never showed."""
    from mmdlm.data.digits import Digits

    digits = Digits("held_out")
    sample = digits.sample(seed % len(digits), np.random.default_rng(seed))
    [image] = sample.media("image")
    Image.fromarray(image).save(out / "digit.png")
    part = _asked("handwritten digit", model, sample.turns[0], image)
    part.files.append(out / "digit.png")
    return [part]


def _speech(model: MultimodalDLM, out: Path, seed: int) -> list[Part]:
    """A spoken phrase that training never had, and its transcript."""
    from mmdlm.data import speech

    begin = time.perf_counter()
    with TemporaryDirectory(prefix="mmdlm-demo-") as folder:
        with redirect_stderr(StringIO()):  # a progress bar for one clip says nothing
            made = speech.make(Path(folder), 1, "held_out", seed)
        clips = speech.Speech(made)
        sample = clips.sample(0, np.random.default_rng(seed))
    [audio] = sample.media("audio")
    soundfile.write(out / "speech.wav", *audio)
    turn = sample.turns[0]
    found = transcribe(
        model,
        audio,
        prompt=turn.prompt,
        length=turn.length,
        strategies=_own(model, "transcribe"),
        details=True,
    )
    (out / "speech.txt").write_text(found.text + "\n", encoding="utf-8")
    part = _part("speech", model, found, turn.answer, begin)
    part.files += [out / "speech.wav", out / "speech.txt"]
    return [part]


def _robot(model: MultimodalDLM, out: Path, seed: int) -> list[Part]:
    """One episode of a robot arm that the model drives, as a video."""
    if model.robot is None:
        return [Part("robot", "left out: this model is not a policy (no statistics.json)")]
    policy = Policy(model)
    names = simulators("trained" if policy.tasks else FAVOURITE, policy)
    name = FAVOURITE if FAVOURITE in names else names[0]
    if name.startswith("metaworld") and choose_gl() is None:
        return [Part("robot", f"left out: nothing draws the simulator here; {GL_PACKAGES}")]
    begin = time.perf_counter()
    # The goal moves with the seed; demonstrations started at seed 1000.
    result = evaluate(policy, name, [seed % 1000], min(4, policy.execute), filmed=1, progress=False)
    episode = result.episodes[0]
    file = save_video(result, out)
    end = "reached the goal" if episode.success else "did not reach the goal"
    said = f"{name}, {result.settings['instruction']!r}: {end} after {episode.steps} steps"
    spent = time.perf_counter() - begin
    return [Part("robot", said, files=[file], seconds=spent, forwards=episode.queries)]


def _sheet(parts: list[Part], out: Path) -> Path:
    """One picture of it all: the caption's trace, the transcript, frames of the video."""
    files = [file for part in parts for file in part.files]
    strips = [Image.open(file) for file in files if file.name == "caption.png"]
    for part in parts:
        if part.name == "speech" and part.files:
            strips.append(_line(f"transcribe the speech: {part.said}"))
    for file in files:
        if file.suffix == ".mp4":
            strips.append(_frames(file))
    width = max(strip.width for strip in strips)
    page = Image.new("RGB", (width, sum(strip.height for strip in strips)), "white")
    top = 0
    for strip in strips:
        page.paste(strip, (0, top))
        top += strip.height
    page.save(out / "journeys.png")
    return out / "journeys.png"


def _line(text: str) -> Image.Image:
    from PIL import ImageDraw, ImageFont

    strip = Image.new("RGB", (16 + 8 * len(text), 44), "white")
    ImageDraw.Draw(strip).text((16, 12), text, "black", ImageFont.load_default(15))
    return strip


def _frames(film: Path, count: int = 4, width: int = 190) -> Image.Image:
    """Evenly spaced frames of a video side by side."""
    import imageio_ffmpeg

    reader = imageio_ffmpeg.read_frames(str(film))
    columns, rows = next(reader)["size"]
    frames = [np.frombuffer(raw, np.uint8).reshape(rows, columns, 3) for raw in reader]
    chosen = [frames[i] for i in np.linspace(0, len(frames) - 1, count).round().astype(int)]
    height = width * rows // columns
    strip = Image.new("RGB", (count * width, height), "white")
    for i, frame in enumerate(chosen):
        strip.paste(Image.fromarray(frame).resize((width, height)), (i * width, 0))
    return strip


def _summary(parts: list[Part], out: Path) -> Table:
    table = Table(title="What was done", title_justify="left")
    for column in ("part", "result", "forwards", "seconds", "files"):
        justify = "right" if column in ("forwards", "seconds") else "left"
        table.add_column(column, justify=justify, overflow="fold")
    for part in parts:
        state = "" if not part.right else "right" if part.said == part.right else "wrong"
        state = state or ("left out" if part.said.startswith("left out") else "done")
        files = ", ".join(str(file.relative_to(out)) for file in part.files)
        forwards = str(part.forwards) if part.forwards else ""
        table.add_row(escape(part.name), state, forwards, f"{part.seconds:.2f}", escape(files))
    return table
