import sys

import pytest
import torch

from tests.speed.worker import Worker, measured


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_excludes_earlier_allocations():
    kept = torch.ones(2**20)  # 4 MB from before are not counted

    def run():
        a = torch.ones(25 * 2**18)  # 26 MB
        del a
        return (torch.ones(5 * 2**18) + kept[0]).sum()

    for _ in range(2):  # memory freed by the first run must not hide that of the second
        _, cost = measured(run, torch.device("cpu"))
        # Other allocations of the test process vary by a few MB; in total it has hundreds of MB.
        assert 25 < cost["peak_extra_mb"] < 60
    assert cost["seconds"] > 0
    assert cost["cpu_seconds"] > 0


def test_error_of_a_worker_is_reported():
    with Worker("ours", 1) as one:
        with pytest.raises(RuntimeError, match="ours: ValueError: there is no shape 'none'"):
            one.request(
                **{"do": "decode", "system": "mmdlm", "shape": "none", "mode": "none"},
                **{"device": "cpu", "dtype": "float32", "seed": 0},
            )
        one.process.kill()
        with pytest.raises(RuntimeError, match="process of ours ended with status -9"):
            one.request(do="rates", device="cpu", dtype="float32")
