"""Conversion of texts and dicts to messages."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmdlm.messages import (
    Example,
    Media,
    Message,
    Slot,
    Text,
    assistant,
    conversation,
    is_conversation,
    merge,
    user,
)

IMAGE = np.zeros((4, 4, 3), np.uint8)


def test_text_is_a_user_message():
    (message,) = conversation("hi")
    assert (message.role, message.text) == ("user", "hi")


def test_content_parts_of_openai_and_transformers_become_parts_in_order():
    content = [
        "look at ",
        {"type": "image", "image": IMAGE},
        {"type": "text", "text": " and "},
        {"type": "image_url", "image_url": {"url": "cat.jpg"}},
        {"type": "image", "path": "dog.jpg"},
        {"type": "audio", "audio": "a.wav"},
    ]
    system, message = conversation(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
    )
    assert (system.role, system.text) == ("system", "Be brief.")
    kinds = [part.kind if isinstance(part, Media) else part.text for part in message.parts]
    assert kinds == ["look at ", "image", " and ", "image", "image", "audio"]
    items = [part.item for part in message.parts if isinstance(part, Media)]
    assert items[0] is IMAGE
    assert items[1:] == ["cat.jpg", "dog.jpg", "a.wav"]
    assert message.text == "look at  and "


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "video", "video": "a.mp4"}], "holds the part"),
        ([{"type": "image"}], "holds the part"),
        ([{"type": "text", "text": 3}], "holds the part"),
        (3, "content of type int"),
    ],
)
def test_unknown_parts_are_named(content, message):
    with pytest.raises(ValueError, match=message):
        conversation([{"role": "user", "content": content}])


def test_further_keys_are_kept_for_the_template():
    call = {"id": "1", "function": {"name": "add", "arguments": {"a": [1, None, True]}}}
    given = {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None}
    (message,) = conversation([given])
    assert message.extra == {"tool_calls": [call]}
    assert (message.parts, message.text) == ((), "")
    assert set(message.strings) >= {"id", "1", "function", "name", "add", "arguments", "a"}
    (named,) = conversation([{"role": "user", "content": "hi", "name": "me"}])
    assert (named.text, named.extra) == ("hi", {"name": "me"})


def test_objects_do_not_reach_a_template():
    with pytest.raises(TypeError, match="message 0, key 'metadata' holds a object, expected text"):
        conversation([{"role": "user", "content": "hi", "metadata": {"x": object()}}])


def test_message_objects_of_the_openai_client_are_read():
    class Reply:
        def model_dump(self):
            return {"role": "assistant", "content": "yes", "refusal": None, "audio": None}

    given = [{"role": "user", "content": "hi"}, Reply(), {"role": "user", "content": "why"}]
    assert is_conversation(given)
    assert [message.text for message in conversation(given)] == ["hi", "yes", "why"]
    assert conversation(given)[1].extra == {}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("hi", False),
        (["hi", "there"], False),
        ([{"role": "user", "content": "hi"}], True),
        ([user("hi")], True),
        ([[user("hi")]], False),
        ([], False),
        (Example((user("hi"),)), True),
    ],
)
def test_is_conversation(given, expected):
    assert is_conversation(given) is expected


def test_branches_continue_the_shared_message():
    shared = user(Media("image", IMAGE))
    branches = tuple(
        (user(question), assistant(Slot("text", 2, answer)))
        for question, answer in (("what ?", "red"), ("how many ?", "two"))
    )
    example = Example((shared,), branches)
    assert [turn[:2] for turn in example.turns] == [("what ?", "red"), ("how many ?", "two")]
    first = example.conversations[0]
    assert [message.role for message in first] == ["user", "assistant"]
    assert isinstance(first[0].parts[0], Media)
    assert example.media("image") == [IMAGE]
    assert example.media("audio") == []


def test_adjacent_conversation_one_role_are_merged():
    merged = merge((user("a"), user("b"), assistant("c")))
    assert [message.role for message in merged] == ["user", "assistant"]
    assert [message.text for message in merged] == ["ab", "c"]
    results = [Message("tool", (Text(x),), {"tool_call_id": x}) for x in "ab"]
    assert merge(results) == tuple(results)


def test_roles_are_checked():
    with pytest.raises(ValueError, match="role is 'robot'"):
        Message("robot", (Text("hi"),))


def test_token_ids_are_not_text():
    assert user(Text(torch.tensor([1, 2])), "hi").text == "hi"
