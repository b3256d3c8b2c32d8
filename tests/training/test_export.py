"""Export of a trained checkpoint to a folder, and its weights as the start of a new run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import mmdlm
from adapters.mlp import MLP
from encoders.vit import ViT
from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.family import Spec
from mmdlm.checkpoint import save, save_published
from mmdlm.commands.train import run
from mmdlm.data.scenes import CAPTION_LENGTH, CAPTION_PROMPT, Scenes
from mmdlm.export import export
from mmdlm.loading import ckpt
from mmdlm.loading.shards import INDEX, SINGLE
from mmdlm.model import MultimodalDLM
from mmdlm.text import Tokenizer
from mmdlm.training.module import Module

STEPS = [{"class_path": "mmdlm.decoding.commits.top_k.TopK", "init_args": {"steps": 4}}]
GOLDEN = Path(__file__).parent.parent / "golden" / "backbones"
PUBLISHED = sorted(folder.name for folder in GOLDEN.iterdir())
PRESET = {
    "caption": {"prompt": CAPTION_PROMPT, "length": CAPTION_LENGTH, "strategies": STEPS},
}


@pytest.fixture
def seen(monkeypatch):
    """Modules at the start and at the end of every fit, in order."""
    found = []
    monkeypatch.setattr(Module, "on_fit_start", lambda self: found.append(weights(self)))
    monkeypatch.setattr(Module, "on_fit_end", lambda self: found.append(self))
    return found


def weights(module):
    return {name: tensor.clone() for name, tensor in module.model.state_dict().items()}


def fit(config, *options):
    run(["fit", "-c", str(config), "--trainer.max_steps", "2", *options])


@pytest.fixture
def trained(config, seen, tmp_path):
    """The model a fit of two steps ended with, and its checkpoint."""
    fit(config)
    return seen[-1].model.eval(), tmp_path / "ckpt" / "step=2.ckpt"


@pytest.fixture
def decoding(tmp_path):
    file = tmp_path / "decoding.yaml"
    file.write_text(yaml.safe_dump(PRESET))
    return file


def picture():
    return Scenes(seed=9, size=32).sample(0, np.random.default_rng(0)).media("image")[0]


@pytest.mark.filterwarnings("ignore:.*filled the canvas")
def test_exported_folder_equals_the_trained_model(trained, decoding, tmp_path):
    model, checkpoint = trained
    card = tmp_path / "card.md"
    card.write_text("# A test\n")
    returned = export(checkpoint, tmp_path / "out", decoding=decoding, card=card)
    loaded = mmdlm.load(tmp_path / "out", device="cpu")
    assert (tmp_path / "out" / "README.md").read_text() == "# A test\n"
    tokens = torch.tensor([[3, 4, 5, 2, 2]])
    with torch.no_grad():
        want = model.logits(tokens)
        assert torch.equal(loaded.logits(tokens), want)
        assert torch.equal(returned.logits(tokens), want)
    model.preset = PRESET
    answers = [mmdlm.caption(one, picture(), details=True) for one in (model, loaded, returned)]
    assert answers[0].tokens == answers[1].tokens == answers[2].tokens
    assert answers[0].confidence == pytest.approx(answers[1].confidence, abs=1e-6)
    assert loaded.preset == returned.preset == PRESET


def test_bfloat16_halves_the_file(trained, tmp_path):
    model, checkpoint = trained
    export(checkpoint, tmp_path / "full")
    export(checkpoint, tmp_path / "half", dtype="bfloat16")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "half")]
    header = 12_000  # bytes at most, the same in both
    assert abs(sizes[0] - 2 * sizes[1]) < header
    tokens = torch.tensor([[3, 4, 5, 2]])
    loaded = mmdlm.load(tmp_path / "half", device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(loaded.logits(tokens), model.logits(tokens), rtol=0, atol=0.02)


def test_new_run_starts_from_the_weights_of_a_checkpoint(config, trained, seen, tmp_path):
    model, checkpoint = trained
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    again = ("--trainer.callbacks.dirpath", str(tmp_path / "again"), "--model.blueprint.seed", "7")
    fit(config, "--seed_everything", "3", "--model.init", str(checkpoint), *again)
    start, end = seen[-2], seen[-1]
    assert start.keys() == before.keys()
    assert all(torch.equal(start[name], before[name]) for name in before)
    last = torch.load(tmp_path / "again" / "step=2.ckpt", weights_only=True)
    assert last["global_step"] == 2  # a run of its own, which goes on from weights only
    assert any(not torch.equal(w, before[name]) for name, w in weights(end).items())


def test_weights_that_do_not_fit_are_an_error(config, trained, tmp_path):
    _, checkpoint = trained
    with pytest.raises(RuntimeError, match=r"(?s)size mismatch.*backbone"):
        fit(config, "--model.init", str(checkpoint), "--model.blueprint.backbone.width", "16")
    saved = torch.load(checkpoint, weights_only=True)
    del saved["state_dict"]["model.backbone.norm.weight"]
    torch.save(saved, tmp_path / "less.ckpt")
    with pytest.raises(RuntimeError, match=r"Missing key.*backbone\.norm\.weight"):
        fit(config, "--model.init", str(tmp_path / "less.ckpt"))


def write(path, kind):
    """A file that is not a checkpoint of ours."""
    if kind == "text":
        path.write_text("hello world")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "code":
        torch.save({"mmdlm": write}, path)
    else:
        torch.save({"state_dict": {}}, path)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("text", "not a checkpoint of mmdlm fit, or it was cut short"),
        ("empty", "not a checkpoint of mmdlm fit, or it was cut short"),
        ("cut", "not a checkpoint of mmdlm fit, or it was cut short"),
        ("tensor", "holds no 'mmdlm' entry"),
        ("foreign", "holds no 'mmdlm' entry"),
        ("code", "more than tensors and plain types, which is not read"),
    ],
)
def test_files_that_are_not_checkpoints_are_errors(kind, message, tmp_path):
    write(tmp_path / "x.ckpt", kind)
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "x.ckpt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_files_are_named(tmp_path):
    absent, out = tmp_path / "absent.ckpt", tmp_path / "out"
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*absent\.ckpt; see runs"):
        export(absent, out)
    with pytest.raises(FileNotFoundError, match=r"absent\.yaml"):
        export(absent, out, decoding=tmp_path / "absent.yaml")
    with pytest.raises(FileNotFoundError, match=r"absent\.md"):
        export(absent, out, card=tmp_path / "absent.md")
    assert not out.exists()


def test_invalid_decoding_file_is_an_error(decoding, tmp_path):
    decoding.write_text("caption: {prompts: describe the picture}")
    with pytest.raises(
        ValueError, match=r"decoding.yaml: task 'caption' has \['prompts'\]; expected"
    ):
        export(tmp_path / "absent.ckpt", tmp_path / "out", decoding=decoding)


def test_blueprint_is_plain_and_downloads_nothing():
    config = TransformerConfig(vocab=9, width=16, layers=1, heads=2, inner=16)
    spec = Spec("mmdlm", config, mask_id=2, eos_id=1, pad_id=0)
    model = MultimodalDLM(spec, {"image": ViT.tiny()}, {"image": MLP(32, 16)})
    plan = json.loads(json.dumps(ckpt.entry(model)))
    # As if this tower had come with published weights.
    parts = plan["blueprint"]["encoders"]
    parts["image"]["init_args"] |= {"name": "vit_tiny_patch16_224", "pretrained": True}
    again = ckpt.from_entry(plan, "x.ckpt")
    assert again.encoders["image"].arguments["pretrained"] is False
    assert again.spec == model.spec


def test_checkpoints_of_the_first_edition_are_exported(trained, tmp_path):
    model, checkpoint = trained
    model.preset = PRESET
    saved = torch.load(checkpoint, weights_only=True)
    plan = saved["mmdlm"].pop("blueprint")
    parts = {name: plan[name] for name in ("spec", "encoders", "adapters")}
    saved["mmdlm"] |= {**parts, "robot": None, "preset": PRESET}
    torch.save(saved, tmp_path / "first.ckpt")
    again = export(tmp_path / "first.ckpt", tmp_path / "out")
    assert again.preset == PRESET
    tokens = torch.tensor([[3, 4, 5, 2, 2]])
    with torch.no_grad():
        assert torch.equal(again.logits(tokens), model.logits(tokens))
    del saved["mmdlm"]["robot"]
    torch.save(saved, tmp_path / "less.ckpt")
    with pytest.raises(ValueError, match=r"'mmdlm' entry lacks \['robot'\]"):
        export(tmp_path / "less.ckpt", tmp_path / "more")


# From folder to folder


def stored(folder):
    files = folder.glob("model*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def equal(first, second):
    a, b = stored(first), stored(second)
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


def text_model(**spec):
    config = TransformerConfig(vocab=32, width=16, layers=2, heads=2, inner=24)
    model = MultimodalDLM(Spec("mmdlm", config, **{"mask_id": 2, "eos_id": 1, "pad_id": 0} | spec))
    model.backbone.reset()
    return model


@pytest.mark.parametrize("shard_bytes", [5e9, 1e5])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_folder_written_again_is_bit_equal(name, shard_bytes, tmp_path):
    model = export(GOLDEN / name, tmp_path, layout="published", shard_bytes=shard_bytes)
    assert equal(GOLDEN / name, tmp_path)
    assert (tmp_path / INDEX).exists() == (shard_bytes < 5e9)
    assert mmdlm.load(tmp_path, device="cpu").spec == model.spec


@pytest.mark.parametrize("name", PUBLISHED)
def test_our_layout_and_back_is_bit_equal(name, tmp_path):
    first = export(GOLDEN / name, tmp_path / "own")
    assert json.loads((tmp_path / "own" / "config.json").read_text())["format"]
    assert (tmp_path / "own" / "README.md").exists()
    second = export(tmp_path / "own", tmp_path / "back", layout="published")
    assert equal(GOLDEN / name, tmp_path / "back")
    assert first.spec == second.spec == mmdlm.load(tmp_path / "back", device="cpu").spec


def test_stored_type_is_kept_unless_another_is_given(tmp_path):
    source = shutil.copytree(GOLDEN / "dream", tmp_path / "dream")
    save_file({k: v.bfloat16() for k, v in stored(source).items()}, source / SINGLE)
    export(source, tmp_path / "same", layout="published")
    assert equal(source, tmp_path / "same")
    export(source, tmp_path / "wide", layout="published", dtype="float32")
    assert {v.dtype for v in stored(tmp_path / "wide").values()} == {torch.float32}


@pytest.mark.parametrize("layout", ["own", "published"])
def test_files_of_the_tokenizer_are_copied(layout, tmp_path):
    source = shutil.copytree(GOLDEN / "llada", tmp_path / "llada")
    Tokenizer.from_words(["a", "b"]).save(source)
    files = {
        "tokenizer_config.json": '{"model_max_length": 4096}',
        "special_tokens_map.json": '{"pad_token": "<pad>"}',
        "added_tokens.json": "{}",
        "generation_config.json": '{"eos_token_id": 1}',
        "vocab.json": '{"a": 0}',
        "merges.txt": "#version: 0.2\n",
        "chat_template.jinja": "{{ messages[0].content }}",
        "README.md": "# Theirs\n",
    }
    for name, text in files.items():
        (source / name).write_text(text)
    files["tokenizer.json"] = (source / "tokenizer.json").read_text()
    (source / "modeling_llada.py").write_text("raise SystemExit")
    export(source, tmp_path / "out", layout=layout)
    assert {name: (tmp_path / "out" / name).read_text() for name in files} == files
    assert not (tmp_path / "out" / "modeling_llada.py").exists()
    assert (
        mmdlm.load(tmp_path / "out", device="cpu").tokenizer.template
        == files["chat_template.jinja"]
    )


def test_a_given_card_replaces_that_of_the_source(tmp_path):
    (tmp_path / "card.md").write_text("# Mine\n")
    export(GOLDEN / "dream", tmp_path / "out", card=tmp_path / "card.md")
    assert (tmp_path / "out" / "README.md").read_text() == "# Mine\n"


def test_model_without_family_is_written_in_the_given_layout(tmp_path):
    save(text_model(template="llada"), tmp_path / "own")
    with pytest.raises(
        ValueError, match=r"not of a published family \('mmdlm'\); give family=, one of"
    ):
        export(tmp_path / "own", tmp_path / "out", layout="published")
    export(tmp_path / "own", tmp_path / "out", layout="published", family="llada")
    again = mmdlm.load(tmp_path / "out", device="cpu")
    tokens = torch.tensor([[3, 4, 5, 2]])
    with torch.no_grad():
        own = mmdlm.load(tmp_path / "own", device="cpu")
        assert torch.equal(again.logits(tokens), own.logits(tokens))
    with pytest.raises(ValueError, match="takes the chat template 'llada', this model has 'plain'"):
        save_published(text_model(), tmp_path / "other", family="llada")
    assert not (tmp_path / "other").exists()


def test_errors_name_what_the_published_layout_cannot_hold(trained, decoding, tmp_path):
    _, checkpoint = trained
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="llada holds text models only, this one has encoders"):
        export(checkpoint, out, layout="published", family="llada")
    with pytest.raises(ValueError, match="published layout has no decoding.yaml and no README"):
        export(checkpoint, out, layout="published", decoding=decoding)
    with pytest.raises(ValueError, match="family='llada' has no effect"):
        export(checkpoint, out, family="llada")
    with pytest.raises(ValueError, match="layout='hub', expected 'own' or 'published'"):
        export(checkpoint, out, layout="hub")
    assert not out.exists()


def test_folder_is_not_written_over_itself(tmp_path):
    source = shutil.copytree(GOLDEN / "dream", tmp_path / "dream")
    with pytest.raises(ValueError, match="is the checkpoint itself; give another folder"):
        export(source, tmp_path / "." / "dream", layout="published")
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*did you mean dream"):
        export(tmp_path / "draem", tmp_path / "out")
