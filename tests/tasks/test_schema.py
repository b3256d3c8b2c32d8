import json
import math
import random
import warnings

import pytest
import torch

import mmdlm
from adapters.mlp import MLP
from encoders.vit import ViT
from mmdlm.commands.main import main
from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.scores.gumbel import Gumbel
from mmdlm.decoding.scores.random_order import RandomOrder
from mmdlm.model import MultimodalDLM
from mmdlm.tasks.scaffold import instruction, scaffold
from mmdlm.tasks.schema import Text, parse

pytestmark = pytest.mark.filterwarnings("ignore:what the model wrote was changed")
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "description": "full name"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "height": {"type": "number"},
        "alive": {"type": "boolean"},
        "job": {"enum": ["painter", "poet", "queen"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 2},
        "home": {
            "type": "object",
            "properties": {"town": {"type": ["string", "null"]}, "zip": {"const": 'a"b'}},
        },
    },
}
# Typical pieces of generated JSON, most of them invalid inside a value.
PIECES = ['"', '",', '\\"', "\\", "\n", "<none>", "null", "42", "-", ".", "e9", "\\ud800", "{", "]"]


def valid(value, schema, root=None) -> bool:
    """Whether a value conforms to a schema; only the keywords used here, as in the standard."""
    root = schema if root is None else root
    if "$ref" in schema:
        return valid(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    if "anyOf" in schema and not any(valid(value, part, root) for part in schema["anyOf"]):
        return False
    same = [json.dumps(value)] if "enum" in schema or "const" in schema else []
    listed = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if same and same[0] not in [json.dumps(x) for x in listed]:
        return False
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(of_type(value, kind) for kind in kinds):
        return False
    if isinstance(value, str):
        return len(value) <= schema.get("maxLength", math.inf)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (
            schema.get("minimum", -math.inf) <= value <= schema.get("maximum", math.inf)
            and value > schema.get("exclusiveMinimum", -math.inf)
            and value < schema.get("exclusiveMaximum", math.inf)
        )
    if isinstance(value, list):
        size = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", math.inf)
        return size and all(valid(item, schema.get("items", {}), root) for item in value)
    if isinstance(value, dict) and "properties" in schema:
        parts = schema["properties"]
        return list(value) == list(parts) and all(valid(value[n], parts[n], root) for n in parts)
    return True


def of_type(value, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer":
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    kinds = {"string": str, "number": int | float, "null": type(None), "array": list}
    return isinstance(value, kinds.get(kind, dict if kind == "object" else ()))


def random_schema(rng: random.Random, depth: int = 0) -> dict:
    names = rng.sample(["name", "näme", 'a "b"', "c\\d", "1", "a\nb", "<none>", "zip"], 3)
    parts = {name: random_part(rng, depth) for name in names[: rng.randint(1, 3)]}
    return {"type": "object", "properties": parts, "required": list(parts)[:1]}


def random_part(rng: random.Random, depth: int) -> dict:
    leaf = random_leaf(rng)
    kind = rng.randrange(8 if depth < 2 else 6)
    if kind < 4:
        return leaf
    if kind == 4:
        return {"anyOf": [leaf, {"type": "null"}]}
    if kind == 5:
        most = rng.randint(0, 3)
        return {
            "type": "array",
            "items": leaf,
            "maxItems": most,
            "minItems": rng.randint(0, most),
        }
    return random_schema(rng, depth + 1)


def random_leaf(rng: random.Random) -> dict:
    low = rng.randint(-2000, 2000)
    bounds = {"minimum": low, "maximum": low + rng.choice([0, 3, 500])}
    edges = {"exclusiveMinimum": low, "exclusiveMaximum": low + 2}
    values = ["red", 'dark "red"', "", 7, 2.5, True, None, [1, "x"], "redder"]
    return rng.choice(
        [
            {"type": "string"},
            {"type": "string", "maxLength": rng.randint(0, 5)},
            {"type": "string", "x-tokens": 3, "maxLength": 2},
            {"type": ["string", "null"], "x-tokens": 4},
            {"type": "integer"},
            {"type": "integer", **rng.choice([bounds, edges, {"minimum": 10**6}])},
            {"type": "number", **rng.choice([bounds, edges, {"maximum": -0.5}, {}])},
            {"type": ["number", "null"]},
            {"type": "boolean"},
            {"enum": rng.sample(values, rng.randint(1, 5))},
            {"const": rng.choice(values)},
            {"type": "string", "enum": ["one", "two", "twofold"]},
        ]
    )


@pytest.fixture(scope="module")
def build(speller):
    """build(seed, **spec): a random model with bytes and pieces of JSON as vocabulary."""

    def make(seed: int = 0, **spec):
        model = speller(added=PIECES, **spec)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.backbone.parameters():
                weight.normal_(std=(0.2, 0.5, 1.0)[seed % 3], generator=generator)
        return model

    return make


@pytest.fixture(scope="module")
def model(build):
    return build()


@pytest.mark.parametrize("seed", range(30))
def test_result_always_conforms_to_the_schema(build, seed) -> None:
    rng = random.Random(seed)
    model = build(seed, shift=bool(seed % 2), attention=("full", "prefix")[seed // 2 % 2])
    schema = random_schema(rng)
    ways = [[Threshold(rng.choice([0.0, 0.01, 0.3]))], [Gumbel(1.0), Threshold(0.02)]]
    ways.append([RandomOrder(), Gumbel(0.5)])
    given = {"prompt": "x", "slot": rng.randint(1, 8), "fence": bool(seed % 2), "seed": seed}
    text = mmdlm.infill(model, schema, strategies=ways[seed % 3], **given)
    value = json.loads(text)
    assert valid(value, schema), (value, schema)
    assert text == json.dumps(value, indent=2, ensure_ascii=False)
    text.encode()


def test_any_slot_ids_are_parsed_as_values_of_the_schema(model) -> None:
    rng = random.Random(0)
    pieces = [model.tokenizer.id(piece) for piece in PIECES]
    for _ in range(300):
        schema = random_schema(rng)
        made = scaffold(model, schema, rng.randint(1, 9))
        tokens = made.tokens.tolist()
        for slot in made.slots:
            for i in range(slot.start, slot.stop):
                tokens[i] = rng.choice([*pieces, rng.randrange(len(model.tokenizer))])
        value, _ = made.read(model.tokenizer, tokens)
        value = json.loads(json.dumps(value, allow_nan=False))
        assert valid(value, schema), (value, schema)


def test_warning_names_ten_changed_values_and_counts_the_others(model) -> None:
    item = {"type": "integer", "minimum": 10**12, "x-tokens": 2}
    schema = {"properties": {"n": {"type": "array", "items": item, "minItems": 14, "maxItems": 14}}}
    with pytest.warns(UserWarning, match=r"n\[9\] .*; and 4 more$") as found:
        value = json.loads(mmdlm.infill(model, schema, prompt="x", strategies="one_step"))
    assert value == {"n": [10**12] * 14}
    assert "n[10]" not in str(found[0].message)


def test_validator_rejects_invalid_values() -> None:
    person = {"name": "Ada", "age": 36, "height": 1.6, "alive": False, "job": "poet", "tags": []}
    person["home"] = {"town": None, "zip": 'a"b'}
    assert valid(person, PERSON)
    wrong = [("age", 151), ("age", "1"), ("age", True), ("height", None), ("alive", 1)]
    wrong += [("job", "king"), ("tags", ["a"] * 3), ("tags", ["abcde"]), ("name", 1), ("home", {})]
    assert not any(valid(person | {name: value}, PERSON) for name, value in wrong)


@pytest.fixture(scope="module")
def golden_cases(golden):
    file = golden / "decoding" / "schema.json"
    return json.loads(file.read_text())["methods"]["schema_template"]["cases"]


def test_canvas_equals_that_of_s3(speller, golden_cases) -> None:
    model = speller()  # byte-level, since the golden cases use single letters
    assert len(golden_cases) == 20
    for case in golden_cases:
        fields, fence = case["params"]["fields"], case["params"]["include_codeblock"]
        parts = {name: {"type": "string", "x-tokens": size} for name, size in fields}
        made = scaffold(model, {"properties": parts}, fence=fence)
        mask = model.spec.mask_id
        # There, a token is the code point of a letter, and -1 the mask.
        letters = [-1 if t == mask else ord(model.tokenizer.decode([t])) for t in made.tokens]
        assert letters == case["output"]["tokens"]
        places = [list(range(slot.start, slot.stop)) for slot in made.slots]
        assert places == case["output"]["value_positions"]


def test_lines_are_tokenized_as_in_s3(model, monkeypatch) -> None:
    told: list[str] = []
    encode = model.tokenizer.encode
    monkeypatch.setattr(
        model.tokenizer, "encode", lambda t, special=True: special or told.append(t) or encode(t)
    )
    monkeypatch.setattr(
        "mmdlm.processor.Processor.encode", lambda processor, text: torch.tensor([32])
    )
    scaffold(model, {"properties": {"a": {"type": "string"}, "b": {"type": "string"}}})
    assert told == ["```json\n", "{\n", '  "a": "', '",\n', '  "b": "', '"\n', "}", "\n```"]


def written(model, schema, *texts: str, **given):
    """Parsed value for slots with these texts, padded with spaces."""
    made = scaffold(model, schema, **given)
    tokens = made.tokens.tolist()
    for slot, text in zip(made.slots, texts, strict=True):
        ids = model.tokenizer.encode(text)
        ids += [model.tokenizer.encode(" ")[0]] * (slot.stop - slot.start - len(ids))
        tokens[slot.start : slot.stop] = ids[: slot.stop - slot.start]
    return made.read(model.tokenizer, tokens)


def test_values_are_parsed(model) -> None:
    value, notes = written(
        model, PERSON, "Ada Lovelace", "36", "1.65", "false", 'poet"', "math", "x", "<none><none>"
    )
    assert notes == []
    assert value == {
        "name": "Ada Lovelace",
        "age": 36,
        "height": 1.65,
        "alive": False,
        "job": "poet",
        "tags": ["math", "x"],
        "home": {"town": None, "zip": 'a"b'},
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('Ada",\n  "age": 3', "Ada"),
        ('say \\"hi\\"', 'say "hi"'),
        ("a\\nb\\u00e9\\/", "a\nbé/"),
        ("a\nb\tc", "a\nb\tc"),
        ("back\\", "back"),
        ("\\x y", "\\x y"),
        ("\\ud83d\\ude00", "😀"),
        ("\\ud83d", "\ufffd"),
        ("<none>", ""),
        ("Ada<none><none>", "Ada"),
        ("  Ada  ", "Ada"),
        ("", ""),
    ],
)
def test_quotes_end_strings_and_control_characters_are_escaped(text, value) -> None:
    assert Text(16).read(text) == value
    assert json.loads(json.dumps(value)) == value
    assert Text(16, nullable=True).read("<none> <none>") is None


def test_lists_drop_empty_items_down_to_min_items(model) -> None:
    items = {"type": "array", "items": {"type": "string"}, "maxItems": 3}
    schema = {"properties": {"tags": items}}
    assert written(model, schema, "a", "<none>", "b")[0] == {"tags": ["a", "b"]}
    assert written(model, schema, "<none>", "", "<none>")[0] == {"tags": []}
    items["minItems"] = 2
    assert written(model, schema, "<none>", "a", "<none>")[0] == {"tags": ["", "a"]}
    items |= {"items": {"type": "number"}, "minItems": 1}
    assert written(model, schema, "1", "", "3")[0] == {"tags": [1, 3]}
    items["items"] = {"enum": ["x", "y"]}
    assert written(model, schema, '"x"', "null", '"y"')[0] == {"tags": ["x", "y"]}


def test_changed_values_warn(model) -> None:
    schema = {"properties": {"n": {"type": "integer", "minimum": 3}, "k": {"enum": ["ab", "cd"]}}}
    value, notes = written(model, schema, "1", "ad")
    assert value == {"n": 3, "k": "ab"}
    assert notes[0] == "n '1' to 3"
    assert notes[1].startswith("k 'ad")
    schema = {"properties": {"n": {"type": "integer", "minimum": 10**7}}}
    with pytest.warns(UserWarning, match=r"changed to fit the schema: n '\d+' to 10000000"):
        mmdlm.infill(model, schema, prompt="x", strategies=[Threshold(0.0)])


def test_details_of_a_schema_distinguish_known_from_filled(model) -> None:
    answer = mmdlm.infill(model, PERSON, prompt="x", strategies="one_step", details=True)
    made = scaffold(model, PERSON)
    assert len(answer.tokens) == len(made.tokens)
    known = made.tokens != model.spec.mask_id
    assert torch.equal(torch.tensor(answer.tokens)[known], made.tokens[known])
    assert torch.equal(torch.tensor(answer.step) == -1, known)
    assert answer.forwards == 1
    assert valid(json.loads(answer.text), PERSON)


def test_generated_values_need_no_change(build) -> None:
    schema = {
        "properties": {
            "n": {"type": "integer"},
            "x": {"type": "number"},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "rate": {"type": "integer", "minimum": 1, "maximum": 5},
            "ok": {"type": "boolean"},
            "kind": {"enum": ["cat", "cattle", "dog", None]},
        }
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(6):
            model = build(seed)
            given = {"strategies": [Threshold(0.02)], "details": True, "fence": False}
            answer = mmdlm.infill(model, {"properties": schema["properties"]}, prompt="x", **given)
            written = json.loads(answer.text)
            line = model.tokenizer.decode(answer.tokens).split("\n")[4]
            assert line.split() == ['"rate":', f"{written['rate']},"]


def test_list_of_schemas_equals_single_schemas(model) -> None:
    other = {"properties": {"x": {"type": "boolean"}}}
    fast = {"strategies": [Threshold(0.05)]}
    asked = [PERSON, other, PERSON]
    together = mmdlm.infill(model, asked, prompt=["hi", "hello there", "you"], **fast)
    alone = [
        mmdlm.infill(model, one, prompt=prompt, **fast)
        for one, prompt in zip(asked, ["hi", "hello there", "you"], strict=True)
    ]
    assert together == alone
    assert mmdlm.infill(model, other, prompt=["hi", "you"], **fast) == [
        mmdlm.infill(model, other, prompt=prompt, **fast) for prompt in ("hi", "you")
    ]


def test_canvas_is_padded_with_end_tokens(model) -> None:
    schema = {"properties": {"x": {"type": "boolean"}}}
    size = len(scaffold(model, schema).tokens)
    wide = mmdlm.infill(model, schema, prompt="x", length=size + 5, details=True)
    assert len(wide.tokens) == size
    with pytest.raises(
        ValueError, match=f"length is {size - 1}, but the schema takes {size} tokens"
    ):
        mmdlm.infill(model, schema, prompt="x", length=size - 1)


def test_schema_of_constants_takes_no_forward(model) -> None:
    schema = {"properties": {"v": {"const": 1}, "w": {"type": "null"}}}
    answer = mmdlm.infill(model, schema, prompt="x", details=True)
    assert (json.loads(answer.text), answer.forwards) == ({"v": 1, "w": None}, 0)


def test_pydantic_schema_is_parsed(model) -> None:
    schema = {
        "$defs": {"Town": {"properties": {"zip": {"type": "string", "title": "Zip"}}}},
        "properties": {
            "home": {"$ref": "#/$defs/Town", "description": "where"},
            "work": {"anyOf": [{"$ref": "#/$defs/Town"}, {"type": "null"}], "default": None},
            "age": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None},
        },
        "required": ["home"],
        "title": "Person",
        "type": "object",
    }
    value = json.loads(mmdlm.infill(model, schema, prompt="x", strategies="one_step"))
    assert list(value) == ["home", "work", "age"]
    assert list(value["home"]) == list(value["work"]) == ["zip"]


def test_schema_with_images(model, make_model, images) -> None:
    vit = ViT.tiny()
    torch.manual_seed(0)
    sees = {"image": MLP(vit.dim, model.spec.transformer.width)}
    seer = MultimodalDLM(model.spec, {"image": vit}, sees, model.tokenizer).eval()
    found = mmdlm.infill(seer, PERSON, images[:3], strategies=[Threshold(0.01)])
    assert all(valid(json.loads(text), PERSON) for text in found)
    assert found[1] == mmdlm.infill(seer, PERSON, images[1], strategies=[Threshold(0.01)])
    with pytest.raises(ValueError, match="only 22 words and cannot represent JSON"):
        mmdlm.infill(make_model(), PERSON, images[0])


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "string", "pattern": "a+"}, "schema.x has 'pattern', which is not supported"),
        ({"type": "string", "format": "date"}, "'format'"),
        ({"type": "string", "minLength": 1}, "x.minLength is not supported"),
        ({"type": "string", "maxLength": -1}, "maxLength is -1"),
        ({"type": "string", "x-tokens": 0}, "x-tokens is 0"),
        ({"type": "number", "multipleOf": 2}, "'multipleOf'"),
        ({"type": "number", "minimum": 2, "maximum": 1}, "no value between 2 and 1"),
        ({"type": "number", "minimum": "2"}, "minimum is '2'"),
        ({"type": "integer", "exclusiveMinimum": 1, "maximum": 1}, "no value between 2 and 1"),
        ({"type": "integer", "x-tokens": 65}, "at most 64"),
        ({"type": "array", "items": {"type": "string"}}, "has no maxItems"),
        ({"type": "array", "maxItems": 2}, "x.items is None"),
        ({"type": "array", "items": {}, "maxItems": 2}, "x.items has type None"),
        (
            {"type": "array", "maxItems": 1, "minItems": 2},
            r"minItems 2, expected at most maxItems \(1\)",
        ),
        ({"type": "array", "maxItems": 2, "items": {"properties": {"y": {}}}}, "y has type None"),
        ({"type": "date"}, "type 'date', expected one of string, integer"),
        ({"enum": []}, "no value"),
        ({"type": "integer", "enum": ["a"]}, r"no value of type integer in \['a'\]"),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "2 types besides null"),
        ({"$ref": "#/$defs/y"}, "refers to '#/\\$defs/y', which is not in the schema"),
        ({"$ref": "#/properties/x"}, "refers to itself"),
        ({"properties": {}, "required": ["y"]}, r"requires \['y'\]"),
        (3, "schema.x is 3"),
    ],
)
def test_unsupported_keywords_are_rejected(part, message) -> None:
    with pytest.raises(ValueError, match=message):
        parse({"properties": {"x": part}})


def test_invalid_schemas_are_rejected(model) -> None:
    with pytest.raises(TypeError, match="schema is a list"):
        parse([])
    with pytest.raises(ValueError, match="does not describe an object"):
        parse({"type": "string"})
    with pytest.raises(ValueError, match="slot is 0"):
        parse(PERSON, 0)
    with pytest.raises(ValueError, match="needs an instruction or an image; pass prompt="):
        mmdlm.infill(model, PERSON)
    with pytest.raises(TypeError, match="one kind per call"):
        mmdlm.infill(model, [PERSON, "a [MASK]"], prompt="x")
    with pytest.raises(ValueError, match="2 templates and 3 prompts"):
        mmdlm.infill(model, [PERSON, PERSON], prompt=["x"] * 3)


def test_instruction_lists_the_properties() -> None:
    text = instruction(PERSON, "Ada, 36")
    assert "- name: full name\n- age\n" in text
    assert "<none>" in text
    assert text.endswith("\n\nAda, 36")


@pytest.fixture
def loaded(model, monkeypatch):
    monkeypatch.setattr("mmdlm.checkpoint.load", lambda *args, **options: model)
    return model


def test_command_prints_json_of_a_schema_file(loaded, tmp_path, capsys) -> None:
    file = tmp_path / "person.json"
    file.write_text(json.dumps(PERSON))
    given = ["infill", "--schema", str(file), "--prompt", "Ada", "--decoding", "one_step"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(given) == 0
        assert valid(json.loads(capsys.readouterr().out), PERSON)
        assert main([*given, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["file"] is None
    assert valid(json.loads(record["text"]), PERSON)
    assert main([*given, "a.png"]) == 2
    assert "takes text only, not image" in capsys.readouterr().err
    file.write_text("{")
    assert main(given) == 2
    assert "person.json is no JSON" in capsys.readouterr().err
    assert main(["infill"]) == 2
    assert "--schema" in capsys.readouterr().err
