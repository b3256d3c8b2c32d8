"""DIFFA: a folder in the published layout against the golden embeddings, logits and answers."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mmdlm
import mmdlm.checkpoint
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.guidance.cfg import CFG
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.layout import Row
from mmdlm.messages import Media, Message, Text
from mmdlm.model import MultimodalDLM
from mmdlm.systems.diffa import DIFFA

pytestmark = pytest.mark.filterwarnings("ignore:.*filled the canvas", "ignore:Blocks")
GOLDEN = Path(__file__).parents[1] / "golden" / "audio"
META = json.loads((GOLDEN / "diffa_meta.json").read_text())
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
LLADA = {
    **META["llada"],
    "model_type": "llada",
    "architectures": ["LLaDAModelLM"],
    "layer_norm_type": "rms",
    "rope": True,
    "eos_token_id": 149,
    "pad_token_id": 149,
    "max_sequence_length": 256,
}
CONFIG = {
    "architectures": ["DIFFAModel"],
    "whisper_config": {**META["whisper"], "model_type": "whisper"},
    "llm_config": LLADA,
    "conv_kernel_sizes": "5,5,5",
    "adapter_inner_dim": 512,
    "acoustic_connector_config": {},
    "prompt_size": META["prompt_size"],
    "whisper_model_id": META["whisper_model_id"],
}


def parts() -> dict[str, dict[str, Tensor]]:
    """Published tensors of the connectors, of Whisper and of LLaDA, under their own names."""
    files = {"connectors": "diffa_adapters", "whisper": "whisper_encoder", "llada": "llada"}
    return {part: load_file(GOLDEN / f"{file}.safetensors") for part, file in files.items()}


def whole() -> dict[str, Tensor]:
    """Published tensors as a DIFFAModel saves them."""
    held = parts()
    whisper = {k.replace("model.encoder.", "whisper_model."): v for k, v in held["whisper"].items()}
    return held["connectors"] | whisper | {f"llm_model.{k}": v for k, v in held["llada"].items()}


def save(file: Path, tensors: dict[str, Tensor]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file)


def write(
    folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], file: str = "model"
) -> Path:
    save(folder / f"{file}.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "diffa_io.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("diffa"), whole(), CONFIG)


@pytest.fixture(scope="module")
def model(folder) -> MultimodalDLM:
    return mmdlm.load(folder)


def clip(golden: dict[str, Tensor], number: int) -> tuple[Tensor, int]:
    return golden[f"wave_i16.{number}"].float() / 32768, 16_000


def speech(model: MultimodalDLM, *clips: tuple[Tensor, int]) -> list[Tensor]:
    """Embeddings of clips, encoded together."""
    with torch.no_grad():
        return model.encode("audio", [model.processor.prepare("audio", item) for item in clips])


def strategies(case: dict[str, Any]) -> list[Any]:
    """LLaDA's sampler with the settings of a golden case."""
    made = [Blocks(case["block_length"]), TopK(case["steps"])]
    return made + [CFG(case["cfg_scale"])] * (case["cfg_scale"] > 0)


def test_parts_are_read_from_one_file(model, folder):
    assert model.system == "diffa"
    assert len(model.report.loaded) == len(whole())
    assert (model.report.ignored, model.report.missing) == ({}, ())
    assert model.encoders["audio"].hidden_layers == tuple(META["acoustic_target_layer_ids"])
    assert model.encoders["audio"].longest == META["chunk_length_s"]
    assert model.adapters["audio"].stage == 2
    assert model.template.system == META["prompts"]["system"]


def test_stage_2_gives_the_golden_speech_embeddings(model, golden):
    clips = [clip(golden, number) for number in (0, 1)]
    together = speech(model, *clips)
    for number, row in enumerate(together):
        expected = golden["speech.stage2"][number][golden["speech.stage2.attn_reported"][number]]
        torch.testing.assert_close(row, expected, **CLOSE)
        torch.testing.assert_close(speech(model, clips[number])[0], row, atol=1e-5, rtol=1e-5)


def test_stage_1_gives_the_golden_speech_embeddings(golden, tmp_path):
    held = whole()
    model = mmdlm.load(write(tmp_path / "both", held, CONFIG | {"stage": 1}))
    for number, row in enumerate(speech(model, clip(golden, 0), clip(golden, 1))):
        expected = golden["speech.stage1"][number][golden["speech.stage1.attn"][number]]
        torch.testing.assert_close(row, expected, **CLOSE)
    alone = {name: tensor for name, tensor in held.items() if "acoustic" not in name}
    other = mmdlm.load(write(tmp_path / "stage1", alone, CONFIG))
    assert torch.equal(speech(other, clip(golden, 0))[0], speech(model, clip(golden, 0))[0])


SIZES = {
    "tiny": (4, [0, 1, 2, 3], 80),
    "small": (12, [2, 5, 8, 11], 80),
    "medium": (24, [5, 11, 17, 23], 80),
    "large-v3": (32, [3, 7, 11, 15, 19, 23, 27, 31], 128),
}


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_layers_of_every_whisper_size(size, named):
    depth, layers, mels = SIZES[size]
    whisper = {"d_model": 48, "encoder_attention_heads": 6, "encoder_ffn_dim": 96}
    whisper |= {"encoder_layers": depth, "num_mel_bins": mels, "max_source_positions": 1500}
    config = CONFIG | {"whisper_config": whisper, "prompt_size": 16}
    config["whisper_model_id"] = f"openai/whisper-{size}" if named else None
    names = {name for name in whole() if "layer_prompts" not in name}
    names |= {f"acoustic_connector.layer_prompts.{i}" for i in range(len(layers))}
    blueprint = DIFFA.read(config, names)
    encoder = blueprint.encoders["audio"]["init_args"]
    assert encoder["hidden_layers"] == layers
    assert (encoder["mels"], encoder["seconds"], encoder["hidden"]) == (mels, 30.0, 96)
    adapter = blueprint.adapters["audio"]["init_args"]
    assert (adapter["layers"], adapter["heads"], adapter["prompt_size"]) == (len(layers), 6, 16)
    assert (adapter["in_dim"], adapter["out_dim"]) == (48, 32)


def test_absent_settings_are_those_of_the_published_model():
    llm = {name: META["llada"][name] for name in ("d_model", "n_heads", "n_layers")}
    config = CONFIG | {"llm_config": llm | {"mlp_hidden_size": 64, "vocab_size": 126_464}}
    spec = DIFFA.read(config, set(whole())).spec
    assert (spec.mask_id, spec.eos_id, spec.pad_id) == (126_336, 126_081, 126_081)
    assert spec.stop_ids == (126_348,)
    assert (spec.transformer.theta, spec.transformer.tied, spec.context) == (5e5, False, 4096)


@torch.no_grad()
def test_spliced_embeddings_and_logits_are_the_golden_ones(model, golden):
    for row, at in enumerate(golden["train.audio_info_lengths"].tolist()):
        ids = golden["train.noisy_ids"][row]
        # The reference attends to the padding of the shorter clip.
        sequence = model.arrange([Row((ids[:at], golden["speech.stage2"][row], ids[at:]))])
        embedded = model.spliced(sequence, slice(None))[0]
        torch.testing.assert_close(embedded, golden["train.inputs_embeds"][row], **CLOSE)
        logits = model.backbone.head(model.hidden(sequence))[0]
        torch.testing.assert_close(logits, golden["train.logits"][row], **CLOSE)


def same(first: MultimodalDLM, second: MultimodalDLM) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_parts_are_read_from_files_without_index(model, tmp_path):
    folder = write(tmp_path, parts()["connectors"], CONFIG, "connectors")
    save(folder / "w.safetensors", parts()["whisper"])
    llada = {f"llm_model.{name}": tensor for name, tensor in parts()["llada"].items()}
    save(folder / "llada.safetensors", llada)
    again = mmdlm.load(folder)
    assert same(again, model)
    assert again.report.files == {
        folder / "connectors.safetensors": len(parts()["connectors"]),
        folder / "llada.safetensors": len(llada),
        folder / "w.safetensors": len(parts()["whisper"]),
    }


def test_whisper_and_llada_are_read_from_folders_of_their_own(model, tmp_path):
    """Whisper's own file holds its decoder too, which is reported and not written back."""
    folder = write(tmp_path / "diffa", parts()["connectors"], CONFIG)
    decoder = {"model.decoder.layer_norm.bias": torch.ones(9), "proj_out.weight": torch.ones(9)}
    save(folder / "whisper-small" / "model.safetensors", parts()["whisper"] | decoder)
    names = sorted(parts()["llada"])
    for number, half in enumerate((names[:9], names[9:]), 1):
        file = folder / "LLaDA-8B-Instruct" / f"model-0000{number}-of-00002.safetensors"
        save(file, {name: parts()["llada"][name] for name in half})
    save(folder / "stage1" / "model.safetensors", parts()["connectors"])
    again = mmdlm.load(folder)
    assert same(again, model)
    assert list(again.report.ignored) == [f"whisper-small/{name}" for name in sorted(decoder)]
    assert len(again.report.files) == 4
    mmdlm.checkpoint.save_published(again, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == whole().keys()


def test_the_same_part_in_two_places_is_rejected(tmp_path):
    folder = write(tmp_path, whole(), CONFIG)
    save(folder / "whisper" / "model.safetensors", parts()["whisper"])
    with pytest.raises(ValueError, match="are in whisper and elsewhere too; keep one"):
        mmdlm.load(folder)


@pytest.mark.parametrize(
    ("absent", "message"),
    [
        ("whisper_model.", r"no tensors whisper_model.\*; put its folder .* openai/whisper-small"),
        ("llm_model.", r"no tensors llm_model.\*; put its folder .* GSAI-ML/LLaDA-8B-Instruct"),
        ("semantic_connector.", r"no tensors semantic_connector.\*; convert .* pytorch_model.bin"),
    ],
)
def test_a_missing_part_is_named(tmp_path, absent, message):
    held = {name: tensor for name, tensor in whole().items() if not name.startswith(absent)}
    with pytest.raises(ValueError, match=message):
        mmdlm.load(write(tmp_path, held, CONFIG))


def test_a_pickle_is_never_read(tmp_path):
    class Harm:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "harm",))

    folder = write(tmp_path / "d", {}, CONFIG)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin are pickles, .*torch.load"):
        mmdlm.load(folder)
    save(folder / "whisper" / "model.safetensors", parts()["whisper"])
    with pytest.raises(ValueError, match=r"semantic_connector.\*; convert .* pytorch_model.bin"):
        mmdlm.load(folder)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"whisper_model_id": "openai/whisper-medium"}, "no 4 of Whisper's 12 layers are known"),
        ({"acoustic_connector_config": {"depth": 2}}, r"acoustic_connector_config has \['depth'\]"),
        ({"llm_config": {"d_model": 32}}, r"lacks \['n_heads', 'n_layers', 'vocab_size'\]"),
        ({"whisper_config": META["whisper"] | {"activation_function": "relu"}}, "activation"),
        ({"prompt_size": 32}, r"layer_prompts.0 is \[1, 64, 16\], expected \[1, 32, 16\]"),
    ],
)
def test_settings_that_were_never_published_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        mmdlm.load(write(tmp_path, whole(), CONFIG | change))


def test_without_end_token_a_warning_names_the_one_taken(tmp_path):
    llm = {name: value for name, value in LLADA.items() if not name.endswith("eos_token_id")}
    with pytest.warns(
        UserWarning, match="no eos_token_id, .*160 embeddings; using 159, pass eos_id="
    ):
        model = mmdlm.load(write(tmp_path, whole(), CONFIG | {"llm_config": llm}))
    assert (model.spec.eos_id, model.spec.pad_id) == (159, 149)


@pytest.mark.parametrize("stage", [1, 2])
def test_written_folder_is_bit_equal(tmp_path, stage):
    held = {
        name: tensor for name, tensor in whole().items() if stage == 2 or "acoustic" not in name
    }
    folder = write(tmp_path / "in", held, CONFIG)
    mmdlm.checkpoint.save_published(mmdlm.load(folder), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == held.keys()
    assert all(torch.equal(written[name], held[name]) for name in held)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    published = json.loads((folder / "config.json").read_text())
    for name, value in published.items():
        if isinstance(value, dict):  # absent entries are written too
            assert {**config[name], **value} == config[name], name
        else:
            assert config[name] == value, name
    assert same(mmdlm.load(tmp_path / "out"), mmdlm.load(folder))


def test_other_layers_are_written_and_read(model, tmp_path):
    changed = copy.deepcopy(model)
    changed.encoders["audio"].arguments["hidden_layers"] = (1, 2, 3, 12)
    mmdlm.checkpoint.save_published(changed, tmp_path)
    assert mmdlm.load(tmp_path).encoders["audio"].hidden_layers == (1, 2, 3, 12)


def asked(golden: dict[str, Tensor], number: int, *clips: int) -> list[Message]:
    """The prompt of a golden case with clips in place of its own."""
    case, ids = META["generation"][number], golden[f"gen.{number}.prompt"][0]
    at = case["audio_info_length"]
    media = [Media("audio", clip(golden, each)) for each in clips or (case["wave"],)]
    return [Message("raw", (Text(ids[:at]), *media, Text(ids[at:])))]


@pytest.mark.parametrize("number", range(3))
def test_answer_gives_the_golden_ids(model, golden, number):
    case, expected = META["generation"][number], golden[f"gen.{number}.sequence"][0]
    given = {"length": case["gen_length"], "strategies": strategies(case), "details": True}
    answer = mmdlm.answer(model, asked(golden, number), **given)
    assert list(answer.tokens) == expected[-case["gen_length"] :].tolist()


def test_conversations_with_one_and_two_clips_are_answered_together_as_alone(model, golden):
    given = {"length": 8, "strategies": strategies(META["generation"][0]), "details": True}
    questions = [asked(golden, 0), asked(golden, 1, 0, 1), asked(golden, 2, 1)]
    together = mmdlm.answer(model, questions, **given)
    for answer, question in zip(together, questions, strict=True):
        assert answer.tokens == mmdlm.answer(model, question, **given).tokens
    assert list(together[0].tokens) == golden["gen.0.sequence"][0, -8:].tolist()


@pytest.fixture(scope="module")
def speaking(tmp_path_factory) -> MultimodalDLM:
    """The model with a small byte-level tokenizer, in the folder of LLaDA."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    texts = [*META["prompts"].values(), "What can you hear from the audio? Transcribe the speech."]
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=140, show_progress=False))
    roles = ["<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    backend.add_special_tokens(roles)
    folder = write(tmp_path_factory.mktemp("speaking"), parts()["connectors"], CONFIG)
    save(folder / "whisper" / "model.safetensors", parts()["whisper"])
    save(folder / "llada" / "model.safetensors", parts()["llada"])
    backend.save(str(folder / "llada" / "tokenizer.json"))
    return mmdlm.load(folder)


def test_prompt_is_the_published_one(speaking, golden):
    question = META["prompts"]["question"]
    content = [{"type": "audio", "audio": clip(golden, 0)}, {"type": "text", "text": question}]
    prompt = speaking.processor.prompt([{"role": "user", "content": content}])
    assert [type(part) for part in prompt] == [Tensor, Media, Tensor]
    backend = speaking.tokenizer.backend
    expected = backend.encode(META["prompts"]["inference_prompt"]).ids
    before = len(backend.encode(META["prompts"]["audio_info_text"]).ids) - 1
    assert prompt[0].tolist() == expected[:before]
    assert prompt[2].tolist() == expected[before:]
    assert backend.decode(prompt[2].tolist()).startswith(" <audio>. What emotion")


def test_several_clips_stand_where_they_are_given(speaking, golden):
    clips = [{"type": "audio", "audio": clip(golden, number)} for number in (0, 1)]
    words = [{"type": "text", "text": text} for text in ("What is ", " and ", "?")]
    content = [words[0], clips[0], words[1], clips[1], words[2]]
    first, _, middle, _, last = speaking.processor.prompt([{"role": "user", "content": content}])
    backend = speaking.tokenizer.backend
    assert backend.decode(first.tolist()).endswith("What is This is the audio:")
    assert backend.decode(middle.tolist()) == " <audio>.  and This is the audio:"
    assert backend.decode(last.tolist()).startswith(" <audio>. ?")


def test_contents_are_not_stripped(speaking):
    [prompt] = speaking.processor.prompt([{"role": "user", "content": "\nWhat? \n"}])
    text = speaking.tokenizer.backend.decode(prompt.tolist(), skip_special_tokens=False)
    assert "\n\n\nWhat? \n<|eot_id|>" in text
    assert META["prompts"]["system"] in text


def test_tasks_work_with_the_published_settings(speaking, golden):
    clips = [clip(golden, 0), clip(golden, 1)]
    for verb, length in ((mmdlm.describe, 128), (mmdlm.transcribe, 128)):
        answers = verb(speaking, clips, details=True)
        assert [answer.forwards for answer in answers] == [length, length]
        assert answers[1].tokens == verb(speaking, clips[1], details=True).tokens
    content = [{"type": "audio", "audio": clips[0]}, {"type": "text", "text": "What emotion?"}]
    answer = mmdlm.answer(speaking, [{"role": "user", "content": content}], details=True)
    assert answer.forwards == 16
    assert isinstance(answer.text, str)
