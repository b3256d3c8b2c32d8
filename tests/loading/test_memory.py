"""Loading gigabytes: memory stays near the size of the model. Run with -m slow -s."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mmdlm.loading.shards import INDEX

ROOT = Path(__file__).parent.parent.parent
WIDTH, INNER, LAYERS, ROWS, SHARDS = 2048, 8192, 16, 32_000, 3
SPACE = 6e9
# VmHWM rather than getrusage: a child's ru_maxrss starts at what its parent had in memory.
MEASURE = """
import json, pathlib, sys, time
import torch
from mmdlm.checkpoint import load

def memory(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

warm, folder, dtype, quantize = sys.argv[1:]
load(warm, device="cpu", quantize=quantize or None)
before, start = memory("VmRSS"), time.perf_counter()
model = load(folder, device="cpu", dtype=dtype, quantize=quantize or None)
seconds = time.perf_counter() - start
peak = memory("VmHWM") - before
first, last = model.backbone.blocks[0].attn_norm.weight, model.backbone.embed.weight
size = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps([peak, size, seconds, float(first[-1]), float(last[-1, -1])]))
"""


def shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of a LLaDA of this size, in the order of their files."""
    block = {
        **{f"{name}.weight": (WIDTH,) for name in ("attn_norm", "ff_norm")},
        **{f"{n}.weight": (WIDTH, WIDTH) for n in ("q_proj", "k_proj", "v_proj", "attn_out")},
        **{f"{n}.weight": (INNER, WIDTH) for n in ("ff_proj", "up_proj")},
        "ff_out.weight": (WIDTH, INNER),
    }
    stem = "model.transformer"
    names = {f"{stem}.blocks.{i}.{n}": s for i in range(LAYERS) for n, s in block.items()}
    ends = {f"{stem}.wte.weight": (ROWS, WIDTH), f"{stem}.ff_out.weight": (ROWS, WIDTH)}
    return dict(sorted((names | ends | {f"{stem}.ln_f.weight": (WIDTH,)}).items()))


@pytest.fixture(scope="module")
def big(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A sharded bfloat16 checkpoint of 2.4 GB, written shard by shard."""
    folder = tmp_path_factory.mktemp("big")
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux: reads peak memory from /proc")
    if shutil.disk_usage(folder).free < SPACE:
        pytest.skip(f"needs {SPACE / 1e9:.0f} GB of disk in {folder}")
    config = json.loads((golden / "backbones" / "llada" / "config.json").read_text())
    sizes = {"d_model": WIDTH, "mlp_hidden_size": INNER, "n_layers": LAYERS, "n_heads": 16}
    ids = {"mask_token_id": 5, "eos_token_id": 1, "pad_token_id": 1}
    sizes |= {"n_kv_heads": 16, "vocab_size": ROWS, "embedding_size": ROWS}
    (folder / "config.json").write_text(json.dumps(config | sizes | ids))
    names = list(shapes())
    where = {}
    for i in range(SHARDS):
        file = f"model-{i + 1:05}-of-{SHARDS:05}.safetensors"
        # Every third tensor: those of one block are spread over all shards.
        data = {
            n: torch.full(shapes()[n], names.index(n) / 8, dtype=torch.bfloat16)
            for n in names[i::SHARDS]
        }
        save_file(data, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(data, file)
        del data
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "quantize"), [("bfloat16", ""), ("float32", ""), ("bfloat16", "int8")]
)
def test_loading_needs_little_more_than_the_model(
    big: Path, golden: Path, dtype: str, quantize: str
) -> None:
    if quantize:
        pytest.importorskip("torchao", reason='needs torchao: pip install "mmdlm[quant]"')
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    warm = golden / "backbones" / "llada"
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(warm), str(big), dtype, quantize],
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    peak, size, seconds, first, last = json.loads(run.stdout.splitlines()[-1])
    shard = max(file.stat().st_size for file in big.glob("*.safetensors"))
    stored = sum(file.stat().st_size for file in big.glob("*.safetensors"))
    print(
        f"{dtype} {quantize}: peak {peak / 1e9:.2f} GB for {size / 1e9:.2f} GB of weights, "
        f"{seconds:.1f} s, {stored / seconds / 1e9:.2f} GB/s"
    )
    if quantize:
        # One byte per weight of the blocks, and one block in full while it is quantized.
        assert peak < 0.8 * size
    else:
        assert peak < 1.2 * (shard + size)
        assert peak < 1.05 * size  # what it really takes: no shard is held
    names = list(shapes())
    assert first == names.index("model.transformer.blocks.0.attn_norm.weight") / 8
    assert last == names.index("model.transformer.wte.weight") / 8
