"""VQA's questions and annotations: two JSON files and a folder of images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from mmdlm.data.coco import SPLIT, TRIED, image_folder
from mmdlm.data.conversations import Conversations, Row, exchange
from mmdlm.data.records import Entry, has_keys, members, parsed

QUESTION = {"question_id": int | str, "image_id": int | str, "question": str}
ANNOTATION = {"question_id": int | str, "answers": list}
NAMES = ("COCO_{split}_{id:0>12}.jpg", "{id:0>12}.jpg", "{id}.jpg", "{id}.png")
"""File names of images, of which the first that exists is used for all."""


class VQA(Conversations):
    """Questions about images as in VQA v2, OK-VQA and VQA v1.

    The answer to learn is the most common of the (ten) answers; all are kept for scoring.

    Args:
        path: the JSON file of the questions; or of the annotations, whose questions stand beside
            it with the same name but for "questions" and "OpenEnded".
        annotations: the JSON file of the annotations; None: found in the same way.
        images: folder of the images; None: see `mmdlm.data.coco.COCOCaptions`.
        name: file name of an image with {id} and {split}; None: one of `NAMES`.
        length: see `Conversations`.
        prompt: see `Conversations`.

    Raises:
        FileNotFoundError: the annotations or the images are not found.
    """

    EXAMPLE: ClassVar[str] = (
        'v2_OpenEnded_mscoco_val2014_questions.json:\n{"questions": [{"question_id": 70, '
        '"image_id": 7, "question": "What is it?"}]}\n'
        'v2_mscoco_val2014_annotations.json:\n{"annotations": [{"question_id": 70, "image_id": 7, '
        '"answers": [{"answer": "cat"}, {"answer": "a cat"}, {"answer": "cat"}]}]}\n'
        "val2014/COCO_val2014_000000000007.jpg"
    )

    def __init__(
        self,
        path: Path,
        annotations: Path | None = None,
        images: Path | None = None,
        name: str | None = None,
        length: int | None = None,
        prompt: str | None = None,
    ) -> None:
        self.annotations, self.images = annotations, images
        self.names = NAMES if name is None else (name,)
        super().__init__(path, length, prompt)

    @classmethod
    def matches(cls, path: Path) -> bool:
        """See `Conversations.matches`."""
        return has_keys(path, "questions", *QUESTION) or has_keys(path, "annotations", *ANNOTATION)

    def entries(self) -> Iterator[Entry]:
        """See `Conversations.entries`; (question, image, annotation) of each question."""
        asked, answered = self._files()
        annotations = {}
        for place, entry in members(parsed(answered), "annotations", ANNOTATION, answered):
            if isinstance(entry, Exception):
                yield place, entry
            else:
                annotations[entry["question_id"]] = (place, entry["answers"])
        found = parsed(asked)
        questions = list(members(found, "questions", QUESTION, asked))
        ids = [one["image_id"] for _, one in questions if not isinstance(one, Exception)]
        images = iter(
            self._image_names(asked, f"{found.get('data_subtype', '')} {asked.name}", ids)
        )
        for place, entry in questions:
            if isinstance(entry, Exception):
                yield place, entry
                continue
            number, image = entry["question_id"], next(images)
            if number in annotations:
                yield place, (entry["question"], image, annotations[number])
            else:
                wrong = f"{place}: question_id {number} has no annotation in {answered}"
                yield place, ValueError(wrong)

    def row(self, entry: tuple[str, str, tuple[str, Any]], place: str) -> Row:
        """See `Conversations.row`."""
        question, image, (at, listed) = entry
        given = _answers(listed, at)
        common = Counter(given).most_common(1)[0][0]
        return {**exchange([("image", image)], question, common), "answers": given}

    def _files(self) -> tuple[Path, Path]:
        """The files of the questions and of the annotations."""
        if has_keys(self.path, "questions"):
            return self.path, Path(self.annotations or beside(self.path, "annotations"))
        return beside(self.path, "questions"), self.path

    def _image_names(self, path: Path, named: str, ids: list[Any]) -> list[str]:
        """File names of images by id; also finds their folder."""
        if not ids:
            return []
        split = SPLIT.search(named)
        listed = {
            name: [name.format(id=one, split=split[0] if split else "") for one in ids]
            for name in self.names
        }
        tried = {name: found[:TRIED] for name, found in listed.items()}
        folder = self.images or image_folder(path, named, [n for t in tried.values() for n in t])
        self.root = Path(folder)
        for name, found in tried.items():
            if any((self.root / file).is_file() for file in found):
                return listed[name]
        return listed[self.names[0]]


def beside(path: Path, kind: str) -> Path:
    """The other file of a pair of questions and annotations.

    Args:
        path: one of them.
        kind: "questions" or "annotations", part of the name of the other.

    Raises:
        FileNotFoundError: there is none in the folder, nor in the folder `Questions` or
            `Annotations` beside it.
    """

    def shared(file: Path) -> str:
        name = file.name.lower()
        for word in ("openended_", "questions", "annotations"):
            name = name.replace(word, "")
        return name

    # The last is where VQA's own code has them.
    folders = (path.parent, path.parent.parent / kind.title())
    for file in (file for folder in folders for file in sorted(folder.glob("*.json"))):
        if kind in file.name.lower() and shared(file) == shared(path):
            return file
    raise FileNotFoundError(
        f"{path} has no {kind} beside it, expected such as v2_mscoco_val2014_{kind}.json"
        + ("; give the file with annotations=" if kind == "annotations" else "")
    )


def _answers(given: list[Any], place: str) -> list[str]:
    """Answers of one question, as texts or as {"answer": text}."""
    found = [one.get("answer") if isinstance(one, dict) else one for one in given]
    if not found or not all(isinstance(one, str) for one in found):
        raise ValueError(f'{place}: answers are {given!r}, expected [{{"answer": text}}, ...]')
    return found
