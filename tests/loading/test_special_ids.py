"""Folders whose files disagree about special ids, against transformers where it has an opinion."""

import itertools
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Backend

import mmdlm
from mmdlm.checkpoint import load, save, save_published
from mmdlm.commands.about import facts
from mmdlm.decoding.guidance.suppress import Suppress
from mmdlm.tasks.generate import end_ids

FAMILIES = {
    "a2d": "a2d_qwen3",
    "fast_dllm_v2": "fast_dllm_v2",
    "sdar": "sdar",
    "dream": "dream",
    "llada": "llada",
    "llada_moe": "llada_moe",
    "llada2_moe": "llada2_moe",
}
LETTERS = "abcdefghijklmnopqrstuvwxyz \n"
TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|other|>", "<|mask|>", "<|again|>")
TEXT, START, TURN, OTHER, MASK, AGAIN = range(len(LETTERS), len(LETTERS) + len(TOKENS))
NAMES = dict(zip(range(len(LETTERS), len(LETTERS) + len(TOKENS)), TOKENS, strict=True))
NAMED_AGAIN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.content + '<|again|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
)
CONFIG, GENERATION, TOKENIZER, MAP = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
FILES = (CONFIG, GENERATION, TOKENIZER, MAP)

Make = Callable[..., Path]


def put(folder: Path, file: str, **entries: Any) -> None:
    """Adds entries to a JSON file; `...` removes one."""
    path = folder / file
    found = (json.loads(path.read_text()) if path.exists() else {}) | entries
    path.write_text(json.dumps({k: v for k, v in found.items() if v is not ...}))


def say(folder: Path, file: str, name: str, number: int) -> None:
    """Lets a file give an id: as a number, or as the token of the tokenizer."""
    is_text = file in (TOKENIZER, MAP)
    put(folder, file, **{name if is_text else f"{name}_id": NAMES[number] if is_text else number})


@pytest.fixture
def make(golden: Path, tmp_path: Path) -> Make:
    """make(family): a folder whose config.json names no special id, with a tokenizer."""
    count = itertools.count()

    def made(family: str = "sdar", tokens: tuple[str, ...] = TOKENS, bare: bool = False) -> Path:
        folder = tmp_path / f"{family}{next(count)}"
        shutil.copytree(golden / "backbones" / FAMILIES[family], folder)
        ids = dict.fromkeys(("mask_token_id", "eos_token_id", "pad_token_id", "bos_token_id"), ...)
        put(folder, CONFIG, **ids)
        if not bare:
            backend = Backend(models.BPE({c: i for i, c in enumerate(LETTERS)}, []))
            backend.add_tokens([AddedToken(t, special=True, normalized=False) for t in tokens])
            backend.save(str(folder / "tokenizer.json"))
            put(folder, TOKENIZER, tokenizer_class="PreTrainedTokenizerFast")
        return folder

    return made


def theirs(folder: Path) -> dict[str, Any]:
    """What the classes of transformers read from a folder."""
    from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig

    config = PreTrainedConfig.from_pretrained(folder)
    found = {"config": config.to_dict(), "tokenizer": AutoTokenizer.from_pretrained(folder)}
    if (folder / GENERATION).exists():
        found["generation"] = GenerationConfig.from_pretrained(folder)
    return found


def listed(value: int | list[int] | None) -> set[int]:
    return set() if value is None else set(value if isinstance(value, list) else [value])


# The mask token


@pytest.mark.parametrize("file", [*FILES, "tokenizer.json"])
@pytest.mark.parametrize("family", FAMILIES)
def test_mask_token_is_found_in_each_file(family: str, file: str, make: Make) -> None:
    folder = make(family)
    say(folder, CONFIG, "eos_token", TEXT)
    if file != "tokenizer.json":
        say(folder, file, "mask_token", OTHER)
    model = load(folder)
    expected = MASK if file == "tokenizer.json" else OTHER
    assert model.spec.mask_id == expected
    assert file in facts(model)["special ids"].partition("end")[0]
    if file in (TOKENIZER, MAP):
        assert theirs(folder)["tokenizer"].mask_token_id == expected
    with pytest.raises(ValueError, match="holds the mask token"):
        model.prompt(f"a {NAMES[expected]} b", chat=False)


@pytest.mark.parametrize("files", itertools.combinations(FILES, 2))
@pytest.mark.parametrize("family", FAMILIES)
def test_two_mask_tokens_are_rejected_with_both_named(
    family: str, files: tuple[str, str], make: Make
) -> None:
    folder = make(family)
    say(folder, CONFIG, "eos_token", TEXT)
    for file, number in zip(files, (MASK, OTHER), strict=True):
        say(folder, file, "mask_token", number)
    with pytest.raises(ValueError, match=r"contradict each other .* load\(mask_id=") as error:
        load(folder)
    for told in (*files, str(MASK), str(OTHER)):
        assert told in str(error.value)
    assert load(folder, mask_id=OTHER).spec.mask_id == OTHER
    say(folder, files[1], "mask_token", MASK)
    assert load(folder).spec.mask_id == MASK


@pytest.mark.parametrize("rows", ["few", "many"])
@pytest.mark.parametrize("family", FAMILIES)
def test_unknown_mask_token_is_never_guessed(family: str, rows: str, make: Make) -> None:
    folder = make(family, TOKENS[:4])
    say(folder, CONFIG, "eos_token", TEXT)
    if rows == "many":
        enlarge(folder, 160_000)
    with pytest.raises(ValueError, match=r"no file gives the id of the mask token.*load\(mask_id="):
        load(folder, device="meta")
    assert load(folder, device="meta", mask_id=OTHER).spec.mask_id == OTHER


def enlarge(folder: Path, rows: int) -> None:
    """Makes the vocabulary of a checkpoint larger, its weights all zero."""
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / CONFIG).read_text())
    weights = {k: v for f in folder.glob("model*.safetensors") for k, v in load_file(f).items()}
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    ends = ("wte.weight", "embeddings.weight", "embed_tokens.weight", "transformer.ff_out.weight")
    table = {k: v.shape[1] for k, v in weights.items() if k.endswith((*ends, "lm_head.weight"))}
    large = {k: torch.zeros(rows, width, dtype=torch.float16) for k, width in table.items()}
    save_file(weights | large, folder / "model.safetensors")
    put(folder, CONFIG, **{k: rows for k in ("embedding_size", "vocab_size") if k in config})


@pytest.mark.parametrize("name", ["mask_token", "eos_token"])
def test_token_with_two_ids_is_rejected(name: str, make: Make) -> None:
    folder = make()
    say(folder, TOKENIZER, "mask_token", MASK)
    say(folder, TOKENIZER, "eos_token", TEXT)
    number = MASK if name == "mask_token" else TEXT
    decoder = {str(number + 9): {"content": NAMES[number], "special": True}}
    put(folder, TOKENIZER, added_tokens_decoder=decoder)
    message = rf"whose id is in tokenizer.json {number} and tokenizer_config.json {number + 9}"
    with pytest.raises(ValueError, match=message):
        load(folder)
    given = {"mask_id": MASK} if name == "mask_token" else {}
    if given:
        assert load(folder, **given).spec.mask_id == MASK


def test_two_tokens_that_look_like_masks_are_rejected(make: Make) -> None:
    folder = make(tokens=(*TOKENS[:5], "<MASK>"))
    say(folder, CONFIG, "eos_token", TEXT)
    with pytest.raises(ValueError, match=r"tokenizer.json 32 and tokenizer.json 33; correct"):
        load(folder)


@pytest.mark.parametrize("text", ["|<MASK>|", "[MASK]", "<|mdm_mask|>", "<MASK>"])
def test_mask_token_may_be_undeclared(text: str, make: Make) -> None:
    folder = make("fast_dllm_v2", tokens=("<|endoftext|>", "[gMASK]", text))
    say(folder, CONFIG, "eos_token", TEXT)
    assert load(folder).spec.mask_id == TEXT + 2


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_folder_without_tokenizer_has_logits_and_asks_for_its_mask(
    family: str, make: Make, tmp_path: Path
) -> None:
    folder = make(family, bare=True)
    say(folder, CONFIG, "eos_token", 4)
    say(folder, CONFIG, "pad_token", 4)
    put(folder, CONFIG, mask_token_id=None)
    model, ids = load(folder), torch.tensor([[5, 6, 7]])
    logits = model.logits(ids)
    assert logits.isfinite().all()
    assert "mask unknown (not in these files, give load(mask_id=...))" in str(facts(model))
    with pytest.raises(ValueError, match=r"no file .* gives the id of the mask token.*mask_id="):
        mmdlm.decode(model, ids, 4)
    told = load(folder, mask_id=9)
    assert torch.equal(told.logits(ids), logits)
    assert mmdlm.decode(told, ids, 4).tokens.shape == (1, 7)
    save(model, tmp_path / "own")
    save_published(model, tmp_path / "out")
    assert load(tmp_path / "own").spec == load(tmp_path / "out").spec == model.spec


def test_published_mask_id_is_not_told_as_a_fact(make: Make) -> None:
    folder = make("a2d", bare=True)
    say(folder, CONFIG, "eos_token", 151643)
    enlarge(folder, 151936)
    found = facts(load(folder, device="meta"))["special ids"]
    assert "mask 151669 (not in these files, published for a2d)" in found
    assert "end 151643 (config.json)" in found
    assert "also end 151645 (not in these files, published for a2d)" in found


# Ends of an answer


@pytest.mark.parametrize("places", itertools.combinations((*FILES, "template"), 2))
@pytest.mark.parametrize("family", FAMILIES)
def test_ends_of_all_files_add_up(family: str, places: tuple[str, str], make: Make) -> None:
    folder, expected = make(family), set()
    for place, number in zip(places, (OTHER, TEXT), strict=True):
        if place == "template":
            put(folder, TOKENIZER, chat_template=NAMED_AGAIN)
        else:
            say(folder, place, "eos_token", number)
        expected.add(AGAIN if place == "template" else number)
    if "template" not in places:  # no template, or none that ends a turn
        put(folder, TOKENIZER, chat_template="{{ messages[0].content }}")
    model = load(folder)
    assert end_ids(model) == expected
    known = theirs(folder)
    said = listed(known["tokenizer"].eos_token_id) | listed(known["config"].get("eos_token_id"))
    said |= listed(known["generation"].eos_token_id) if "generation" in known else set()
    assert end_ids(model) >= said
    told = facts(model)["special ids"]
    for place in places:
        assert ("the chat template" if place == "template" else place) in told


@pytest.mark.filterwarnings("ignore:the answer filled the canvas")
@pytest.mark.parametrize("place", [*FILES, "template"])
def test_generate_stops_at_the_end_that_one_file_gives(place: str, make: Make) -> None:
    folder = make()
    say(folder, CONFIG, "eos_token", TEXT)
    if place == "template":
        put(folder, TOKENIZER, chat_template=NAMED_AGAIN)
        end = AGAIN
    else:
        put(folder, TOKENIZER, chat_template="{{ messages[0].content }}")
        say(folder, place, "eos_token", AGAIN)
        end = AGAIN
    model = load(folder)
    only = (Suppress(ids=tuple(i for i in range(model.spec.transformer.vocab) if i != end)),)
    answer = mmdlm.generate(model, "abc", length=8, strategies=only, details=True)
    assert (answer.tokens, answer.truncated) == ((), False)
    put(folder, TOKENIZER, chat_template="{{ messages[0].content }}", eos_token=...)
    for file in (GENERATION, MAP):
        (folder / file).unlink(missing_ok=True)
    say(folder, CONFIG, "eos_token", TEXT)
    longer = mmdlm.generate(load(folder), "abc", length=8, strategies=only, details=True)
    assert (len(longer.tokens), longer.truncated) == (8, True)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (NAMED_AGAIN, AGAIN),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n<|im_end|>{% endfor %}", TURN),
        # The header of the next turn is not an end.
        ("{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}<|im_start|>", None),
        ("{% for m in messages %}{{ m.content }}\nNext:<|im_end|>{% endfor %}", None),
        ("{{ messages[0].content }}<|im_end|>", None),
        ("{{ raise_exception('no') }}", None),
        ("{{ nothing.at.all }}", None),
    ],
)
def test_end_is_what_the_template_writes_after_an_answer(
    template: str, expected: int | None, make: Make
) -> None:
    folder = make()
    put(folder, TOKENIZER, chat_template=template)
    say(folder, CONFIG, "eos_token", TEXT)
    assert end_ids(load(folder)) == {TEXT} | listed(expected)


def test_template_of_the_family_has_an_end_as_well(make: Make) -> None:
    folder = make("sdar")
    say(folder, CONFIG, "eos_token", TEXT)
    assert end_ids(load(folder)) == {TEXT, TURN}
    assert end_ids(load(folder, template="plain")) == {TEXT}


def test_ends_that_the_model_cannot_write_are_left_out_with_a_warning(make: Make) -> None:
    folder = make()
    say(folder, CONFIG, "eos_token", TEXT)
    put(folder, GENERATION, eos_token_id=[OTHER, 151645])
    with pytest.warns(UserWarning, match=r"generation_config.json gives \[151645\] as ends, which"):
        assert end_ids(load(folder)) == {TEXT, OTHER, TURN}
    with pytest.raises(ValueError, match=r"stop_ids has \[151645\].*load\(stop_ids=...\)"):
        load(folder, stop_ids=[151645])


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "dream"])
def test_unknown_end_is_an_error(family: str, make: Make) -> None:
    folder = make(family)
    put(folder, TOKENIZER, chat_template="{{ messages[0].content }}")
    with pytest.raises(ValueError, match=r"(eos token|eos_id is).*load\(eos_id=...\)"):
        load(folder)
    assert load(folder, eos_id=OTHER).spec.eos_id == OTHER


# Padding


@pytest.mark.parametrize("files", itertools.permutations(FILES, 2))
def test_padding_has_the_precedence_of_the_files(files: tuple[str, str], make: Make) -> None:
    folder = make("fast_dllm_v2")
    say(folder, CONFIG, "eos_token", TEXT)
    for file, number in zip(files, (OTHER, AGAIN), strict=True):
        say(folder, file, "pad_token", number)
    first = min(files, key=FILES.index)
    model = load(folder)
    assert model.spec.pad_id == (OTHER if files[0] == first else AGAIN)
    known = theirs(folder)["config"].get("pad_token_id")
    assert known is None or model.spec.pad_id == known


def test_padding_that_no_file_gives_is_the_end(make: Make) -> None:
    folder = make()
    say(folder, CONFIG, "eos_token", TEXT)
    model = load(folder)
    assert model.spec.pad_id == TEXT
    told = "padding 28 <|endoftext|> (not in these files, the end is used)"
    assert told in facts(model)["special ids"]


@pytest.mark.parametrize(("name", "field"), [("eos_token", "eos_id"), ("pad_token", "pad_id")])
def test_mask_token_for_something_else_is_rejected(name: str, field: str, make: Make) -> None:
    folder = make()
    say(folder, CONFIG, "eos_token", TEXT)
    say(folder, TOKENIZER, "mask_token", MASK)
    say(folder, CONFIG, name, MASK)
    message = rf"mask_id is {MASK} \(tokenizer_config.json\), and so is {field} \(config.json\)"
    with pytest.raises(ValueError, match=rf"{message}.*load\({field}=...\)"):
        load(folder)
    assert load(folder, **{field: OTHER}).spec.mask_id == MASK


# Overrides


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wrong", [-1, 10**6, "300", 3.5, True, [4, "5"], {"id": 4}])
@pytest.mark.parametrize("name", ["mask", "eos", "pad"])
def test_override_comes_before_the_value_is_checked(
    name: str, wrong: Any, family: str, make: Make
) -> None:
    folder = make(family)
    put(folder, CONFIG, mask_token_id=MASK, eos_token_id=TEXT, pad_token_id=TEXT)
    put(folder, CONFIG, **{f"{name}_token_id": wrong})
    with pytest.raises(ValueError, match=rf"{name}_(token_)?id is .*load\({name}_id=...\)"):
        load(folder, device="meta")
    spec = load(folder, device="meta", **{f"{name}_id": OTHER}).spec
    assert getattr(spec, f"{name}_id") == OTHER


@pytest.mark.parametrize("wrong", [0, -1.0, "10000", None])
def test_rotary_base_given_comes_before_that_of_config_is_checked(wrong: Any, make: Make) -> None:
    folder = make()
    say(folder, CONFIG, "eos_token", TEXT)
    put(folder, CONFIG, rope_parameters={"rope_theta": wrong, "rope_type": "default"})
    if wrong is not None:
        with pytest.raises(ValueError, match=r"rope_theta is .*load\(theta=...\)"):
            load(folder)
    assert load(folder, theta=500.0).spec.transformer.theta == 500.0


@pytest.mark.parametrize(
    ("entry", "given"), [("pad_id", {"pad_id": 3}), ("theta", {"theta": 500.0})]
)
def test_override_of_our_layout_comes_before_the_value_is_checked(
    entry: str, given: dict[str, Any], make: Make, tmp_path: Path
) -> None:
    folder = make()
    say(folder, CONFIG, "eos_token", TEXT)
    save(load(folder), tmp_path / "own")
    config = json.loads((tmp_path / "own" / CONFIG).read_text())
    place = config["spec"] if entry == "pad_id" else config["spec"]["transformer"]
    place[entry] = -1
    (tmp_path / "own" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{entry} is -1"):
        load(tmp_path / "own")
    spec = load(tmp_path / "own", **given).spec
    assert (spec.pad_id, spec.transformer.theta) in ((3, spec.transformer.theta), (TEXT, 500.0))


def test_eos_override_keeps_the_ends_of_the_tokenizer(make: Make) -> None:
    folder = make()
    put(folder, CONFIG, eos_token_id=151643)
    put(folder, GENERATION, eos_token_id=[151643, OTHER])
    say(folder, TOKENIZER, "eos_token", AGAIN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert end_ids(load(folder, eos_id=TEXT)) == {TEXT, AGAIN, TURN}
        assert end_ids(load(folder, eos_id=TEXT, stop_ids=[])) == {TEXT}
    assert "end 28 <|endoftext|> (load)" in facts(load(folder, eos_id=TEXT))["special ids"]
