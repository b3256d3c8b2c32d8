import numpy as np
import pytest
import soundfile

import mmdlm
from encoders.whisper import WhisperEncoder

pytestmark = pytest.mark.filterwarnings("ignore:.*filled the canvas")


@pytest.fixture
def clips():
    return [WhisperEncoder.example(seed) for seed in range(3)]


def test_recordings_of_unequal_length_equal_single_recordings(model, clips):
    assert len({len(samples) for samples, _ in clips}) == 3
    together = mmdlm.transcribe(model, clips)
    assert together == [mmdlm.transcribe(model, clip) for clip in clips]


def test_file_equals_its_samples(model, clips, tmp_path):
    samples, rate = clips[0]
    soundfile.write(tmp_path / "clip.wav", samples, rate, subtype="FLOAT")
    assert mmdlm.transcribe(model, tmp_path / "clip.wav") == mmdlm.transcribe(model, clips[0])


def test_describe_has_a_separate_prompt(model, clips):
    text = mmdlm.describe(model, clips, prompt="what is it ?", length=3)
    assert len(text) == 3
    with pytest.raises(ValueError, match="no default prompt for 'describe'"):
        mmdlm.describe(model, clips)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ((np.zeros(0, np.float32), 16000), "no samples"),
        ((np.full(9000, np.nan, np.float32), 16000), "NaN"),
        ((np.zeros(16000 * 5, np.float32) + 0.1, 16000), "4"),
    ],
)
def test_invalid_recordings_are_rejected(model, item, message):
    with pytest.raises(ValueError, match=message):
        mmdlm.transcribe(model, item)


def test_silence_is_transcribed_with_a_warning(model):
    with pytest.warns(UserWarning, match="silent"):
        assert isinstance(mmdlm.transcribe(model, (np.zeros(8000, np.float32), 16000)), str)
