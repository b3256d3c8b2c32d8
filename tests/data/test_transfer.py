"""A batch is the same after it crossed between processes, in a few tensors."""

import pickle
from dataclasses import dataclass

import torch

from mmdlm.data.transfer import INLINE, Transfer


@dataclass
class Part:
    tensors: list
    names: tuple


def parts():
    shared = torch.arange(6).view(2, 3)
    tensors = [shared, torch.rand(4, 5), torch.zeros(0, 7), torch.tensor(3), shared]
    tensors += [torch.rand(8, 2).T, torch.tensor([True, False]), torch.rand(2).double()]
    return Part([*tensors, *torch.arange(40).split(1)], ("a", None, {"b": torch.rand(3).half()}))


def test_an_equal_batch_arrives():
    sent = Transfer(one=parts(), two=parts())
    for found in (sent.copied(), pickle.loads(pickle.dumps(sent))):
        assert type(found) is Transfer
        assert list(found) == ["one", "two"]
        for name, part in sent.items():
            assert len(found[name].tensors) == len(part.tensors)
            for a, b in zip(found[name].tensors, part.tensors, strict=True):
                assert a.dtype == b.dtype
                assert a.shape == b.shape
                assert torch.equal(a, b)
            assert found[name].tensors[0] is found[name].tensors[4]
            assert found[name].names[:2] == ("a", None)
            assert torch.equal(found[name].names[2]["b"], part.names[2]["b"])


def test_it_crosses_as_one_tensor_or_without_any():
    _, (_, _, _, data) = Transfer(one=parts(), two=parts()).__reduce__()
    assert isinstance(data, bytes)
    large = Transfer(one=parts(), two=torch.rand(INLINE))
    _, (_, _, _, data) = large.__reduce__()
    assert data.dtype == torch.uint8
    assert torch.equal(large.copied()["two"], large["two"])
    large.copied()["two"][0] = 2.0
    assert large["two"].max() < 1


def test_received_tensors_can_be_written():
    sent = Transfer(one=parts())
    found = sent.copied()
    found["one"].tensors[0][0, 0] = 7
    assert found["one"].tensors[0][0].tolist() == [7, 1, 2]
    assert int(sent["one"].tensors[0][0, 0]) == 0


def test_a_batch_without_tensors_arrives():
    assert Transfer(a=[1, "x"]).copied() == {"a": [1, "x"]}
