"""Replies bound to a schema, an expression, a grammar, tags or a tool, on any machine."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from openai import BadRequestError, OpenAI

from kascade_sglang.servers.demo_model import MODEL_NAME
from kascade_sglang.servers.process import Server
from tests.support.servers import everyday

pytestmark = [pytest.mark.e2e, everyday]

SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "blue"]},
        "count": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["colour", "count"],
    "additionalProperties": False,
}
COLOUR = {"type": "regex", "pattern": "red|blue"}
TAGGED = {"type": "tag", "begin": "<paint>", "end": "</paint>", "content": COLOUR}
TOOL = {"type": "function", "function": {"name": "paint", "parameters": SCHEMA}}
WAYS = {
    "json_schema": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "paint", "schema": SCHEMA},
        }
    },
    "regex": {"extra_body": {"regex": "(red|blue) [0-9]{3}"}},
    "ebnf": {"extra_body": {"ebnf": 'root ::= "red" | "blue"'}},
    "tags": {"extra_body": {"response_format": {"type": "structural_tag", "format": TAGGED}}},
    "tool": {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
    "named tool": {
        "tools": [TOOL],
        "parallel_tool_calls": False,
        "tool_choice": {"type": "function", "function": {"name": "paint"}},
    },
    "free": {},
}


@pytest.fixture
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120)


def ask(client: OpenAI, way: str) -> str:
    """Return what the reply says: its text, or the arguments of the tool that it calls."""
    made = client.chat.completions.create(
        model=MODEL_NAME,
        messages=[{"role": "user", "content": "Name a colour."}],
        max_tokens=64,
        temperature=0,
        **WAYS[way],
    )
    message = made.choices[0].message
    if "tool" not in way:
        return message.content
    (call,) = message.tool_calls
    assert call.function.name == "paint"
    return call.function.arguments


def assert_as_asked(way: str, text: str) -> None:
    if way == "regex":
        assert re.fullmatch("(red|blue) [0-9]{3}", text)
    elif way == "ebnf":
        assert text in ("red", "blue")
    elif way == "tags":
        assert text in ("<paint>red</paint>", "<paint>blue</paint>")
    else:
        painted = json.loads(text)
        assert painted["colour"] in ("red", "blue") and painted["count"] in range(1, 10)
        assert len(painted) == 2


@pytest.mark.parametrize("way", [way for way in WAYS if way != "free"])
def test_replies_keep_to_what_was_asked(client: OpenAI, way: str) -> None:
    assert_as_asked(way, ask(client, way))


def test_json_mode_begins_an_object(client: OpenAI) -> None:
    made = client.chat.completions.create(
        model=MODEL_NAME,
        messages=[{"role": "user", "content": "Name a colour."}],
        max_tokens=16,
        response_format={"type": "json_object"},
    )
    assert made.choices[0].message.content.startswith("{")


def test_bound_and_free_requests_of_one_batch(client: OpenAI) -> None:
    alone = {way: ask(client, way) for way in WAYS}
    ways = [*WAYS, "free", "regex"]
    with ThreadPoolExecutor(len(ways)) as pool:
        together = list(pool.map(lambda way: ask(client, way), ways))
    assert together == [alone[way] for way in ways]
    assert not re.fullmatch("(red|blue) [0-9]{3}", alone["free"])


def test_a_grammar_that_is_none_is_refused_and_nothing_else(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="regex"):
        client.chat.completions.create(
            model=MODEL_NAME,
            messages=[{"role": "user", "content": "Name a colour."}],
            extra_body={"regex": "(red"},
        )
    assert_as_asked("ebnf", ask(client, "ebnf"))
