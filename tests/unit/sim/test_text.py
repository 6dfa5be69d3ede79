"""Tokens, plans and invented tool arguments."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascproxy.sim import text


@given(st.text())
def test_pieces_lose_nothing(said: str) -> None:
    assert "".join(text.pieces(said)) == said
    assert text.count(said) == len(text.pieces(said))


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_detokenize_undoes_tokenize(said: str) -> None:
    vocabulary = text.Vocabulary()
    ids = vocabulary.encode(said)
    assert vocabulary.decode(ids) == said
    assert vocabulary.encode(said) == ids


def test_a_full_vocabulary_falls_back_to_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MAX_LEARNED", 1)
    vocabulary = text.Vocabulary()
    assert vocabulary.encode("one") == [256]
    assert vocabulary.encode("é") == list("é".encode())
    assert vocabulary.decode([256, *"é".encode()]) == "oneé"
    assert vocabulary.decode([9999]) == "\ufffd"


@pytest.mark.parametrize(
    ("length", "limit", "ignore_eos", "tokens", "finish"),
    [
        (16, None, False, 16, "stop"),
        (16, 4, False, 4, "length"),
        (16, 100, False, 16, "stop"),
        (16, 100, True, 100, "length"),
        (16, 16, False, 16, "length"),
    ],
)
def test_speech_is_as_long_as_asked(length: int, limit: int | None, ignore_eos: bool, tokens: int, finish: str) -> None:
    plan = text.speech(length, limit, marker=None, ignore_eos=ignore_eos)
    assert (len(plan.tokens), plan.finish) == (tokens, finish)


def test_speech_carries_the_marker_and_choices_differ() -> None:
    one = text.speech(4, None, marker="who-1", ignore_eos=False)
    two = text.speech(4, None, marker="who-1", ignore_eos=False, turn=1)
    assert one.text().startswith("who-1") and two.text().startswith("who-1")
    assert one.text() != two.text()


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "object", "properties": {"c": {"type": "boolean"}, "d": {}}, "required": ["c"]}, {"c": False}),
        ({"properties": {"a": {"type": "string"}}}, {"a": "m"}),
        ({"type": "array", "items": {"type": "integer"}, "minItems": 2}, [0, 0]),
        ({"enum": ["x", "y"]}, "x"),
        ({"const": 7}, 7),
        ({"anyOf": [{"type": "number", "minimum": 3}]}, 3),
        ({"type": ["string", "null"]}, "m"),
        (None, None),
    ],
)
def test_instance_fits_the_schema(schema: object, value: object) -> None:
    assert text.instance(schema, "m") == value


def test_instance_of_an_endless_schema_ends() -> None:
    schema: dict[str, object] = {"type": "array"}
    schema["items"] = schema
    assert text.instance(schema) is not None
