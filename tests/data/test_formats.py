"""Which data set reads a file or folder: for every format exactly one."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

import mmdlm
from mmdlm.data.formats import formats, of, open_data
from mmdlm.data.lerobot_writer import Writer


def put(path: Path, content: object = "") -> Path:
    """Writes JSON, text, or an image or a clip by the extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".jpg", ".png"):
        Image.new("RGB", (8, 6), (200, 0, 0)).save(path)
    elif path.suffix in (".flac", ".wav"):
        soundfile.write(path, np.full(1600, 0.1), 16000)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def coco(root: Path) -> Path:
    put(root / "val2017" / "a.jpg")
    found = {
        "images": [{"id": 7, "file_name": "a.jpg"}],
        "annotations": [{"image_id": 7, "caption": "a red circle"}],
    }
    return put(root / "annotations" / "captions_val2017.json", found)


def vqa(root: Path) -> Path:
    put(root / "val2014" / "COCO_val2014_000000000007.jpg")
    answers = [{"answer": "a red circle"}, {"answer": '"images": "caption"'}]
    put(
        root / "v2_mscoco_val2014_annotations.json",
        {"annotations": [{"question_id": 1, "answers": answers}]},
    )
    asked = [{"question_id": 1, "image_id": 7, "question": "what is red"}]
    return put(root / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": asked})


def librispeech(root: Path) -> Path:
    put(root / "dev" / "84" / "1" / "84-1-0.flac")
    put(root / "dev" / "84" / "1" / "84-1.trans.txt", "84-1-0 a red circle\n")
    return root


def media_folder(root: Path) -> Path:
    put(root / "a.jpg")
    put(root / "a.txt", "a red circle")
    return root


def webdataset(root: Path) -> Path:
    with tarfile.open(root / "x-0.tar", "w") as archive:
        for name in ("a.jpg", "a.txt"):
            archive.add(put(root / "source" / name, "a red circle"), name)
            (root / "source" / name).unlink()
    (root / "source").rmdir()
    return root


def hugging_face(root: Path) -> Path:
    pa = pytest.importorskip("pyarrow", reason='pip install "mmdlm[data]"')
    pytest.importorskip("datasets", reason='pip install "mmdlm[data]"')
    import pyarrow.parquet as pq

    stream = io.BytesIO()
    Image.new("RGB", (8, 6)).save(stream, "png")
    cells = [{"bytes": stream.getvalue(), "path": None}]
    pq.write_table(pa.table({"image": cells, "caption": ["a red circle"]}), root / "x.parquet")
    return root / "x.parquet"


def audio_caps(root: Path) -> Path:
    put(root / "val" / "q_30.wav")
    return put(root / "val.csv", "audiocap_id,youtube_id,start_time,caption\n1,q,30,a red circle\n")


def clotho(root: Path) -> Path:
    put(root / "evaluation" / "a.wav")
    return put(root / "clotho_captions_evaluation.csv", "file_name,caption_1\na.wav,a red circle\n")


def common_voice(root: Path) -> Path:
    put(root / "clips" / "a.wav")
    return put(root / "dev.tsv", "client_id\tpath\tsentence\nx\ta.wav\ta red circle\n")


def chat(root: Path) -> Path:
    turns = [
        {"role": "user", "content": "what is red"},
        {"role": "assistant", "content": "a red circle"},
    ]
    return put(root / "x.jsonl", {"messages": turns})


def llava(root: Path) -> Path:
    put(root / "a.jpg")
    turns = [
        {"from": "human", "value": "<image>what is red"},
        {"from": "gpt", "value": "a red circle"},
    ]
    return put(root / "x.json", [{"image": "a.jpg", "conversations": turns}])


def table(root: Path) -> Path:
    put(root / "a.jpg")
    return put(root / "x.csv", "image,caption\na.jpg,a red circle\n")


@pytest.fixture(scope="module")
def tiny() -> mmdlm.MultimodalDLM:
    return mmdlm.load("tiny")


WRITTEN: dict[str, Callable[[Path], Path]] = {
    "AudioCaps": audio_caps,
    "COCOCaptions": coco,
    "Chat": chat,
    "Clotho": clotho,
    "CommonVoice": common_voice,
    "HuggingFace": hugging_face,
    "LLaVA": llava,
    "LibriSpeech": librispeech,
    "MediaFolder": media_folder,
    "Table": table,
    "VQA": vqa,
    "WebDataset": webdataset,
}


@pytest.mark.parametrize("name", formats())
def test_exactly_one_class_reads_an_example_of_each_format(
    name: str, tmp_path: Path, tiny: mmdlm.MultimodalDLM
) -> None:
    path = WRITTEN[name](tmp_path)
    assert [other for other, cls in formats().items() if cls.matches(path)] == [name]
    given = dict.fromkeys(("caption", "transcribe", "describe"), {"prompt": "what is red"})
    data = open_data(path).connect(tiny.processor, given)
    packed = tiny.processor.pack([data.sample(0, np.random.default_rng(0))])
    (turn,) = packed.rows[0].turns
    assert tiny.processor.tokenizer.decode(turn.answer) == "a red circle"
    assert formats()[name].EXAMPLE


def test_a_large_json_list_is_known_by_its_first_row(tmp_path: Path) -> None:
    row = {"question": "why?", "answer": "so"}
    path = tmp_path / "x.json"
    path.write_text(json.dumps([row] * 5000) + "not valid at its end")
    assert of(path).__name__ == "Chat"
    path.write_text(json.dumps([row | {"note": "x" * 100_000}]))
    assert of(path).__name__ == "Chat"


def test_other_files_and_folders_have_no_known_format(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason='pip install "mmdlm[data]"')
    with Writer(tmp_path / "robot", {"action": (2,)}, fps=10) as writer:
        writer.add_episode("push", {"action": np.zeros((3, 2), np.float32)})
    put(tmp_path / "boxes.json", {"images": [], "annotations": [{"image_id": 1, "bbox": []}]})
    (tmp_path / "notes.txt").write_text("nothing")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "numbers.jsonl").write_text("1\n2\n")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder.yaml").mkdir()
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match="has no known format"):
            of(path)
