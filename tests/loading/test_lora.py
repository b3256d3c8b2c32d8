"""LoRA adapters of peft, for published layouts and our own, merged when a model is loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mmdlm
from mmdlm.export import export
from mmdlm.loading.shards import SINGLE
from mmdlm.text import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "backbones"
FAMILIES = sorted(folder.name for folder in GOLDEN.iterdir())
EMBEDDINGS = ("wte.weight", "embed_tokens.weight", "word_embeddings.weight")
TOKENS = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10]])
RANK, ALPHA = 3, 6.0


def weights(folder):
    found = {}
    for file in sorted(folder.glob("model*.safetensors")):
        found |= load_file(file)
    return found


def targets(folder):
    """Published names of the linear layers of a checkpoint."""
    found = weights(folder)
    return [n for n, w in found.items() if w.ndim == 2 and not n.endswith(EMBEDDINGS)]


def put(folder, tensors, **settings):
    """Writes an adapter folder as peft does."""
    folder.mkdir(exist_ok=True)
    usual = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "init_lora_weights": True}
    (folder / "adapter_config.json").write_text(json.dumps(usual | settings))
    named = {f"base_model.model.{name}": t.contiguous() for name, t in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    return folder


def pair(name, shape, rank=RANK):
    """Random matrices of one linear layer, by peft's names."""
    module = name.removesuffix(".weight")
    return {
        f"{module}.lora_A.weight": torch.randn(rank, shape[1]) * 0.1,
        f"{module}.lora_B.weight": torch.randn(shape[0], rank) * 0.1,
    }


def adapter(folder, source, **settings):
    """An adapter of every linear layer of a published checkpoint, and the merged weights."""
    merged, tensors = weights(source), {}
    for name in targets(source):
        tensors |= pair(name, merged[name].shape)
        module = name.removesuffix(".weight")
        a, b = (tensors[f"{module}.lora_{letter}.weight"] for letter in "AB")
        scale = ALPHA / RANK**0.5 if settings.get("use_rslora") else ALPHA / RANK
        new = merged[name].float() + scale * b @ a
        if settings.get("use_dora"):
            lengths = torch.rand(len(new)) + 0.5
            tensors[f"{module}.lora_magnitude_vector"] = lengths
            new = new * (lengths / new.norm(dim=1))[:, None]
        merged[name] = new.to(merged[name].dtype)
    return put(folder, tensors, **settings), merged


def whole(folder, source, merged):
    """The source with other weights in one file."""
    shutil.copytree(source, folder)
    for file in (*folder.glob("model-*.safetensors"), *folder.glob("*.index.json")):
        file.unlink()
    save_file({n: w.contiguous() for n, w in merged.items()}, folder / SINGLE)
    return folder


def logits(source, **options):
    with torch.no_grad():
        return mmdlm.load(source, device="cpu", **options).logits(TOKENS)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *((family, {}) for family in FAMILIES),
        ("llada", {"use_dora": True}),
        ("sdar", {"use_rslora": True}),
    ],
)
def test_an_adapter_of_a_published_layout_equals_its_merged_weights(family, settings, tmp_path):
    source = GOLDEN / family
    made, merged = adapter(tmp_path / "adapter", source, **settings)
    want = logits(whole(tmp_path / "whole", source, merged))
    got = logits(source, adapter=made)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert (got - logits(source)).abs().max() > 1e-3


def test_published_names_also_fit_our_own_layout(tmp_path):
    export(GOLDEN / "llada", tmp_path / "own")
    made, _ = adapter(tmp_path / "adapter", GOLDEN / "llada")
    want = logits(GOLDEN / "llada", adapter=made)
    assert torch.equal(logits(tmp_path / "own", adapter=made), want)


def test_an_adapter_made_by_peft_for_transformers_loads(tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    theirs = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, eos_token_id=2, pad_token_id=2))
    theirs.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=4,
        target_modules="all-linear",
        rank_pattern={"v_proj": 2},
        alpha_pattern={r"layers\.1\.mlp\.\w+": 32},
        modules_to_save=["lm_head"],
        init_lora_weights=False,
    )
    tuned = peft.get_peft_model(theirs, config)
    tuned.base_model.model.lm_head.modules_to_save["default"].weight.data.normal_(std=0.1)
    tuned.save_pretrained(tmp_path / "adapter")
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    options = {"family": "a2d", "mask_id": 3}
    got = logits(tmp_path / "base", adapter=tmp_path / "adapter", **options)
    torch.testing.assert_close(got, logits(tmp_path / "merged", **options), rtol=1e-5, atol=1e-5)


def test_low_rank_embeddings_are_merged(tmp_path):
    table = weights(GOLDEN / "llada")["model.transformer.wte.weight"]
    a, b = torch.randn(RANK, len(table)), torch.randn(table.shape[1], RANK)
    module = "model.transformer.wte"
    tensors = {f"{module}.lora_embedding_A": a, f"{module}.lora_embedding_B": b}
    made = put(tmp_path / "adapter", tensors)
    found = mmdlm.load(GOLDEN / "llada", device="cpu", adapter=made).backbone.embed.weight
    torch.testing.assert_close(found, table.float() + ALPHA / RANK * (b @ a).T)


def test_quantized_weights_are_quantized_after_the_merge(tmp_path):
    pytest.importorskip("torchao")
    made, merged = adapter(tmp_path / "adapter", GOLDEN / "dream")
    want = logits(whole(tmp_path / "whole", GOLDEN / "dream", merged), quantize="int8")
    got = logits(GOLDEN / "dream", adapter=made, quantize="int8")
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


QUERY = "model.transformer.blocks.0.q_proj.weight"


def damaged(kind):
    """Tensors and settings of an adapter that does not fit."""
    shape = weights(GOLDEN / "llada")[QUERY].shape
    module = QUERY.removesuffix(".weight")
    tensors, settings = pair(QUERY, shape), {}
    if kind == "rank":
        settings = {"r": 8}
    elif kind == "ranks":
        tensors[f"{module}.lora_B.weight"] = torch.zeros(shape[0], RANK + 1)
    elif kind == "inputs":
        tensors[f"{module}.lora_A.weight"] = torch.zeros(RANK, shape[1] + 1)
    elif kind == "outputs":
        tensors[f"{module}.lora_B.weight"] = torch.zeros(shape[0] + 1, RANK)
    elif kind == "half":
        del tensors[f"{module}.lora_B.weight"]
    elif kind == "name":
        tensors = pair("model.layers.0.self_attn.q_proj.weight", shape)
    elif kind == "whole":
        tensors["model.transformer.ln_f.weight"] = torch.zeros(3)
    elif kind == "magnitude":
        settings = {"use_dora": True}
    elif kind == "transposed":
        settings = {"fan_in_fan_out": True}
    elif kind == "pissa":
        settings = {"init_lora_weights": "pissa"}
    elif kind == "method":
        settings = {"peft_type": "IA3"}
    elif kind == "indices":
        rows = torch.zeros(2, shape[1])
        tensors["model.transformer.wte.token_adapter.trainable_tokens_delta"] = rows
    elif kind == "rows":
        tensors["model.transformer.wte.token_adapter.trainable_tokens_delta"] = torch.zeros(
            1, shape[1]
        )
        settings = {"trainable_token_indices": [10**6]}
    elif kind == "zero":
        tensors, settings = pair(QUERY, shape, 0), {"r": 0}
    elif kind == "alpha":
        settings = {"lora_alpha": float("nan")}
    elif kind == "absent":
        settings = {"lora_alpha": None}
    elif kind == "pattern":
        settings = {"rank_pattern": {"(": 3}}
    return tensors, settings


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("rank", r"blocks\.0\.q_proj: lora_A has rank 3 and lora_B 3, adapter_config.json says 8"),
        ("ranks", r"blocks\.0\.q_proj: lora_A has rank 3 and lora_B 4"),
        ("inputs", r"blocks\.0\.q_proj\.lora_A is \[3, .*expected \[3, .*of another model"),
        ("outputs", r"blocks\.0\.q_proj\.lora_B is \[.*expected \[.*of another model"),
        ("half", r"blocks\.0\.q_proj has a only, expected lora_A and lora_B"),
        ("name", r"layers\.0\.self_attn\.q_proj\.weight is not a tensor of this model"),
        ("whole", r"ln_f\.weight is \[3\], expected \["),
        ("magnitude", r"q_proj has no lora_magnitude_vector, but use_dora is True"),
        ("transposed", r"fan_in_fan_out=True, expected False"),
        ("pissa", r"init_lora_weights='pissa'.*changes the base weights"),
        ("method", r"peft_type='IA3', expected 'LORA'"),
        ("indices", r"trainable_token_indices is None for model\.transformer\.wte"),
        ("rows", r"it has 1000001 tokens and the model \d+, but it lacks row \d+ of"),
        ("zero", r"blocks\.0\.q_proj: lora_alpha is 6\.0 and the rank 0"),
        ("alpha", r"blocks\.0\.q_proj: lora_alpha is nan"),
        ("absent", r"blocks\.0\.q_proj: lora_alpha is None"),
        ("pattern", r"'\(' is not a valid regular expression"),
    ],
)
def test_an_adapter_that_does_not_fit_is_named(kind, message, tmp_path):
    tensors, settings = damaged(kind)
    made = put(tmp_path / "adapter", tensors, **settings)
    with pytest.raises(ValueError, match=message):
        mmdlm.load(GOLDEN / "llada", device="cpu", adapter=made)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    made, _ = adapter(tmp_path / "adapter", GOLDEN / "llada")
    source = shutil.copytree(GOLDEN / "llada", tmp_path / "llada")
    Tokenizer.from_words(["a", "b"]).save(source)
    Tokenizer.from_words(["0", "a", "b"]).save(made)
    with pytest.raises(ValueError, match=r"token '[ab]' has id \d in the adapter's tokenizer and"):
        mmdlm.load(source, device="cpu", adapter=made)
    Tokenizer.from_words(["a", "b", *(f"w{i}" for i in range(500))]).save(made)
    with pytest.raises(ValueError, match=r"tokenizer has 505 tokens, but the embedding has"):
        mmdlm.load(source, device="cpu", adapter=made)
    Tokenizer.from_words(["a", "b", "c"]).save(made)
    assert mmdlm.load(source, device="cpu", adapter=made).tokenizer.id("c") == 5


def test_what_is_not_an_adapter_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds a whole model, not an adapter"):
        mmdlm.load(GOLDEN / "llada", adapter=GOLDEN / "llada")
    made, _ = adapter(tmp_path / "adapter", GOLDEN / "llada", base_model_name_or_path="me/base")
    with pytest.raises(FileNotFoundError, match=r"LoRA adapter of 'me/base', not a model"):
        mmdlm.load(made)
    (made / "adapter_model.safetensors").rename(made / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.bin, a pickle"):
        mmdlm.load(GOLDEN / "llada", adapter=made)


def test_a_cut_file_is_an_error(tmp_path):
    made, _ = adapter(tmp_path / "adapter", GOLDEN / "llada")
    file = made / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors.*not a valid safetensors"):
        mmdlm.load(GOLDEN / "llada", adapter=made)
