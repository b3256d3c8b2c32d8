"""Spoken phrases: synthesised with espeak-ng, and read as a dataset.

The phrases follow one sentence pattern, as in the GRID corpus (Cooke et al. 2006, "An audio-visual
corpus for speech perception and automatic speech recognition"). Every slot has a separate word
list, so each slot can be scored alone. Two optional slots give answers of unequal length.

espeak-ng is GPL-3.0 software in the optional package `espeakng_loader`; no part of it is in this
package, and reading existing clips does not need it.
"""

from __future__ import annotations

import _ctypes
import ctypes
import functools
import json
import shutil
import tempfile
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from encoders.torchaudio_loader import import_torchaudio
from mmdlm.data.dataset import Dataset, example
from mmdlm.files import read_lines
from mmdlm.lines import read_records
from mmdlm.media import read_audio
from mmdlm.messages import Example, Turn

if TYPE_CHECKING:
    from torchaudio.transforms import Resample

PROMPT = "transcribe the speech"
RATE = 16_000  # Hz, as in Whisper-like encoders
MAX_SECONDS = 3.2  # of a whole clip, including silence
CANVAS = 12  # tokens of an answer; the longest phrase has nine words

# One tuple per slot; "" omits an optional slot. Words of a slot differ in vowel or length.
GRAMMAR: tuple[tuple[str, ...], ...] = (
    ("", "please"),
    ("bring", "drop", "find", "move", "place", "push", "take", "wash"),
    ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    ("red", "blue", "green", "yellow", "purple", "orange", "white", "black"),
    ("cubes", "bottles", "spoons", "candles", "hammers", "pencils")
    + ("tickets", "lemons", "feathers", "rings", "gloves", "magnets"),
    ("on", "under", "behind", "near", "inside", "above"),
    ("the",),
    ("table", "shelf", "box", "drawer", "window")
    + ("garden", "kitchen", "bridge", "sofa", "mirror"),
    ("", "now", "again", "slowly", "quickly"),
)
VOICES = (
    *("en-us", "en-us+m1", "en-us+m3", "en-us+f2", "en-us+f5"),
    *("en", "en+m6", "en+f3", "en-gb-scotland+m2", "en-gb-x-gbclan+f1"),
)
NEW_VOICES = ("en-us+f4", "en-gb-x-rp+m5")  # not in training
SPLITS = {"train": VOICES, "held_out": VOICES, "new_voice": NEW_VOICES}
NOISES = ("white", "pink", "hum")


_COLLECT = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


class Espeak:
    """The espeak-ng synthesiser; use `espeak()`.

    The library has noise generators and phases that go on from one text to the next. It is
    therefore loaded afresh for every text, so that a clip depends on its own arguments only.
    """

    rate = 22_050  # Hz, fixed by the voice data

    def __init__(self) -> None:
        loader = _loader()
        data, self._copy = Path(loader.get_data_path()), None
        if len(str(data).encode()) > 120:  # espeak-ng stores this path in a buffer of 160 bytes
            self._copy = tempfile.TemporaryDirectory(prefix="espeak")
            data = Path(shutil.copytree(data, Path(self._copy.name) / "espeak-ng-data"))
        self._data, self._path = data, loader.get_library_path()
        self._lock = threading.Lock()  # the state of the library is global to the process

    @contextmanager
    def _library(self) -> Iterator[ctypes.CDLL]:
        """The library in its initial state, unloaded afterwards."""
        library = ctypes.CDLL(self._path)
        try:
            # 2: synchronous, samples only to the callback; 0x8000: return an error, do not exit().
            started = library.espeak_Initialize(2, 0, str(self._data).encode(), 0x8000)
            if started != self.rate:
                raise RuntimeError(
                    f"espeak-ng did not start with its data at {self._data}; reinstall "
                    "espeakng_loader"
                )
            library.espeak_ng_SetRandSeed(ctypes.c_long(0))  # the time of day otherwise
            yield library
        finally:
            library.espeak_Terminate()
            _ctypes.dlclose(library._handle)

    def speak(
        self, text: str, voice: str = "en-us", rate: int = 170, pitch: int = 50
    ) -> np.ndarray:
        """Synthesises a text: float32 [T] in [-1, 1] at 22050 Hz.

        Args:
            text: plain words.
            voice: language, "+", variant, for example "en-us+f2".
            rate: words per minute, 80 to 450.
            pitch: 0 to 99.

        Raises:
            ValueError: the voice does not exist, a number is out of range or there is no sound.
        """
        if not (80 <= rate <= 450 and 0 <= pitch <= 99):
            raise ValueError(
                f"espeak: rate is {rate} and pitch {pitch}, expected 80 to 450 and 0 to 99"
            )
        chunks: list[np.ndarray] = []

        @_COLLECT
        def collect(samples: ctypes._Pointer, count: int, events: int) -> int:
            if samples and count > 0:
                chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
            return 0

        data = text.encode()
        with self._lock, self._library() as library:
            library.espeak_SetSynthCallback(collect)
            _set_voice(library, voice)
            library.espeak_SetParameter(1, rate, 0)
            library.espeak_SetParameter(3, pitch, 0)
            failed = library.espeak_Synth(data, len(data) + 1, 0, 1, 0, 1, None, None)  # 1: UTF-8
        if failed or not any(chunk.any() for chunk in chunks):
            raise ValueError(f"espeak: no sound for {text!r} (status {failed})")
        return np.concatenate(chunks).astype(np.float32) / 32768


def _set_voice(library: ctypes.CDLL, voice: str) -> None:
    library.espeak_GetCurrentVoice.restype = ctypes.POINTER(_Voice)
    failed = library.espeak_SetVoiceByName(voice.encode())
    # For an unknown variant espeak-ng uses the plain voice without an error.
    used = (library.espeak_GetCurrentVoice().contents.identifier or b"").decode()
    if failed or used.partition("+")[2] != voice.partition("+")[2]:
        raise ValueError(f"espeak: no voice {voice!r}; known: for example {list(VOICES)}")


class _Voice(ctypes.Structure):
    # First fields of espeak_VOICE in espeak-ng/espeak-ng: src/include/espeak-ng/speak_lib.h.
    _fields_ = [(name, ctypes.c_char_p) for name in ("name", "languages", "identifier")]


def _loader() -> ModuleType:
    try:
        import espeakng_loader
    except ImportError as error:
        raise ImportError(
            'making speech needs espeak-ng: pip install "mmdlm[speech]" (reading clips does not)'
        ) from error
    return espeakng_loader


@functools.cache
def espeak() -> Espeak:
    """The synthesiser of this process."""
    return Espeak()


def words() -> list[str]:
    """Every word of the phrases and the prompt, sorted."""
    return sorted({word for slot in GRAMMAR for word in slot if word} | set(PROMPT.split()))


def is_held_out(phrase: str) -> bool:
    """Whether a phrase is excluded from training, independent of its optional words."""
    optional = {*GRAMMAR[0], *GRAMMAR[-1]}
    core = " ".join(word for word in phrase.split() if word not in optional)
    return zlib.crc32(core.encode()) % 10 == 0


def draw_phrase(rng: np.random.Generator, held_out: bool = False) -> str:
    """Draws a phrase of the grammar from the training or the held-out set."""
    while True:
        phrase = " ".join(filter(None, (str(rng.choice(slot)) for slot in GRAMMAR)))
        if is_held_out(phrase) == held_out:
            return phrase


def noise(kind: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Noise of unit power, float32 [T]: "white", "pink" (1/f) or "hum" (mains, harmonics)."""
    if kind == "hum":
        time = np.arange(size) / RATE
        tones = [
            np.sin(2 * np.pi * (base * k * time + rng.random())) / k
            for base in [rng.choice([50.0, 60.0])]
            for k in range(1, 6)
        ]
        out = np.sum(tones, axis=0)
    elif kind in ("white", "pink"):
        out = rng.standard_normal(size)
        if kind == "pink":
            spectrum = np.fft.rfft(out)
            out = np.fft.irfft(spectrum / np.sqrt(np.arange(1, spectrum.size + 1)), size)
    else:
        raise ValueError(f"noise: kind is {kind!r}, expected one of {list(NOISES)}")
    return (out / np.sqrt(np.mean(out**2) + 1e-12)).astype(np.float32)


def add_noise(audio: np.ndarray, kind: str, snr: float, rng: np.random.Generator) -> np.ndarray:
    """Adds noise `snr` decibels below the mean power of the audio."""
    level = np.sqrt(np.mean(audio**2)) * 10 ** (-snr / 20)
    return audio + np.float32(level) * noise(kind, audio.size, rng)


@dataclass(frozen=True)
class _Recipe:
    """All random choices of one clip, independent of the other clips."""

    text: str
    voice: str
    rate: int
    pitch: int
    noise: str | None
    snr: float | None
    peak: float
    silence: tuple[float, float]


def _recipe(split: str, seed: int, index: int) -> tuple[_Recipe, np.random.Generator]:
    rng = np.random.default_rng([seed, zlib.crc32(split.encode()), index])
    clean = rng.random() < 0.2
    recipe = _Recipe(
        text=draw_phrase(rng, held_out=split != "train"),
        voice=str(rng.choice(SPLITS[split])),
        rate=int(rng.integers(165, 215)),
        pitch=int(rng.integers(30, 71)),
        noise=None if clean else str(rng.choice(NOISES)),
        snr=None if clean else round(float(rng.uniform(10, 40)), 1),
        peak=float(rng.uniform(0.15, 0.9)),
        silence=(float(rng.uniform(0.03, 0.15)), float(rng.uniform(0.03, 0.15))),
    )
    return recipe, rng


def _trimmed(audio: np.ndarray) -> np.ndarray:
    loud = np.flatnonzero(np.abs(audio) > 0.005 * np.abs(audio).max())
    return audio[loud[0] : loud[-1] + 1]


@functools.cache
def _to_16k() -> Resample:
    return import_torchaudio().transforms.Resample(Espeak.rate, RATE)


def _synthesise(recipe: _Recipe, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """One clip, float32 [T] at 16 kHz, and its speaking rate."""
    room, rate = MAX_SECONDS - sum(recipe.silence), recipe.rate
    while True:
        audio = _trimmed(espeak().speak(recipe.text, recipe.voice, rate, recipe.pitch))
        if audio.size <= room * Espeak.rate:
            break
        rate += 10  # too long: increase the rate instead of truncating
    audio = _to_16k()(torch.from_numpy(audio)).numpy()
    audio = np.pad(audio, [int(seconds * RATE) for seconds in recipe.silence])
    if recipe.noise is not None and recipe.snr is not None:
        audio = add_noise(audio, recipe.noise, recipe.snr, rng)
    return audio * np.float32(recipe.peak / np.abs(audio).max()), rate


def make(out: Path, count: int, split: str = "train", seed: int = 0) -> Path:
    """Writes `count` clips (16 kHz FLAC) with their metadata.jsonl and returns the folder.

    A second call resumes. The folder is a Hugging Face audiofolder:
    `datasets.load_dataset("audiofolder", data_dir=out)` reads it.

    Args:
        out: folder to write; existing clips are kept.
        count: total number of clips.
        split: "train"; "held_out", phrases not in training; "new_voice", such phrases by voices not
            in training.
        seed: seed of all choices; clip i depends only on the seed, the split and i.

    Raises:
        ValueError: unknown split, or the folder was started with another split or seed.
    """
    if split not in SPLITS:
        raise ValueError(f"make: split is {split!r}, expected one of {list(SPLITS)}")
    out = Path(out)
    (out / "clips").mkdir(parents=True, exist_ok=True)
    done = [row for _, row in read_records(out / "metadata.jsonl")]
    if done and _recipe(split, seed, len(done) - 1)[0].text != done[-1]["text"]:
        raise ValueError(
            f"make: {out} was started with another split or seed than {split!r}, {seed}; "
            "give the same ones or another folder"
        )
    with (out / "metadata.jsonl").open("a") as table:
        for index in tqdm(
            range(len(done), count), desc=split, initial=len(done), total=count, mininterval=1
        ):
            recipe, rng = _recipe(split, seed, index)
            audio, rate = _synthesise(recipe, rng)
            name = f"clips/{index:06d}.flac"
            soundfile.write(out / name, audio, RATE, subtype="PCM_16")
            row = {"file_name": name, "text": recipe.text, "voice": recipe.voice, "rate": rate}
            row |= {"snr": recipe.snr, "noise": recipe.noise, "seconds": audio.size / RATE}
            table.write(json.dumps(row) + "\n")
            table.flush()
    return out


class Speech(Dataset):
    """Clips with transcripts from a folder written by `make`, or of the same layout.

    Args:
        root: folder with metadata.jsonl; each line has file_name, text and optionally voice.
        augment: random gain, noise (with probability 0.5) and up to 0.1 s of leading silence; for
            training.
        length: canvas of the answer in tokens.
        cache: keep clips that were read in memory as float32 (64 kB per second).
    """

    def __init__(
        self, root: Path, augment: bool = False, length: int = CANVAS, cache: bool = True
    ) -> None:
        self.root, self.augment, self.length = Path(root), augment, length
        table = self.root / "metadata.jsonl"
        if not table.exists():
            raise FileNotFoundError(
                f"Speech: {table} does not exist; write it with mmdlm.data.speech.make(root, count)"
            )
        self.rows = [json.loads(line) for line in read_lines(table)]
        self._cache: dict[int, tuple[np.ndarray, int]] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.rows)

    def _read(self, index: int) -> tuple[np.ndarray, int]:
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        path = self.root / self.rows[index]["file_name"]
        if not path.exists():
            raise FileNotFoundError(
                f"Speech: {path} is listed in metadata.jsonl but does not exist"
            )
        clip, rate = read_audio(path)
        if self._cache is not None:
            self._cache[index] = (clip, rate)
        return clip, rate

    def sample(self, index: int, rng: np.random.Generator) -> Example:
        """The clip at `index` with a turn for its transcript; grouped by voice."""
        row, (audio, rate) = self.rows[index], self._read(index)
        if self.augment:
            audio = np.pad(audio, (int(rng.integers(0, rate // 10)), 0))
            if rng.random() < 0.5:
                audio = add_noise(audio, str(rng.choice(NOISES)), rng.uniform(10, 40), rng)
            audio = np.clip(audio * np.float32(rng.uniform(0.3, 1.5)), -1, 1)
        turn = Turn(PROMPT, row["text"], self.length)
        names, group = tuple(row["text"].split()), row.get("voice", "")
        return example((turn,), group=group, names=names, audio=(audio, rate))

    def texts(self, index: int) -> list[str]:
        """See `Dataset.texts`; no clip is read."""
        return [PROMPT, self.rows[index]["text"]]

    def vocabulary(self) -> list[str]:
        """Every word of the grammar and the prompt, or of the texts if they have other words."""
        used = {word for row in self.rows for word in row["text"].split()} | set(PROMPT.split())
        return words() if used <= set(words()) else sorted(used)
