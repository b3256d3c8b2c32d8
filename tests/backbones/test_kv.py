import pytest
import torch
from torch import Tensor

from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.kv import KV, take
from mmdlm.backbones.transformer import Transformer

TINY = TransformerConfig(vocab=11, width=16, layers=3, heads=4, inner=24, kv_heads=2)


@pytest.fixture
def backbone() -> Transformer:
    backbone = Transformer(TINY)
    backbone.reset(torch.Generator().manual_seed(0))
    return backbone.eval()


def canvas(length: int = 8) -> tuple[Tensor, Tensor]:
    x = torch.randn(2, length, 16, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(length).expand(2, -1)


def test_kv_write_by_slice_equals_write_by_index() -> None:
    keys, values = torch.randn(2, 3, 2, 5), torch.randn(2, 3, 2, 5)
    by_slice, by_index = (KV(2, 2, 3, 6, 5) for _ in range(2))
    by_slice.write(1, keys, values, slice(3, 5))
    by_index.write(1, keys, values, torch.tensor([[3, 4], [3, 4]]))
    for layer in range(2):
        assert torch.equal(by_slice.keys[layer], by_index.keys[layer])
        assert torch.equal(by_slice.values[layer], by_index.values[layer])
    assert torch.equal(by_slice.keys[1][:, :, 3:5], keys)
    assert by_slice.keys[0].abs().sum() == 0


def test_kv_write_by_index_takes_other_rows_per_batch_row() -> None:
    kv = KV(1, 2, 1, 4, 1)
    keys = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[:, None, :, None]
    kv.write(0, keys, keys, torch.tensor([[0, 2], [3, 1]]))
    assert kv.keys[0][:, 0, :, 0].tolist() == [[1, 0, 2, 0], [0, 4, 0, 3]]


def test_kv_returns_only_rows_before_its_end() -> None:
    kv = KV(1, 1, 1, 6, 2)
    kv.end = 4
    keys, values = kv.write(0, torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), slice(2, 4))
    assert keys.shape == values.shape == (1, 1, 4, 2)
    assert keys.untyped_storage().data_ptr() == kv.keys[0].untyped_storage().data_ptr()


def test_kv_shrinks_to_some_rows_of_the_batch() -> None:
    kv = KV(2, 3, 1, 4, 1)
    keys = torch.arange(12.0).view(3, 1, 4, 1)
    kv.write(1, keys, -keys, slice(None))
    kv.keep(torch.tensor([0, 2]))
    assert [k.shape[0] for k in (*kv.keys, *kv.values)] == [2] * 4
    assert torch.equal(kv.keys[1], keys[[0, 2]])
    assert torch.equal(kv.values[1], -keys[[0, 2]])


def test_kv_places_each_layer_on_its_device() -> None:
    kv = KV(2, 1, 1, 4, 1, device=[torch.device("cpu"), torch.device("meta")])
    assert [k.device.type for k in kv.keys] == [v.device.type for v in kv.values] == ["cpu", "meta"]


def test_kv_of_another_type_is_cast_on_write() -> None:
    kv = KV(1, 1, 1, 2, 2, dtype=torch.bfloat16)
    keys, _ = kv.write(0, torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2), slice(0, 1))
    assert keys.dtype == torch.bfloat16


@torch.inference_mode()
def test_recomputing_any_rows_of_an_unchanged_canvas_changes_nothing(
    backbone: Transformer,
) -> None:
    x, positions = canvas()
    kv = backbone.cache(2, 8)
    full = backbone(x, positions)
    torch.testing.assert_close(backbone(x, positions, kv), full)
    for rows in (slice(0, 3), slice(4, 8), slice(7, 8)):
        part = backbone(x[:, rows], positions[:, rows], kv, rows=rows)
        torch.testing.assert_close(part, full[:, rows])
    index = torch.tensor([[0, 5, 6], [2, 3, 7]])
    part = backbone(take(x, index), take(positions, index), kv, rows=index)
    torch.testing.assert_close(part, take(full, index))


@torch.inference_mode()
def test_rows_by_slice_equal_rows_by_index_in_the_transformer(backbone: Transformer) -> None:
    x, positions = canvas()
    changed = x.clone()
    changed[:, 2:5] += 1
    results = []
    for rows in (slice(2, 5), torch.arange(2, 5).expand(2, -1)):
        kv = backbone.cache(2, 8)
        backbone(x, positions, kv)
        results.append(backbone(changed[:, 2:5], positions[:, 2:5], kv, rows=rows))
    assert torch.equal(*results)


@torch.inference_mode()
def test_rows_outside_the_written_ones_stay_stale(backbone: Transformer) -> None:
    x, positions = canvas()
    other = torch.randn(2, 8, 16)
    kv = backbone.cache(2, 8)
    backbone(x, positions, kv)
    before = torch.stack(kv.keys)
    backbone(other[:, 3:6], positions[:, 3:6], kv, rows=slice(3, 6))
    after = torch.stack(kv.keys)
    assert torch.equal(after[:, :, :, :3], before[:, :, :, :3])
    assert torch.equal(after[:, :, :, 6:], before[:, :, :, 6:])
    assert not torch.equal(after[:, :, :, 3:6], before[:, :, :, 3:6])


@torch.inference_mode()
def test_rows_after_the_end_are_not_attended(backbone: Transformer) -> None:
    x, positions = canvas()
    kv = backbone.cache(2, 8)
    kv.end = 5
    short = backbone(x[:, :5], positions[:, :5], kv, rows=slice(0, 5))
    torch.testing.assert_close(short, backbone(x[:, :5], positions[:, :5]))


def test_take_without_rows_returns_everything() -> None:
    x = torch.arange(12).view(2, 6)
    assert take(x, None) is x
    assert take(x, slice(1, 3)).tolist() == [[1, 2], [7, 8]]
    assert take(x, torch.tensor([[5], [0]])).tolist() == [[5], [6]]
    assert take(x[..., None].expand(-1, -1, 3), torch.tensor([[5], [0]])).shape == (2, 1, 3)
