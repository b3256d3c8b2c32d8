import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from mmdlm.byte_level import PRETOKENIZE
from mmdlm.text import CHAT, END, MASK, PAD, Tokenizer

CORPUS = [
    "the red circle is left of the blue square, isn't it?\n\n  Yes: 3 of 1024 are.\n",
    "Die Größe beträgt 12 Äpfel; naïve café. 你好世界 \tprint('hello')  \r\n",
]
MARKERS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]
# Cases of Qwen2's pre-tokenizer: newlines, single digits, runs of spaces.
TEXTS = [
    "a red circle",
    "1024 is 3",
    "the\n\n\nred",
    "x  \n y\r\n\tz   ",
    "isn't IT'S we'LL",
    "Größe 你好 🙂 cafe\u0301",
    "one<|im_end|>\n<|im_start|>user two <|mask|><|mask|>",
    "<tool>red</tool> <|im_end |>",
    "",
]


def entry(text: str, special: bool = True) -> dict[str, Any]:
    return {"content": text, "special": special, "normalized": False, "lstrip": False}


@pytest.fixture(scope="session")
def trained() -> Backend:
    """Byte-level BPE as Qwen2 has it, trained on a few lines."""
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CORPUS * 5, trainer)
    return backend


@pytest.fixture
def layouts(trained: Backend, tmp_path: Path) -> tuple[Path, Path, int]:
    """A folder with tokenizer.json, one in the slow layout, and the id of the first marker."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    backend = Backend.from_str(trained.to_str())
    first = backend.get_vocab_size()
    backend.model.save(str(parts))
    backend.add_tokens([AddedToken(m, special=True, normalized=False) for m in MARKERS])
    backend.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    backend.save(str(whole / "tokenizer.json"))
    added = {first + i: entry(m) for i, m in enumerate(MARKERS)}
    added[first + len(MARKERS)] = entry("<tool>", special=False)
    write(
        parts / "tokenizer_config.json",
        added_tokens_decoder=added,
        tokenizer_class="DreamTokenizer",
    )
    return whole, parts, first


def write(file: Path, **content: Any) -> None:
    file.write_text(json.dumps(content))


def change(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("text", TEXTS)
def test_slow_layout_gives_the_ids_of_tokenizer_json(layouts, text: str) -> None:
    whole, parts, _ = layouts
    fast, slow = Tokenizer.from_folder(whole), Tokenizer.from_folder(parts)
    assert slow.encode(text) == fast.encode(text)
    assert slow.encode(text, special=False) == fast.encode(text, special=False)
    assert len(slow) == len(fast)


def test_slow_layout_equals_transformers(layouts) -> None:
    from transformers import Qwen2Tokenizer

    _, parts, _ = layouts
    change(parts / "tokenizer_config.json", lambda c: c.update(tokenizer_class="Qwen2Tokenizer"))
    theirs, ours = Qwen2Tokenizer.from_pretrained(str(parts)), Tokenizer.from_folder(parts)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text


def test_text_is_pretokenized_as_in_qwen2(layouts) -> None:
    _, parts, _ = layouts
    cut = Tokenizer.from_folder(parts).backend.pre_tokenizer.pre_tokenize_str
    assert [word for word, _ in cut("we'll 10\n\n  x!?\n")] == [
        *("we", "'ll", "Ġ", "1", "0", "ĊĊ", "Ġ", "Ġx", "!?Ċ")
    ]


@pytest.mark.parametrize("text", ["Größe 你好 🙂", "\x00\x7f\u2028 tabs\t", "  spaces  "])
def test_decoding_inverts_encoding(layouts, text: str) -> None:
    tokenizer = Tokenizer.from_folder(layouts[1])
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_one_id_and_are_not_decoded(layouts) -> None:
    _, parts, first = layouts
    tokenizer = Tokenizer.from_folder(parts)
    ids = tokenizer.encode("red<|im_end|><tool>")
    assert ids[-2:] == [first + 2, first + 4]
    assert tokenizer.decode(ids) == "red<tool>"


def test_special_tokens_can_be_encoded_as_text(layouts) -> None:
    _, parts, first = layouts
    tokenizer = Tokenizer.from_folder(parts)
    ids = tokenizer.encode("red<|im_end|>", special=False)
    assert max(ids) < first
    assert tokenizer.decode(ids) == "red<|im_end|>"
    assert tokenizer.encode("<|im_end|>") == [first + 2]  # the next text is read as before


def test_encoding_is_thread_safe(layouts) -> None:
    _, parts, first = layouts
    tokenizer, wrong = Tokenizer.from_folder(parts), []

    def work(special: bool) -> None:
        for _ in range(300):
            if (first + 2 in tokenizer.encode("a <|im_end|> b", special=special)) != special:
                wrong.append(special)

    threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("layout", [0, 1])
def test_tokens_of_the_sidecar_files_are_added(layouts, layout: int) -> None:
    folder, first = layouts[layout], layouts[2]
    config = json.loads((layouts[1] / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] |= {str(first + 5): entry("<|late|>")}
    write(folder / "tokenizer_config.json", **config)
    write(folder / "added_tokens.json", **{"<|old|>": first + 6, "<more>": first + 7})
    write(folder / "special_tokens_map.json", pad_token={"content": "<|old|>"}, eos_token="<tool>")
    tokenizer = Tokenizer.from_folder(folder)
    ids = tokenizer.encode("<|late|><|old|><more>")
    assert ids == [first + 5, first + 6, first + 7]
    assert tokenizer.decode(ids) == "<more>"
    assert tokenizer.names == {"pad_token": "<|old|>", "eos_token": "<tool>"}
    assert max(tokenizer.encode("<tool>", special=False)) < first  # named, hence special


def test_ids_may_leave_a_gap_in_the_slow_layout(layouts) -> None:
    _, parts, first = layouts
    config = json.loads((parts / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"][str(first + 20)] = entry("<|far|>")
    write(parts / "tokenizer_config.json", **config)
    tokenizer = Tokenizer.from_folder(parts)
    assert tokenizer.encode("a<|far|>")[-1] == first + 20
    assert tokenizer.decode([first + 20]) == ""


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda c, n: c["added_tokens_decoder"].update({str(n - 1): entry("<x>")}),
            "different tok",
        ),
        (lambda c, n: c["added_tokens_decoder"].update({str(n + 9): entry("a")}), "different tok"),
        (lambda c, n: c.update(tokenizer_class="GPT2Tokenizer"), "vocab.json of GPT2Tokenizer"),
    ],
)
def test_contradictory_files_are_rejected(layouts, edit, message: str) -> None:
    _, parts, first = layouts
    change(parts / "tokenizer_config.json", lambda c: edit(c, first))
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_folder(parts)


def test_token_that_cannot_get_its_id_is_rejected(layouts) -> None:
    whole, _, first = layouts
    write(whole / "added_tokens.json", **{"<far>": first + 30})
    with pytest.raises(ValueError, match="'<far>' has id .* tokenizer.json ends at"):
        Tokenizer.from_folder(whole)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("vocab.json", "{", "is not valid JSON"),
        ("tokenizer_config.json", "[]", "holds a list, expected an object"),
        ("merges.txt", "#version: 0.2\na b c\n", "the line 'a b c'"),
        ("merges.txt", None, "without merges.txt"),
    ],
)
def test_error_names_the_damaged_file(layouts, file: str, text: str | None, message: str) -> None:
    _, parts, _ = layouts
    (parts / file).unlink()
    if text is not None:
        (parts / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_folder(parts)


def test_folder_without_a_tokenizer_gives_none(tmp_path: Path) -> None:
    write(tmp_path / "tokenizer_config.json", chat_template="x")
    assert Tokenizer.from_folder(tmp_path) is None


@pytest.mark.parametrize(
    ("found", "kept"),
    [
        (None, None),
        ("one", "one"),
        ([{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}], "d"),
    ],
)
def test_chat_template_of_a_folder(layouts, found: Any, kept: str | None) -> None:
    whole, _, _ = layouts
    write(whole / "tokenizer_config.json", chat_template=found)
    assert Tokenizer.from_folder(whole).template == kept
    (whole / CHAT).write_text("of the file\n")
    assert Tokenizer.from_folder(whole).template == "of the file\n"


def test_named_templates_without_a_default_are_rejected(layouts) -> None:
    whole, _, _ = layouts
    write(whole / "tokenizer_config.json", chat_template=[{"name": "tools", "template": "t"}])
    with pytest.raises(ValueError, match=r"\['tools'\], none is named 'default'"):
        Tokenizer.from_folder(whole)


def test_saved_tokenizer_is_the_same_and_replaces_an_earlier_one(layouts, tmp_path: Path) -> None:
    _, parts, _ = layouts
    change(
        parts / "tokenizer_config.json",
        lambda c: c.update(chat_template="{{ eos_token }}", eos_token="<|im_end|>"),
    )
    tokenizer, out = Tokenizer.from_folder(parts), tmp_path / "out"
    out.mkdir()
    for name in (CHAT, "added_tokens.json", "special_tokens_map.json"):
        (out / name).write_text('{"<stale>": 9}')
    tokenizer.save(out)
    again = Tokenizer.from_folder(out)
    assert (again.template, again.names) == (tokenizer.template, tokenizer.names)
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    Tokenizer.from_words(["a"]).save(out)
    assert [file.name for file in out.iterdir()] == ["tokenizer.json"]


def test_saved_tokenizer_opens_in_transformers(layouts, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = Tokenizer.from_folder(layouts[1])
    ours.template, ours.names = "{{ messages[0].content + eos_token }}", {"eos_token": "<|im_end|>"}
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    for text in TEXTS:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    prompt = theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert prompt == "hi<|im_end|>"


def test_error_for_an_unknown_word_names_similar_words() -> None:
    tokenizer = Tokenizer.from_words(["circle", "red"])
    assert tokenizer.decode(tokenizer.encode("Red circle")) == "red circle"
    with pytest.raises(ValueError, match="lacks 'circel' \\(near: circle\\)"):
        tokenizer.encode("red circel")


STATES = {
    "truncation": lambda b: b.enable_truncation(max_length=3, direction="left"),
    "padding": lambda b: b.enable_padding(
        length=64, pad_id=1, pad_token="<|im_end|>", direction="left"
    ),
    "dropout": lambda b: setattr(b.model, "dropout", 0.9),
}


@pytest.mark.parametrize("state", STATES)
def test_stored_state_changes_no_ids(layouts, tmp_path: Path, state: str) -> None:
    from transformers import AutoTokenizer

    whole, _, _ = layouts
    wanted = [Tokenizer.from_folder(whole).encode(text) for text in TEXTS]
    backend = Backend.from_file(str(whole / "tokenizer.json"))
    STATES[state](backend)
    backend.save(str(whole / "tokenizer.json"))
    write(whole / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    tokenizer = Tokenizer.from_folder(whole)
    assert [tokenizer.encode(text) for text in TEXTS] == wanted
    assert [Tokenizer(backend).encode(text) for text in TEXTS] == wanted  # of a .ckpt file
    (out := tmp_path / "out").mkdir()
    tokenizer.save(out)
    written = json.loads((out / "tokenizer.json").read_text())
    assert [written["truncation"], written["padding"], written["model"]["dropout"]] == [None] * 3
    # What transformers takes from the state beyond cutting and filling is kept.
    first, second = (AutoTokenizer.from_pretrained(str(folder)) for folder in (whole, out))
    for key in ("padding_side", "truncation_side", "pad_token", "pad_token_type_id"):
        assert getattr(second, key) == getattr(first, key), key


def test_slow_layout_written_by_windows_is_the_same(layouts) -> None:
    _, parts, _ = layouts
    wanted = [Tokenizer.from_folder(parts).encode(text) for text in TEXTS]
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        text = (parts / name).read_bytes().replace(b"\n", b"\r\n")
        (parts / name).write_bytes(b"\xef\xbb\xbf" + text)
    assert [Tokenizer.from_folder(parts).encode(text) for text in TEXTS] == wanted


def test_surrogate_pairs_are_characters_and_halves_are_named(speller) -> None:
    tokenizer = speller().tokenizer
    assert tokenizer.encode("a \ud83d\ude00b") == tokenizer.encode("a \U0001f600b")
    with pytest.raises(ValueError, match="'a .ud83d b' has half .*, '.ud83d', at position 2"):
        tokenizer.encode("a \ud83d b")
    with pytest.raises(ValueError, match="at position 1"):  # of what os.fsdecode gives for bytes
        Tokenizer.from_words(["a"]).encode("a\udcff")


def test_ids_below_zero_are_not_decoded(speller) -> None:
    with pytest.raises(ValueError, match="the id at position 1 is -100, expected token ids from 0"):
        speller().tokenizer.decode([5, -100])


def test_text_that_continues_keeps_its_first_space() -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    backend = Backend(models.Unigram([("<unk>", 0.0), ("▁", -3), ("▁red", -1), ("a", -2)], 0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = Tokenizer(backend)
    ids = tokenizer.encode("a red red")[-2:]
    assert tokenizer.decode(ids) == "red red"
    assert tokenizer.continuation(ids) == " red red"
    words = Tokenizer.from_words(["red"])
    assert words.continuation(words.encode("red")) == "red"


TEXTS = ["The red Cube, 12 cm!", "the red cube", "Ça va? 北京 İzmir", "a\n\n b\t  c "] * 3


def test_a_trained_byte_level_tokenizer_round_trips_any_text() -> None:
    tokenizer = Tokenizer.from_texts(TEXTS, 320, actions=4)
    texts = [
        *TEXTS,
        "",
        " ",
        "\r\n",
        "unseen: ÀÉ e\u0301 ﬁ \x00 😀👩‍🚀",
        "ไทย عربي \u202e",
        "<eos><mask>",
    ]
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not set(ids) & {0, 1, 2, *range(len(tokenizer) - 4, len(tokenizer))}
    assert [tokenizer.id(t) for t in (PAD, END, MASK)] == [0, 1, 2]
    assert tokenizer.id("<action_3>") == len(tokenizer) - 1
    assert tokenizer.decode([0, 1, 2, len(tokenizer) - 1]) == ""
    assert len(tokenizer.encode("the red cube")) == 3  # merges of frequent words
    assert tokenizer.words is None


def test_a_trained_tokenizer_is_the_same_for_the_same_texts(tmp_path: Path) -> None:
    first, same = (Tokenizer.from_texts(iter(TEXTS), 280) for _ in range(2))
    assert first.backend.to_str() == same.backend.to_str()
    assert len(first) == 280
    assert len(Tokenizer.from_texts(["ab"], 1000)) == 3 + 256  # no pair occurs twice
    other = Tokenizer.from_texts([text.upper() for text in TEXTS], 280)
    assert first.backend.to_str() != other.backend.to_str()
    with pytest.raises(ValueError, match="260 tokens is too small, expected at least 261: 256 byt"):
        Tokenizer.from_texts(TEXTS, 260, ["<|im_start|>", "<|im_end|>"])


def test_a_trained_tokenizer_is_saved_and_opens_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    made = Tokenizer.from_texts(TEXTS, 300, ["<|im_start|>", "<|im_end|>"])
    made.save(tmp_path)
    again, theirs = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TEXTS, "<|im_start|>user <eos>"):
        ids = made.encode(text)
        assert again.encode(text) == ids == theirs.encode(text, add_special_tokens=False)
        assert again.decode(ids) == text == theirs.decode(ids, skip_special_tokens=True)
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.mask_token_id) == (0, 1, 2)
    assert again.names == made.names
