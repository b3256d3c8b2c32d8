import sys

import pytest
import torch

from tests.speed.worker import Worker, measured


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_what_was_held_at_once():
    kept = torch.ones(2**20)  # 4 MB from before are not counted

    def run():
        a = torch.ones(25 * 2**18)  # 26 MB
        del a
        return (torch.ones(5 * 2**18) + kept[0]).sum()

    for _ in range(2):  # freed memory of the first run does not hide the second one's
        _, cost = measured(run, torch.device("cpu"))
        # The rest of the test process breathes a little; all it holds would be hundreds of MB.
        assert 25 < cost["peak_extra_mb"] < 60
    assert cost["seconds"] > 0
    assert cost["cpu_seconds"] > 0


def test_a_failing_worker_says_why():
    with Worker("ours", 1) as one:
        with pytest.raises(RuntimeError, match="ours: ValueError: there is no shape 'none'"):
            one.ask(
                **{"do": "decode", "system": "mmdlm", "shape": "none", "mode": "none"},
                **{"device": "cpu", "dtype": "float32", "seed": 0},
            )
        one.process.kill()
        with pytest.raises(RuntimeError, match="process of ours ended with status -9"):
            one.ask(do="rates", device="cpu", dtype="float32")
