import pytest

import mmdlm
from encoders.whisper import WhisperEncoder

pytestmark = pytest.mark.filterwarnings("ignore:.*filled the canvas")


def test_describe_uses_the_checkpoint_defaults(model):
    clip = WhisperEncoder.example(0)
    model.preset["describe"] = {"prompt": "what is it ?", "length": 4, "strategies": []}
    found = mmdlm.describe(model, [clip, clip], details=True)
    assert found[0].text == found[1].text
    assert found[0].text == mmdlm.describe(model, clip)
    assert found[0].forwards == 4
