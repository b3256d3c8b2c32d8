"""Tokenizer of a checkpoint: text to token ids and back."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmdlm import word_list
from mmdlm.byte_level import byte_level, trained
from mmdlm.files import blaming, present, read_json, read_text
from mmdlm.template_files import CHAT, MORE_CHATS, PROCESSOR_FILES, find

if TYPE_CHECKING:
    import tokenizers

PAD, END, MASK = "<pad>", "<eos>", "<mask>"
# Names of special tokens in chat templates.
NAMES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# Keys of tokenizer_config.json that do not outlive a change of the template or the names.
ADAPTED = (*NAMES, "auto_map", "chat_template", "tokenizer_class")
FAST = "PreTrainedTokenizerFast"  # the class of transformers that reads any tokenizer.json
SPLIT = "split_special_tokens"
"""Key of tokenizer_config.json, known to transformers: special tokens in a text are plain text."""
SIDECAR_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# Files a tokenizer is read from, beside those in `MORE_CHATS`.
TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", *SIDECAR_FILES, CHAT, PROCESSOR_FILES[0])
PAIR, HALF = re.compile("[\ud800-\udbff][\udc00-\udfff]"), re.compile("[\ud800-\udfff]")
# Guards `encode_special_tokens`, a mutable setting of the backend.
_LOCK = threading.Lock()


class Tokenizer:
    """Encodes and decodes text with a checkpoint's vocabulary.

    Args:
        backend: the loaded tokenizer.
        template: chat template of the checkpoint (Jinja), or None.
        names: special tokens by their names in templates, see `NAMES`.
        files: texts of the files beside tokenizer.json that it was read from, by path.

    Raises:
        ValueError: one of the files is none of a tokenizer.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        template: str | None = None,
        names: Mapping[str, str] | None = None,
        files: Mapping[str, str] | None = None,
    ) -> None:
        # Settings of the program that wrote the file: cut prompts, padding in them, random splits.
        backend.no_truncation()
        backend.no_padding()
        if getattr(backend.model, "dropout", None):
            backend.model.dropout = None
        if not isinstance(template, str | None):
            raise TypeError(f"chat_template is a {type(template).__name__}, expected text")
        self.backend = backend
        self.template = template
        self.names = dict(names or {})
        self.files = dict(files or {})
        if wrong := [name for name, text in self.files.items() if not _is_file(name, text)]:
            raise ValueError(f"{wrong[0]!r} is not the text of a file of a tokenizer")
        self.source: Path | None = None
        """File of the chat template, for errors."""
        # A word-level vocabulary cannot encode unknown words, so they raise.
        self.words = backend.get_vocab() if _is_word_level(backend) else None
        self.splits_special = _splits_special(self.files.get(SIDECAR_FILES[0]))
        """No text gives a special token; only chat templates do."""

    @classmethod
    def from_words(cls, words: Sequence[str], actions: int = 0) -> Tokenizer:
        """Creates a word-level tokenizer: pad, end, mask, the words, then the action ids.

        Args:
            words: distinct words and punctuation marks, see `word_list.pieces`.
            actions: number of action ids appended as `<action_0>`, `<action_1>`, ...
        """
        entries = [PAD, END, MASK, *sorted(set(words))]
        return cls(word_list.backend([*entries, *(f"<action_{i}>" for i in range(actions))]))

    @classmethod
    def from_texts(
        cls, texts: Iterable[str], size: int, markers: Sequence[str] = (), actions: int = 0
    ) -> Tokenizer:
        """Trains a byte-level BPE: pad, end, mask, markers, bytes and merges, then action ids.

        It encodes and decodes any text exactly. A special token that a text contains is encoded as
        plain text, here and in transformers.

        Args:
            texts: what it is trained on.
            size: tokens at most, see `mmdlm.byte_level.trained`.
            markers: control tokens of a chat template.
            actions: number of action ids appended as `<action_0>`, `<action_1>`, ...

        Raises:
            ValueError: the size is too small for bytes and special tokens.
        """
        first = [PAD, END, MASK, *dict.fromkeys(markers)]
        last = [f"<action_{i}>" for i in range(actions)]
        names = {"pad_token": PAD, "eos_token": END, "mask_token": MASK}
        config = _written(names | {SPLIT: True, "tokenizer_class": FAST})
        backend = trained(map(joined, texts), size, first, last)
        return cls(backend, None, names, {SIDECAR_FILES[0]: config})

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer | None:
        """Loads the tokenizer of a checkpoint folder; None if it has none.

        Reads `tokenizer.json`, else `vocab.json` with `merges.txt` (Qwen2 and Dream). Further
        special tokens come from `SIDECAR_FILES`, the chat template from `mmdlm.template_files`.
        Stored truncation, padding and dropout are not used. No code is executed.

        Raises:
            ValueError: a file is damaged, the files contradict each other, or a `vocab.json`
                belongs to a tokenizer of another kind.
        """
        whole, parts = folder / "tokenizer.json", folder / "vocab.json"
        if not present(whole) and not present(parts):
            return None
        config, files = _config(folder), _files(folder)
        with blaming(folder / SIDECAR_FILES[0]):
            added = _added(folder, config)
        if present(whole):
            backend = parse(read_text(whole), whole)
            # Only those with an id: new ids would exceed the embedding.
            added = {text: entry for text, entry in added.items() if entry["id"] is not None}
        else:
            backend = byte_level(folder, config.get("tokenizer_class"), added)
        _add(backend, added, folder)
        if state := _state(backend):
            config = state | config
            files[SIDECAR_FILES[0]] = _written(state | _read(folder / SIDECAR_FILES[0]))
        with blaming(folder / SIDECAR_FILES[0]):
            made = cls(backend, _template(folder, config), _names(config), files)
        made.source = folder / (CHAT if (folder / CHAT).is_file() else SIDECAR_FILES[0])
        return made

    def save(self, folder: Path) -> None:
        """Writes `tokenizer.json`, and the files it was read with, in place of earlier ones.

        Where the template or the names were changed since, and for a new tokenizer, they are
        written to `tokenizer_config.json`.
        """
        remove(folder)
        self.backend.save(str(folder / "tokenizer.json"))
        for name, text in self.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8", newline="")
        config = _config(folder)
        if (_template(folder, config), _names(config)) == (self.template, self.names):
            return
        config = {key: value for key, value in config.items() if key not in ADAPTED}
        config |= self.names | {"tokenizer_class": FAST}
        if self.template is not None:
            config["chat_template"] = self.template
        remove(folder, keep=("tokenizer.json", SIDECAR_FILES[2]))
        (folder / SIDECAR_FILES[0]).write_text(_written(config), encoding="utf-8")

    def __len__(self) -> int:
        return self.backend.get_vocab_size()

    def id(self, token: str) -> int | None:
        """The id of a token, or None."""
        return self.backend.token_to_id(token)

    @property
    def added(self) -> dict[str, tokenizers.AddedToken]:
        """Tokens that are matched in a text before pre-tokenization, by their text."""
        return {token.content: token for token in self.backend.get_added_tokens_decoder().values()}

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: any text.
            special: parse special tokens, unless `splits_special`; False: encode them like any
                other text.
        Raises:
            ValueError: the vocabulary is a word list without a word of the text, or the text has
                half of a surrogate pair.
        """
        text = joined(text)
        if self.words is not None:
            return word_list.encode(text, self.words)
        with _LOCK:
            self.backend.encode_special_tokens = self.splits_special or not special
            try:
                return self.backend.encode(text, add_special_tokens=False).ids
            finally:
                self.backend.encode_special_tokens = False

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids without special tokens.

        Raises:
            ValueError: an id is negative.
        """
        below = next((i for i, token in enumerate(ids) if token < 0), None)
        if below is not None:
            raise ValueError(
                f"the id at position {below} is {ids[below]}, expected token ids from 0 on; leave "
                "out -100, which marks labels"
            )
        if self.words is None:
            return self.backend.decode(list(ids), skip_special_tokens=True)
        return word_list.decode(self.backend.id_to_token(int(i)) for i in ids)

    def continuation(self, ids: Sequence[int]) -> str:
        """Text of token ids that follow other text, with the white space they begin with.

        Decoders of sentencepiece vocabularies drop the space before the first word of a text.
        """
        if self.words is not None:
            return self.decode(ids)
        before = self.encode("a", special=False)
        return self.decode([*before, *ids])[len(self.decode(before)) :]

    def grown(self, words: Sequence[str]) -> Tokenizer:
        """A copy of a word-level tokenizer with more words, whose ids follow the others.

        Args:
            words: words of any case and language, or marks; see `word_list.pieces`.
        Raises:
            ValueError: the vocabulary is not a word list, or a word is not valid.
        """
        if self.words is None:
            raise ValueError("only a vocabulary of whole words can grow; this one encodes any text")
        new = word_list.missing(words, self.words)
        word_list.check_new(new)
        entries = sorted(self.words, key=self.words.get)
        return Tokenizer(word_list.backend([*entries, *new]), self.template, self.names)


def parse(text: str, source: Path | str) -> tokenizers.Tokenizer:
    """The tokenizer that the text of a tokenizer.json describes.

    Args:
        text: JSON.
        source: the file, for errors.

    Raises:
        ValueError: it does not describe a tokenizer.
    """
    from tokenizers import Tokenizer as Backend

    try:
        return Backend.from_str(text)
    except BaseException as error:  # a plain Exception, or a panic that derives from none
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        what = f"is not a valid tokenizer.json ({error})" if text.strip() else "is empty"
        raise ValueError(f"{source} {what}; download it again") from error


def joined(text: str) -> str:
    """The text with each surrogate pair joined to its character, as in JSON.

    Raises:
        ValueError: half of a pair stands alone, because the text was cut inside a character.
    """
    if not HALF.search(text):
        return text
    if half := HALF.search(PAIR.sub("  ", text)):
        at = half.start()
        raise ValueError(
            f"text {text[max(0, at - 20) : at + 20]!r} has half of a surrogate pair, "
            f"{half[0]!r}, at position {at}; it was cut inside a character: cut it elsewhere, or "
            "remove the half"
        )
    return PAIR.sub(lambda pair: pair[0].encode("utf-16", "surrogatepass").decode("utf-16"), text)


def _splits_special(config: str | None) -> bool:
    """Whether the text of a tokenizer_config.json asks for special tokens as plain text."""
    found = json.loads(config) if config else {}
    return isinstance(found, dict) and found.get(SPLIT) is True


def _is_word_level(backend: Any) -> bool:
    return type(backend.model).__name__ == "WordLevel"


def _added(folder: Path, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Added tokens of the sidecar files: text to id (or None) and flags."""
    further = [config.get("additional_special_tokens"), config.get("extra_special_tokens")]
    lists = [list(x.values()) if isinstance(x, Mapping) else list(x or ()) for x in further]
    named = [config[name] for name in NAMES if config.get(name)] + lists[0] + lists[1]
    special = dict.fromkeys(map(_content, named))
    found: dict[str, dict[str, Any]] = {}
    for number, entry in config.get("added_tokens_decoder", {}).items():
        if not number.isdecimal():
            raise ValueError(f"added_tokens_decoder has the key {number[:80]!r}, expected an id")
        found[entry["content"]] = {**entry, "id": int(number)}
    for text, number in _read(folder / SIDECAR_FILES[2]).items():
        found.setdefault(text, {"id": number, "normalized": text not in special})
    for text in special:
        found.setdefault(text, {"id": None, "normalized": False})["special"] = True
    return found


def _add(backend: tokenizers.Tokenizer, added: Mapping[str, dict[str, Any]], folder: Path) -> None:
    """Registers added tokens in the order of their ids, then those without an id.

    Raises:
        ValueError: a token gets another id than the published one.
    """
    from tokenizers import AddedToken

    there = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for text, entry in sorted(added.items(), key=lambda e: (e[1]["id"] is None, e[1]["id"] or 0)):
        if text in there and (there[text].special or not entry.get("special")):
            continue
        known = backend.token_to_id(text) is not None
        given = {flag: bool(entry[flag]) for flag in flags if flag in entry}
        backend.add_tokens([AddedToken(text, **given)])
        if not known and entry["id"] not in (None, backend.token_to_id(text)):
            raise ValueError(
                f"{folder}: {text!r} has id {entry['id']} in {SIDECAR_FILES[0]} or "
                f"{SIDECAR_FILES[2]}, but tokenizer.json ends at {backend.token_to_id(text) - 1}; "
                "the files are of different tokenizers"
            )


def _names(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by their names in templates."""
    return {name: _content(config[name]) for name in NAMES if config.get(name)}


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _state(backend: tokenizers.Tokenizer) -> dict[str, Any]:
    """Keys of tokenizer_config.json that transformers takes from stored truncation and padding."""
    state: dict[str, Any] = {}
    if backend.truncation is not None:
        state["truncation_side"] = backend.truncation["direction"]
    if padding := backend.padding:
        state["padding_side"] = padding["direction"]
        state["pad_token"] = padding["pad_token"]
        state["pad_token_type_id"] = padding["pad_type_id"]
    return state


def _files(folder: Path) -> dict[str, str]:
    """Texts of the files that describe a tokenizer beside its vocabulary, by path."""
    names = (*SIDECAR_FILES, CHAT, PROCESSOR_FILES[0])
    found = [folder / name for name in names if present(folder / name)]
    found += sorted(folder.glob(f"{MORE_CHATS}/*.jinja"))
    return {file.relative_to(folder).as_posix(): read_text(file) for file in found}


def remove(folder: Path, keep: Sequence[str] = ()) -> None:
    """Removes the files of a tokenizer from a folder, but those of some names."""
    for name in TOKENIZER:
        if name not in keep:
            (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / MORE_CHATS, ignore_errors=True)


def _config(folder: Path) -> dict[str, Any]:
    """Entries of tokenizer_config.json, and those that only special_tokens_map.json has."""
    return {k: v for name in reversed(SIDECAR_FILES[:2]) for k, v in _read(folder / name).items()}


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template of a folder."""
    return find(folder, config.get("chat_template"))


def _is_file(name: Any, text: Any) -> bool:
    """Whether this may be an entry of `Tokenizer.files`, which `save` writes."""
    if not isinstance(name, str) or not isinstance(text, str):
        return False
    return name in TOKENIZER or re.fullmatch(rf"{MORE_CHATS}/[^/\\]+\.jinja", name) is not None


def _written(config: Mapping[str, Any]) -> str:
    """JSON text of a tokenizer_config.json."""
    return json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True) + "\n"


def _read(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if the file does not exist."""
    return read_json(file) if present(file) else {}
