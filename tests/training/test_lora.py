"""LoRA: what is trained, what is saved, and that merged and unmerged adapters are equal."""

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

import mmdlm
from encoders.encoder import Encoder
from mmdlm import discover
from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.family import Spec
from mmdlm.backbones.moe import MoEConfig
from mmdlm.checkpoint import save
from mmdlm.commands import main as commands
from mmdlm.commands.train import run
from mmdlm.export import export, push
from mmdlm.loading import ckpt
from mmdlm.model import MultimodalDLM
from mmdlm.objectives.masked import Masked
from mmdlm.training import lora
from mmdlm.training.module import Module
from mmdlm.training.new_model import NewModel
from mmdlm.training.tune import Lora, Rate
from mmdlm.training.vocabulary import grow

peft = pytest.importorskip("peft")

CONFIG = Path(__file__).parents[2] / "configs" / "finetune" / "lora.yaml"
ENCODERS = discover.classes("encoders", Encoder)
WORDS = ["zebra", "Lion"]
TOKENS = torch.tensor([[3, 4, 177, 178, 5, 2, 2]])  # the new words among them
ALL = {"*": "frozen", "backbone.*": Rate(lora=Lora(rank=4))}


def module(tune=None, source="tiny", words=WORDS, **options):
    return Module(Masked(), source=str(source), words=words, tune=tune or ALL, **options)


def shaken(made):
    """The module with random numbers added to all that is trained, in eval mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, weight in lora.trainable(made.model):
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    return made.eval()


def logits(model):
    with torch.no_grad():
        return model.logits(TOKENS)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A file of questions with new words, in the working directory."""
    monkeypatch.chdir(tmp_path)
    colors = ["red", "green", "blue"]
    names = ["zebra", "Lion", "ibex", "yak", "moose", "otter"]
    rows = [
        (f"what color is the {n} ?", f"the {n} is {colors[i % 3]}") for i, n in enumerate(names)
    ]
    roles = ("user", "assistant")
    chats = [[{"role": r, "content": c} for r, c in zip(roles, row, strict=True)] for row in rows]
    file = tmp_path / "qa.jsonl"
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return file


def fit(data, steps, *options, source="tiny"):
    given = ("--source", str(source), "--data", str(data), "--val", str(data), "--batch-size", "6")
    quiet = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false")
    saved = ("--trainer.logger=false", f"--trainer.default_root_dir={data.parent}/run")
    run(["fit", "-c", str(CONFIG), *given, *quiet, *saved, "--steps", str(steps), *options])
    return data.parent / "run" / "checkpoints" / "last.ckpt"


# What a rule does


def test_only_low_rank_matrices_and_new_rows_are_trained():
    made = module()
    trained = dict(lora.trainable(made.model))
    rows = {n: w for n, w in trained.items() if "trainable_tokens_delta" in n}
    assert {n: tuple(w.shape) for n, w in rows.items()} == {
        f"backbone.{part}.token_adapter.trainable_tokens_delta.default": (2, 192)
        for part in ("embed", "out")
    }
    assert all(".lora_A." in n or ".lora_B." in n for n in trained.keys() - rows.keys())
    layers = {n.partition(".lora_")[0] for n in trained.keys() - rows.keys()}
    parts = ("attn.qkv", "attn.o", "mlp.gate_up", "mlp.down")
    assert layers == {f"backbone.blocks.{i}.{part}" for i in range(4) for part in parts}


def test_an_untrained_adapter_changes_nothing():
    base = mmdlm.load("tiny", device="cpu", pack=False)
    grow(base, WORDS)
    assert torch.equal(logits(module().eval().model), logits(base))


def test_rates_and_settings_of_several_rules():
    tune = {
        "*": "frozen",
        "backbone.blocks.*": Rate(lora=Lora(rank=4, alpha=8.0), lr=1e-3),
        "backbone.blocks.0.*": Rate(lora=Lora(rank=2, alpha=8.0), lr=2e-3),
        "adapters.image.*": Rate(lr=3e-3),
    }
    made = module(tune)
    made._trainer = type("Trainer", (), {"max_steps": 10, "max_epochs": -1, "callbacks": []})()
    groups = {g["name"]: g for g in made.configure_optimizers()["optimizer"].param_groups}
    assert {name: g["initial_lr"] for name, g in groups.items()} == {
        "*": 6e-4,  # the new rows
        "backbone.blocks.*": 1e-3,
        "backbone.blocks.0.*": 2e-3,
        "adapters.image.*": 3e-3,
        "adapters.image.* (no decay)": 3e-3,
    }
    ranks = {
        n.partition(".attn.o.")[0]: len(w)
        for n, w in lora.trainable(made.model)
        if n.endswith("attn.o.lora_A.default.weight")
    }
    assert ranks == {f"backbone.blocks.{i}": 2 if i == 0 else 4 for i in range(4)}


class Fused(Encoder):
    """An encoder with a layer whose fused kernel reads weights."""

    kind, dim = "image", 16

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2)


def sparse(folder):
    """A checkpoint with experts."""
    moe = MoEConfig(experts=2, top=1, inner=8)
    config = TransformerConfig(vocab=9, width=16, layers=1, heads=2, inner=16, moe=moe)
    model = MultimodalDLM(Spec("mmdlm", config, mask_id=2, eos_id=1, pad_id=0))
    model.backbone.reset()
    save(model, folder)
    return folder


def test_what_lora_cannot_train_is_refused(tmp_path):
    rules = {"backbone.*": Rate(lora=Lora())}
    with pytest.raises(ValueError, match=r"cannot train .*moe\.experts\.gate_up\.weight.*experts"):
        module(rules, source=sparse(tmp_path / "moe"), words=[])
    rules["*.experts.*"] = "frozen"
    assert module(rules, source=tmp_path / "moe", words=[]).base is not None
    model = mmdlm.load("tiny", device="cpu", pack=False)
    model.encoders["image"] = Fused()
    with pytest.raises(ValueError, match=r"encoders\.image\.attention\.out_proj.*fused kernel"):
        lora.inject(model, {"*": "frozen", "encoders.*": Rate(lora=Lora())}, 0, "tiny")
    with pytest.raises(ValueError, match=r"'backbone\.out\.\*' asks for LoRA and matches no"):
        module({"*": "frozen", "backbone.out.*": Rate(lora=Lora())})
    two = {"backbone.*": Rate(lora=Lora()), "encoders.*": Rate(lora=Lora(dora=True))}
    with pytest.raises(ValueError, match=r"the lora rules have dora False and True|True and False"):
        module(two)
    new = NewModel(TransformerConfig(width=16, layers=1, heads=2, inner=16))
    with pytest.raises(ValueError, match="LoRA trains an existing model further; give source"):
        Module(Masked(), new, tune={"backbone.blocks.*": Rate(lora=Lora())}, words=["a"])


def test_a_layer_that_is_not_called_is_an_error():
    made = module()
    layer = made.model.backbone.blocks[1].attn.o
    layer.forward = lambda x: nn.functional.linear(x, layer.weight)  # reads the base weight
    made.model.logits(TOKENS).sum().backward()
    with pytest.raises(ValueError, match=r"does not call backbone\.blocks\.1\.attn\.o\.weight"):
        made.on_after_backward()


# No way around a wrapped layer


@pytest.mark.parametrize("name", sorted(ENCODERS.keys() - {"MagvitV2"}))  # it has none
def test_encoders_call_every_linear_layer(name):
    encoder = ENCODERS[name].tiny().eval()
    layers = [n for n, part in encoder.named_modules() if isinstance(part, nn.Linear)]
    item = encoder.prepare(encoder.example())
    with torch.no_grad():
        before = encoder([item]).tokens
        made = peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False)
        peft.inject_adapter_in_model(made, encoder).eval()
        unmerged = encoder([item]).tokens
        for part in encoder.modules():
            if isinstance(part, peft.tuners.lora.LoraLayer):
                part.merge()
        torch.testing.assert_close(unmerged, encoder([item]).tokens, rtol=1e-4, atol=1e-4)
    assert not torch.equal(unmerged, before)


@pytest.mark.parametrize("tied", [False, True])
def test_decoding_with_caches_calls_the_wrapped_layers(tied, tmp_path):
    config = TransformerConfig(vocab=32, width=32, layers=2, heads=2, inner=48, tied=tied)
    model = MultimodalDLM(Spec("mmdlm", config, mask_id=2, eos_id=1, pad_id=0)).eval()
    model.backbone.reset(torch.Generator().manual_seed(0))
    save(model, tmp_path)
    layers = [n for n, part in model.named_modules() if isinstance(part, nn.Linear)]
    assert ("backbone.out" in layers) != tied
    rows = {"backbone.embed": [4, 31]}
    options = {"r": 4, "target_modules": layers, "trainable_token_indices": rows}
    peft.inject_adapter_in_model(peft.LoraConfig(**options, init_lora_weights=False), model).eval()
    with torch.no_grad():
        model.backbone.embed.token_adapter.trainable_tokens_delta["default"].normal_()
    merged = mmdlm.load(tmp_path, device="cpu", adapter=lora.extract(model))
    prompt = torch.tensor([[3, 4, 31, 6]])
    for decoding in ("fast_dllm_dual", "llada", "fast_dllm"):
        got, want = (mmdlm.decode(each, prompt, 8, decoding) for each in (model, merged))
        assert torch.equal(got.tokens, want.tokens)
    with torch.no_grad():
        got, want = (each.logits(want.tokens) for each in (model, merged))
        last = model.backbone.head(torch.eye(32), slice(3, 9)) - merged.backbone.head(
            torch.eye(32), slice(3, 9)
        )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert last.abs().max() < 1e-5


def test_the_base_may_be_held_in_8_bits(data, tmp_path):
    pytest.importorskip("torchao")
    with pytest.raises(ValueError, match=r"'int8' has no effect without LoRA"):
        module({"encoders.*": "frozen"}, quantize="int8")
    with pytest.raises(ValueError, match=r"'\*' trains backbone\..*, which is quantized"):
        module({"*": Rate(), "backbone.blocks.0.*": Rate(lora=Lora())}, quantize="int8")
    with pytest.raises(ValueError, match="dora needs weights that are not quantized"):
        module({"*": "frozen", "backbone.*": Rate(lora=Lora(dora=True))}, quantize="int8")
    made, plain = (shaken(module(quantize=kind)) for kind in ("int8", None))
    for name, weight in lora.trainable(plain.model):
        weight.data = dict(lora.trainable(made.model))[name].data
    sizes = [sum(map(held, each.model.backbone.blocks.parameters())) for each in (made, plain)]
    assert sizes[0] < 0.4 * sizes[1]
    assert cosine(logits(made.model), logits(plain.model)) > 0.999
    eight, all_steps = "--model.quantize=int8", "--trainer.callbacks.init_args.save_top_k=-1"
    want = torch.load(fit(data, 4, EVERY, all_steps, eight), weights_only=True)["state_dict"]
    step = tmp_path / "run" / "checkpoints" / "epoch=0-step=2.ckpt"
    got = torch.load(fit(data, 4, EVERY, eight, "--ckpt_path", str(step)), weights_only=True)
    assert all(torch.equal(got["state_dict"][n], want[n]) for n in want)
    export(step, tmp_path / "whole", merge=True)
    assert mmdlm.load(tmp_path / "whole").backbone.blocks[0].attn.o.weight.dtype == torch.float32


def held(weight):
    """Bytes of a weight, which may be quantized."""
    parts = weight.__tensor_flatten__()[0] if hasattr(weight, "__tensor_flatten__") else ()
    return sum(held(getattr(weight, name)) for name in parts) or weight.numel() * weight.itemsize


def cosine(one, other):
    return float(nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0))


# The folder


@pytest.mark.parametrize("settings", [{}, {"dora": True}, {"rslora": True}])
def test_the_folder_opens_in_peft_and_merges_at_load(settings, tmp_path):
    tune = {
        "*": "frozen",
        "backbone.*": Rate(lora=Lora(rank=4, **settings)),
        "encoders.image.*": Rate(lora=Lora(rank=2, alpha=2.0, **settings)),
        "adapters.image.*": Rate(),
        "backbone.norm.*": Rate(),
    }
    made = shaken(module(tune))
    assert made.write(tmp_path / "out") == f"tiny --adapter {tmp_path / 'out'}"
    merged = mmdlm.load("tiny", device="cpu", adapter=tmp_path / "out")
    base = mmdlm.load("tiny", device="cpu", pack=False)
    grow(base, WORDS)
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "out")).eval().base_model.model
    encoder = made.model.encoders["image"]
    image = [encoder.prepare(encoder.example())]
    for other, bound in ((theirs, 1e-6), (merged, 1e-5)):
        torch.testing.assert_close(logits(other), logits(made.model), rtol=bound, atol=bound)
        with torch.no_grad():
            got, want = (m.encode("image", image)[0] for m in (other, made.model))
        torch.testing.assert_close(got, want, rtol=bound, atol=bound)
    assert merged.tokenizer.decode([177, 178]) == "Lion zebra"
    assert merged.preset == made.model.preset
    config = peft.PeftConfig.from_pretrained(str(tmp_path / "out"))
    assert config.base_model_name_or_path == "tiny"


def test_a_merged_export_keeps_new_words_and_precision(tmp_path):
    made = shaken(module())
    made.write(tmp_path / "adapter")
    words = ["export", "tiny", "--adapter", str(tmp_path / "adapter")]
    assert commands.main([*words, "--out", str(tmp_path / "whole")]) == 0
    whole = mmdlm.load(tmp_path / "whole", device="cpu")
    assert whole.tokenizer.decode([177, 178]) == "Lion zebra"
    torch.testing.assert_close(logits(whole), logits(made.model), rtol=1e-5, atol=1e-5)
    assert commands.main([*words, "--out", str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    half = mmdlm.load(tmp_path / "half", device="cpu", dtype="stored", pack=False)
    assert half.backbone.embed.weight.dtype == torch.bfloat16
    assert half.tokenizer.decode([177, 178]) == "Lion zebra"


def test_an_embedding_trained_as_a_whole_is_in_the_folder(tmp_path):
    tune = {**ALL, "backbone.embed.*": Rate(), "backbone.out.*": Rate()}
    made = shaken(module(tune))
    made.write(tmp_path / "out")
    merged = mmdlm.load("tiny", device="cpu", adapter=tmp_path / "out")
    torch.testing.assert_close(logits(merged), logits(made.model), rtol=1e-5, atol=1e-5)


def test_without_new_words_the_folder_has_no_tokenizer(tmp_path):
    made = module(words=["red"])
    made.write(tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert not any("trainable_tokens" in n for n, _ in lora.trainable(made.model))


def test_statistics_of_the_data_are_in_the_folder(tmp_path):
    own = mmdlm.load("tiny", device="cpu").robot
    data = {"action": own.action.statistics, "state": own.state.statistics}
    data["state"] = {name: [v + 3 for v in values] for name, values in data["state"].items()}
    made = shaken(module(data_statistics=data))
    made.write(tmp_path / "out")
    merged = mmdlm.load("tiny", device="cpu", adapter=tmp_path / "out")
    assert merged.robot.state.statistics == data["state"] != own.state.statistics
    assert merged.processor.outputs["actions"] is merged.robot
    assert merged.robot.to_dict() == made.model.robot.to_dict()
    export("tiny", tmp_path / "whole", adapter=tmp_path / "out")
    assert mmdlm.load(tmp_path / "whole", device="cpu").robot.to_dict() == merged.robot.to_dict()
    saved = json.loads((tmp_path / "out" / "statistics.json").read_text())
    saved["actions"]["bins"]["last_id"] -= 1
    (tmp_path / "out" / "statistics.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="other action tokens than the model"):
        mmdlm.load("tiny", device="cpu", adapter=tmp_path / "out")


# A run


def test_config_lowers_the_loss_and_changes_only_the_adapter(data, capsys):
    seen = []
    before, whole = mmdlm.load("tiny", device="cpu", pack=False), Module.training_step

    def step(self, batch, index):
        loss = whole(self, batch, index)
        seen.append((self, loss.item()))
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Module, "training_step", step)
        fit(data, 40)
    made, losses = seen[-1][0].model, [loss for _, loss in seen]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    trained = {n for n, _ in lora.trainable(made)}
    share = sum(w.numel() for _, w in lora.trainable(made)) / sum(
        w.numel() for w in made.parameters()
    )
    assert share < 0.05
    grow(before, made.tokenizer.words)
    known = before.state_dict()
    for name, weight in made.state_dict().items():
        if name not in trained:
            assert torch.equal(
                weight, known[name.replace("token_adapter.", "").replace("base_layer.", "")]
            )
    start = lora_start(made)
    assert all(not torch.equal(dict(lora.trainable(made))[n], w) for n, w in start.items())


def lora_start(made):
    """What lora_B and the new rows were at the start."""
    rows = {"embed": made.backbone.embed, "out": made.backbone.out}
    found = {n: torch.zeros_like(w) for n, w in lora.trainable(made) if ".attn.o.lora_B." in n}
    for part, layer in rows.items():
        name = f"backbone.{part}.token_adapter.trainable_tokens_delta.default"
        found[name] = layer.token_adapter.trainable_tokens_original["default"]
    return found


def test_two_steps_of_the_config_make_a_small_checkpoint_that_exports(data, tmp_path):
    checkpoint = fit(data, 2)
    saved = torch.load(checkpoint, weights_only=True)
    names = saved["mmdlm"]["base"]["trained"]
    whole = {name for name, _ in mmdlm.load("tiny", device="meta").named_parameters()}
    assert set(names) <= set(saved["state_dict"])
    assert not {f"model.{name}" for name in whole} & set(saved["state_dict"])
    assert checkpoint.stat().st_size < 0.15 * 4 * 4_360_448
    assert export(checkpoint, tmp_path / "adapter") is None
    merged = export(checkpoint, tmp_path / "whole", merge=True)
    loaded = mmdlm.load("tiny", device="cpu", adapter=tmp_path / "adapter")
    again = mmdlm.load(tmp_path / "whole", device="cpu")
    assert torch.equal(logits(loaded), logits(merged.eval()))
    assert torch.equal(logits(again), logits(loaded))
    assert export("tiny", tmp_path / "other", adapter=tmp_path / "adapter", dtype="float32")
    with pytest.raises(ValueError, match="merge has no effect: tiny holds no LoRA adapter"):
        export("tiny", tmp_path / "none", merge=True)
    with pytest.raises(ValueError, match="are about a whole model; give merge=True"):
        export(checkpoint, tmp_path / "none", dtype="bfloat16")
    with pytest.raises(ValueError, match="holds a LoRA adapter of tiny only"):
        ckpt.trained(checkpoint)
    new = NewModel(TransformerConfig(width=16, layers=1, heads=2, inner=16))
    with pytest.raises(ValueError, match="holds a LoRA adapter of tiny only"):
        Module(Masked(), new, init=str(checkpoint), words=["a"])


EVERY = "--trainer.callbacks.init_args.every_n_train_steps=2"
FORK = multiprocessing.get_context("fork")


RULES = {"*": "frozen", "backbone.blocks.*": {"lora": {"rank": 4, "dropout": 0.2}}}
DROPOUT = f"--model.tune={json.dumps(RULES)}"


def killed(data):
    """A run of four steps that is killed in its fourth."""
    whole = Module.training_step

    def step(self, batch, index):
        if self.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, batch, index)

    Module.training_step = step
    fit(data, 4, EVERY, DROPOUT)


def test_a_killed_run_with_dropout_resumes_bit_equal(data, tmp_path):
    want = torch.load(fit(data, 4, EVERY, DROPOUT), weights_only=True)["state_dict"]
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    process = FORK.Process(target=killed, args=(data,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 2
    resume = ("--ckpt_path", str(last))
    got = torch.load(fit(data, 4, EVERY, DROPOUT, *resume), weights_only=True)
    assert got["global_step"] == 4
    assert got["state_dict"].keys() == want.keys()
    assert all(torch.equal(got["state_dict"][n], want[n]) for n in want)
    with pytest.raises(RuntimeError, match="size mismatch"):
        fit(data, 6, *resume)  # of another rank
    with pytest.raises(ValueError, match="holds a LoRA adapter of tiny, and this run trains none"):
        fit(data, 6, "--model.tune={'encoders.*': frozen}", *resume)


def test_new_words_that_cannot_be_learned_are_a_warning():
    with pytest.warns(UserWarning, match="freezes the embedding, so the new words are not learned"):
        module({"*": "frozen", "adapters.*": Rate()})


def test_a_source_that_changed_or_is_gone_is_named(data, tmp_path):
    source = shutil.copytree(Path(mmdlm.__file__).parent / "models" / "tiny", tmp_path / "mine")
    checkpoint = fit(data, 2, source=source)
    model = mmdlm.load(source, device="cpu", pack=False)
    with torch.no_grad():
        model.backbone.norm.weight[0] += 1
    save(model, source)
    with pytest.raises(ValueError, match=r"LoRA adapter of .*mine, whose weights have changed"):
        export(checkpoint, tmp_path / "whole", merge=True)
    with pytest.raises(ValueError, match=r"LoRA adapter of .*mine, whose weights have changed"):
        fit(data, 4, "--ckpt_path", str(checkpoint), source=source)
    shutil.rmtree(source)
    with pytest.raises(FileNotFoundError, match=r"LoRA adapter of .*mine, which is not there"):
        export(checkpoint, tmp_path / "whole", merge=True)
    export(checkpoint, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


# The command line


def test_commands_take_an_adapter(tmp_path, capsys):
    made = shaken(module())
    made.write(tmp_path / "out")
    words = ["generate", "red circle", "--length", "4", "--json"]
    texts = []
    for more in (["--adapter", str(tmp_path / "out")], []):
        assert commands.main([*words, *more]) == 0
        texts.append(json.loads(capsys.readouterr().out.splitlines()[-1])["text"])
    merged = mmdlm.load("tiny", adapter=tmp_path / "out")
    assert texts[0] == mmdlm.generate(merged, "red circle", length=4)
    assert texts[1] == mmdlm.generate(mmdlm.load("tiny"), "red circle", length=4)


class Hub:
    """A stand-in for the hub: repositories by name, and the files of each."""

    def __init__(self):
        self.made = {}

    def create_repo(self, repo_id, private, exist_ok):
        assert exist_ok
        self.made[repo_id] = {"private": private}
        return type("Url", (), {"repo_id": repo_id})()

    def upload_folder(self, folder_path, repo_id):
        self.made[repo_id]["files"] = sorted(f.name for f in Path(folder_path).iterdir())
        return f"https://hub/{repo_id}"


def test_an_export_is_uploaded_as_it_was_written(tmp_path, monkeypatch, capsys):
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    made = shaken(module())
    made.write(tmp_path / "adapter")
    out = tmp_path / "whole"
    options = ["--adapter", str(tmp_path / "adapter"), "--out", str(out)]
    assert commands.main(["export", "tiny", *options, "--push-to-hub", "me/mine"]) == 0
    written = sorted(file.name for file in out.iterdir())
    assert hub.made == {"me/mine": {"private": True, "files": written}}
    assert "https://hub/me/mine: uploaded" in capsys.readouterr().out

    def refuse(**_):
        from huggingface_hub.errors import HFValidationError

        raise HFValidationError("repo id must be owner/name")

    hub.create_repo = lambda *_, **__: refuse()
    with pytest.raises(ValueError, match=r"is written, but the hub did not take it as 'a b'"):
        push(out, "a b")
