"""Chat templates in every place where transformers reads them."""

import itertools
import json
import warnings
from pathlib import Path

import pytest

from mmdlm.text import Tokenizer

PLACES = {
    "jinja": lambda f, t: (f / "chat_template.jinja").write_text(t),
    "more": lambda f, t: put(f / "additional_chat_templates" / "default.jinja", t),
    "tools": lambda f, t: put(f / "additional_chat_templates" / "tool_use.jinja", t),
    "text": lambda f, t: put_json(f / "tokenizer_config.json", chat_template=t),
    "list": lambda f, t: put_json(
        f / "tokenizer_config.json",
        chat_template=[{"name": "tool_use", "template": "x"}, {"name": "default", "template": t}],
    ),
    "json": lambda f, t: put_json(f / "chat_template.json", chat_template=t),
    "processor": lambda f, t: put_json(f / "processor_config.json", chat_template=t),
}
OF_PROCESSORS = {"json", "processor"}
SETS = [s for n in (1, 2) for s in itertools.combinations(PLACES, n)]


def put(file: Path, text: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)


def put_json(file: Path, **content: object) -> None:
    file.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | content))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Tokenizer.from_words(["a", "b"]).save(tmp_path)
    put_json(tmp_path / "tokenizer_config.json")
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*chat templates of .* differ")
@pytest.mark.parametrize("places", SETS, ids="-".join)
def test_template_is_the_one_of_transformers(folder: Path, places: tuple[str, ...]) -> None:
    from transformers import AutoTokenizer

    for place in places:
        PLACES[place](folder, f"of {place}")
    theirs = AutoTokenizer.from_pretrained(str(folder))
    if theirs.chat_template is None:  # it does not read a processor's files
        assert set(places) <= OF_PROCESSORS
        assert Tokenizer.from_folder(folder).template == f"of {places[0]}"
        return
    try:
        wanted = theirs.get_chat_template()
    except ValueError:
        with pytest.raises(ValueError, match="none is named 'default'; write the one to use to"):
            Tokenizer.from_folder(folder)
    else:
        assert Tokenizer.from_folder(folder).template == wanted


def test_templates_that_differ_are_reported(folder: Path) -> None:
    PLACES["text"](folder, "one")
    PLACES["json"](folder, "one")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Tokenizer.from_folder(folder)
    PLACES["json"](folder, "other")
    with pytest.warns(UserWarning, match=r"tokenizer_config.json and chat_template.json differ"):
        assert Tokenizer.from_folder(folder).template == "one"


@pytest.mark.parametrize("place", sorted(PLACES.keys() - {"tools"}))
def test_byte_order_mark_is_no_part_of_a_template(folder: Path, place: str) -> None:
    PLACES[place](folder, "{{ messages }}")
    for file in folder.rglob("*"):
        if file.is_file() and file.name != "tokenizer.json":
            file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert Tokenizer.from_folder(folder).template == "{{ messages }}"
    assert Tokenizer.from_folder(folder).decode([3, 4]) == "a b"


@pytest.mark.parametrize("place", sorted(PLACES.keys() - {"tools", "processor"}))
def test_saved_tokenizer_keeps_every_template(folder: Path, tmp_path: Path, place: str) -> None:
    from transformers import AutoTokenizer

    PLACES[place](folder, "of it")
    tokenizer, out = Tokenizer.from_folder(folder), tmp_path / "out"
    out.mkdir()
    (out / "additional_chat_templates").mkdir()
    (out / "additional_chat_templates" / "of_before.jinja").write_text("stale")
    tokenizer.save(out)
    assert Tokenizer.from_folder(out).template == "of it"
    first, second = (AutoTokenizer.from_pretrained(str(f)) for f in (folder, out))
    assert second.chat_template == first.chat_template
    tokenizer.template = "changed"
    tokenizer.save(out)
    assert Tokenizer.from_folder(out).template == "changed"
    assert AutoTokenizer.from_pretrained(str(out)).chat_template == "changed"


def test_line_ends_are_those_of_transformers(folder: Path) -> None:
    from transformers import AutoTokenizer

    (folder / "chat_template.jinja").write_bytes(b"one\r\ntwo\rthree\n")
    theirs = AutoTokenizer.from_pretrained(str(folder))
    assert Tokenizer.from_folder(folder).template == theirs.chat_template == "one\ntwo\nthree\n"
