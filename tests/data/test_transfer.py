"""A batch is the same after it crossed between processes, in a few tensors."""

import pickle
from dataclasses import dataclass

import torch

from mmdlm.data.transfer import Transfer


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


def test_it_crosses_as_one_tensor_per_dtype():
    _, (_, _, _, *joined) = Transfer(one=parts(), two=parts()).__reduce__()
    kinds = [tensor.dtype for tensor in joined]
    assert len(kinds) == len(set(kinds)) == 5


def test_a_batch_without_tensors_arrives():
    assert Transfer(a=[1, "x"]).copied() == {"a": [1, "x"]}
