import json
import os
import shutil
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mmdlm.data import speech
from mmdlm.data.dataset import Dataset
from mmdlm.data.speech import Speech


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    pytest.importorskip("espeakng_loader", reason='pip install "mmdlm[speech]"')
    root = tmp_path_factory.mktemp("speech")
    return {split: speech.make(root / split, 12, split) for split in speech.SPLITS}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "clips").mkdir()
    rows = []
    for index, text in enumerate(["find two red cubes on the table", "please find two red cubes"]):
        wave = 0.1 * np.sin(np.arange(8000) * (0.1 + index)).astype(np.float32)
        soundfile.write(tmp_path / "clips" / f"{index}.flac", wave, 16_000)
        rows.append({"file_name": f"clips/{index}.flac", "text": text, "voice": "en"})
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def clips(root):
    return [path.read_bytes() for path in sorted((root / "clips").iterdir())]


def lines(root):
    return [json.loads(line) for line in (root / "metadata.jsonl").read_text().splitlines()]


def test_every_word_belongs_to_one_slot():
    slots = [word for slot in speech.GRAMMAR for word in slot if word]
    assert len(slots) == len(set(slots))
    assert speech.words() == sorted({*slots, "transcribe", "the", "speech"})
    assert len(speech.GRAMMAR) <= speech.CANVAS


def test_phrases_are_read_slot_by_slot():
    rng = np.random.default_rng(0)
    lengths = set()
    for _ in range(200):
        words = speech.draw_phrase(rng).split()
        lengths.add(len(words))
        words = words if words[0] == "please" else ["", *words]
        words = words if len(words) == 9 else [*words, ""]
        assert all(word in slot for word, slot in zip(words, speech.GRAMMAR, strict=True))
    assert lengths == {7, 8, 9}


def test_held_out_phrases_are_not_in_training_even_with_optional_words():
    rng = np.random.default_rng(0)
    for _ in range(50):
        kept = speech.draw_phrase(rng, held_out=True)
        assert speech.is_held_out(kept)
        assert not speech.is_held_out(speech.draw_phrase(rng))
        core = " ".join(w for w in kept.split() if w not in speech.GRAMMAR[-1] + ("please",))
        assert zlib.crc32(core.encode()) % 10 == 0
        assert speech.is_held_out(core)
        assert speech.is_held_out(f"please {core} again")


def test_new_voices_are_not_training_voices():
    assert not set(speech.NEW_VOICES) & set(speech.VOICES)


@pytest.mark.parametrize("kind", speech.NOISES)
def test_noise_is_added_at_the_given_level(kind):
    rng = np.random.default_rng(0)
    tone = np.sin(np.arange(16_000) * 0.3).astype(np.float32)
    rest = speech.add_noise(tone, kind, 20.0, rng) - tone
    assert 10 * np.log10(np.mean(tone**2) / np.mean(rest**2)) == pytest.approx(20, abs=0.01)


def test_pink_noise_and_hum_are_low():
    rng = np.random.default_rng(0)
    low = {}
    for kind in speech.NOISES:
        power = np.abs(np.fft.rfft(speech.noise(kind, 16_000, rng))) ** 2
        low[kind] = power[:400].sum() / power.sum()
    assert low["white"] < 0.1 < low["pink"] < low["hum"]
    with pytest.raises(ValueError, match="'brown'.*white"):
        speech.noise("brown", 10, rng)


def test_made_clips_are_audible_short_and_described(made):
    for split, root in made.items():
        rows = lines(root)
        assert len(rows) == 12
        for row in rows:
            clip, rate = soundfile.read(root / row["file_name"])
            assert rate == 16_000
            assert clip.ndim == 1
            assert 1.0 < len(clip) / rate == row["seconds"] <= speech.MAX_SECONDS
            assert 0.14 < np.abs(clip).max() <= 0.91
            assert row["voice"] in speech.SPLITS[split]
            assert speech.is_held_out(row["text"]) == (split != "train")
            assert row["snr"] is None or 10 <= row["snr"] <= 40


def test_make_resumes_and_equals_an_uninterrupted_run(made, tmp_path):
    speech.make(tmp_path, 3)
    first = (tmp_path / "clips" / "000000.flac").stat().st_mtime_ns
    table = tmp_path / "metadata.jsonl"
    table.write_text(table.read_text() + '{"file_name": "clips/0000')  # stopped while writing
    speech.make(tmp_path, 5)
    assert (tmp_path / "clips" / "000000.flac").stat().st_mtime_ns == first
    assert lines(tmp_path) == lines(made["train"])[:5]
    assert clips(tmp_path) == clips(made["train"])[:5]
    with pytest.raises(ValueError, match="another split or seed"):
        speech.make(tmp_path, 6, "held_out")
    with pytest.raises(ValueError, match="another split or seed"):
        speech.make(tmp_path, 6, seed=1)
    with pytest.raises(ValueError, match="'test'.*held_out"):
        speech.make(tmp_path, 6, "test")


def test_clips_do_not_depend_on_the_process_or_what_it_said_before(made, tmp_path):
    code = (
        "import sys\nfrom mmdlm.data import speech\n"
        "for voice in reversed(speech.VOICES): speech.espeak().speak('ten', voice)\n"
        "for split in ('new_voice', 'train'): speech.make(f'{sys.argv[1]}/{split}', 12, split)"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "2"}
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        check=True,
        env=env,
        cwd=Path(speech.__file__).parents[2],
    )
    voices = set()
    for split in ("new_voice", "train"):
        assert clips(tmp_path / split) == clips(made[split])
        assert lines(tmp_path / split) == lines(made[split])
        voices |= {row["voice"] for row in lines(made[split])}
    assert len(voices) > 5


def test_every_voice_says_the_same_twice(made):
    del made  # only to skip without espeak-ng
    for voice in (*speech.VOICES, *speech.NEW_VOICES):
        first, again = (speech.espeak().speak("seven yellow lemons", voice) for _ in range(2))
        assert np.array_equal(first, again), voice


def test_threads_may_speak_at_once(made):
    del made
    voices = (*speech.VOICES, *speech.NEW_VOICES)
    alone = [speech.espeak().speak("ten", voice) for voice in voices]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda voice: speech.espeak().speak("ten", voice), voices))
    assert all(np.array_equal(*pair) for pair in zip(alone, together, strict=True))


def test_synthesiser_follows_its_arguments(made):
    del made  # only to skip without espeak-ng
    voice = speech.espeak()
    slow, fast = (voice.speak("seven yellow lemons", rate=rate).size for rate in (120, 240))
    assert slow > 1.5 * fast
    male, female = (voice.speak("seven", name) for name in ("en-us+m3", "en-us+f2"))
    assert male.dtype == np.float32
    assert 0.1 < np.abs(female).max() <= 1
    assert male.shape != female.shape or not np.allclose(male, female)
    for name in ("en-us+nobody", "atlantis"):
        with pytest.raises(ValueError, match=f"no voice '{name}'".replace("+", r"\+")):
            voice.speak("seven", name)
    with pytest.raises(ValueError, match="no sound for"):
        voice.speak("")
    with pytest.raises(ValueError, match="rate is 20"):
        voice.speak("seven", rate=20)


def test_synthesiser_starts_from_a_deep_folder(tmp_path):
    loader = pytest.importorskip("espeakng_loader", reason='pip install "mmdlm[speech]"')
    deep = tmp_path / ("deep" * 30) / ("deeper" * 20) / "espeak-ng-data"
    shutil.copytree(loader.get_data_path(), deep)
    code = (  # a separate process: the state of the library is global
        "import espeakng_loader\nfrom mmdlm.data import speech\n"
        f"espeakng_loader.get_data_path = lambda: {str(deep)!r}\n"
        "assert speech.espeak().speak('seven').size > 2000"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(speech.__file__).parents[2])


def test_all_voices_exist(made):
    del made
    for name in speech.VOICES + speech.NEW_VOICES:
        assert speech.espeak().speak("ten", name).size > 2000


def test_dataset_gives_audio_and_its_words(folder):
    data, rng = Speech(folder), np.random.default_rng(0)
    assert len(data) == 2
    sample = data.sample(0, rng)
    audio, rate = sample.media("audio")[0]
    assert (audio.dtype, audio.shape, rate) == (np.float32, (8000,), 16_000)
    assert np.abs(audio).max() == pytest.approx(0.1, abs=1e-3)
    (turn,) = sample.turns
    assert turn.prompt == "transcribe the speech"
    assert turn.answer == "find two red cubes on the table"
    assert turn.length == 12
    assert sample.group == "en"


@pytest.mark.parametrize("cache", [True, False])
def test_samples_depend_only_on_index_and_generator(folder, cache):
    data = Speech(folder, augment=True, cache=cache)
    plain = Speech(folder).sample(1, np.random.default_rng(0)).media("audio")[0][0]
    draws = [data.sample(1, np.random.default_rng(seed)).media("audio")[0][0] for seed in (3, 3, 4)]
    assert np.array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])
    for draw in draws:
        assert draw.dtype == np.float32
        assert 8000 <= len(draw) < 8000 + 1600
        assert np.corrcoef(draw[len(draw) - 8000 :], plain)[0, 1] > 0.9


def test_vocabulary_covers_prompts_and_answers(folder):
    data = Speech(folder)
    assert data.vocabulary() == speech.words()
    assert data.texts(0) == Dataset.texts(data, 0)
    table = folder / "metadata.jsonl"
    table.write_text(table.read_text().replace("cubes", "zebras"))
    assert " ".join(Speech(folder).vocabulary()) == (
        "find on please red speech table the transcribe two zebras"
    )


def test_error_names_missing_folders_and_clips(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="write it with"):
        Speech(tmp_path / "nowhere")
    (folder / "clips" / "1.flac").unlink()
    with pytest.raises(FileNotFoundError, match="1.flac is listed in metadata.jsonl"):
        Speech(folder).sample(1, np.random.default_rng(0))
