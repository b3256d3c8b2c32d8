"""COCO's captions: a JSON file of images and annotations, and a folder of images."""

from __future__ import annotations

import re
from collections.abc import Iterator
from collections.abc import Sequence as Items
from pathlib import Path
from typing import ClassVar

from mmdlm.data.conversations import Conversations, Row, exchange
from mmdlm.data.records import Entry, has_keys, members, parsed

SPLIT = re.compile(r"(train|val|test)\d{4}")
ROOTS = ("images/", "", "Images/", "Images/mscoco/")
"""Folders of split folders; the last is that of VQA's own code."""
TRIED = 20  # images of which one must exist in a folder, for it to be the right one


class COCOCaptions(Conversations):
    """Images with captions as in COCO; one row per image, of whose captions each draw learns one.

    All captions of an image are its accepted answers. Images without captions are left out.

    Args:
        path: JSON file, such as `annotations/captions_train2017.json`.
        images: folder of the images; None: `train2017` (as in the name of the file) or `images`,
            beside the file or its folder.
        length: see `Conversations`.
        prompt: see `Conversations`.

    Raises:
        FileNotFoundError: no folder holds the images.
    """

    EXAMPLE: ClassVar[str] = (
        'annotations/captions_val2017.json:\n{"images": [{"id": 7, "file_name": "7.jpg"}], '
        '"annotations": [{"image_id": 7, "id": 1, "caption": "A cat on a mat."}]}\n'
        "val2017/7.jpg"
    )

    def __init__(
        self,
        path: Path,
        images: Path | None = None,
        length: int | None = None,
        prompt: str | None = None,
    ) -> None:
        super().__init__(path, length, prompt)
        names = [row["messages"][0]["content"][0]["image"] for row in self.rows[:TRIED]]
        self.root = Path(images) if images else image_folder(self.path, self.path.name, names)

    @classmethod
    def matches(cls, path: Path) -> bool:
        """See `Conversations.matches`."""
        return has_keys(path, "images", "annotations", "file_name", "image_id", "caption")

    def entries(self) -> Iterator[Entry]:
        """See `Conversations.entries`; (file name, captions) of each image."""
        found = parsed(self.path)
        types = {"id": int | str, "file_name": str}
        captions: dict[int | str, list[str]] = {}
        images = []
        for place, image in members(found, "images", types, self.path):
            if isinstance(image, Exception):
                yield place, image
            else:
                images.append((place, image))
                captions[image["id"]] = []
        types = {"image_id": int | str, "caption": str}
        for place, entry in members(found, "annotations", types, self.path):
            if isinstance(entry, Exception):
                yield place, entry
            elif entry["image_id"] not in captions:
                wrong = f"{place}: image_id {entry['image_id']} is not among the images"
                yield place, ValueError(wrong)
            else:
                captions[entry["image_id"]].append(entry["caption"].strip())
        for place, image in images:
            if captions[image["id"]]:
                yield place, (image["file_name"], captions[image["id"]])

    def row(self, entry: tuple[str, list[str]], place: str) -> Row:
        """See `Conversations.row`."""
        return exchange([("image", entry[0])], None, entry[1])


def image_folder(path: Path, named: str, names: Items[str]) -> Path:
    """The folder of the images of an annotation file.

    Args:
        path: the file.
        named: text that holds the name of the split, such as "train2017".
        names: some of the images; the folder holds at least one of them.

    Raises:
        FileNotFoundError: no usual folder does.
    """
    split = SPLIT.search(named)
    below = [f"{root}{split[0]}" for root in ROOTS] if split else []
    above = (path.parent, path.parent.parent)
    folders = [root / name for root in above for name in (*below, "images", "")]
    for folder in folders:
        if any((folder / name).is_file() for name in names):
            return folder
    raise FileNotFoundError(
        f"{path}: {names[0]} is in none of {', '.join(map(str, folders))}; give the folder of the "
        "images with images="
    )
