"""Properties of the native parsers: split anywhere, same events; and equal to a plain model."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from ascproxy import _parsers as native

settings.register_profile("parsers", deadline=None)
settings.load_profile("parsers")


@st.composite
def split(draw, data):
    """The same bytes in pieces, empty ones among them."""
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=8)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def mutated(data, position, byte, how):
    at = position % (len(data) + 1)
    return {
        "keep": data,
        "insert": data[:at] + bytes([byte]) + data[at:],
        "replace": data[:at] + bytes([byte]) + data[at + 1 :],
        "delete": data[:at] + data[at + 1 :],
        "cut": data[:at],
    }[how]


mutations = st.tuples(
    st.integers(0, 4000),
    st.sampled_from(b'"\\{}[]:,0eE+-. \n\r\t\x00\x7f\x80\xc3\xff;aA'),
    st.sampled_from(["keep", "insert", "replace", "delete", "cut"]),
)


# ---- heads

tokens = st.text("abcXYZ019-_.!~", min_size=1, max_size=12).map(str.encode)
values = st.binary(max_size=40).map(lambda v: bytes(b for b in v if b >= 0x20 and b != 0x7F))
framing = st.sampled_from(
    [b"", b"Content-Length: 12\r\n", b"transfer-encoding: chunked\r\n", b"TE: x\r\nExpect: 100-continue\r\n"]
)


@st.composite
def requests(draw):
    fields = b"".join(b"%b: %b\r\n" % pair for pair in draw(st.lists(st.tuples(tokens, values), max_size=6)))
    return b"%b /%b HTTP/1.%d\r\nHost: h\r\n%b%b\r\n" % (
        draw(st.sampled_from([b"GET", b"POST", b"x-y"])),
        draw(st.text("ab/?&=%20", max_size=10)).encode(),
        draw(st.integers(0, 1)),
        draw(framing),
        fields,
    )


@given(requests(), mutations, st.data())
def test_heads_grown_in_any_steps_end_alike(head, mutation, data):
    head = mutated(head, *mutation) + b"trailing"
    whole = native.parse_request(head)
    seen, got = 0, None
    for end in sorted({*data.draw(st.lists(st.integers(1, len(head)), max_size=8)), len(head)}):
        got = native.parse_request(head[:end], seen=seen)
        seen = end
        if got is not None:
            break
    if isinstance(whole, dict):
        assert got == whole
    elif whole is None:
        assert got is None
    else:
        # a byte that is wrong for its line may be noticed only when the line ends
        assert not isinstance(got, dict)


# ---- chunks


def model_of_chunks(data):
    """The grammar of RFC 9112 7.1 without extensions, written the slow way: (payload, rest), or None when it is bad."""
    payload = b""
    while True:
        size, crlf, data = data.partition(b"\r\n")
        if not crlf or not 1 <= len(size) <= 16 or set(size) - set(b"0123456789abcdefABCDEF"):
            return None
        n = int(size, 16)
        if n == 0:
            return (payload, data[2:]) if data.startswith(b"\r\n") else None
        if data[n : n + 2] != b"\r\n":
            return None
        payload += data[:n]
        data = data[n + 2 :]


@given(st.lists(st.binary(min_size=1, max_size=300)), st.binary(max_size=20), st.data())
def test_chunks_give_back_what_was_put_in(payloads, behind, data):
    body = b"".join(native.chunk_size(len(p)) + p + b"\r\n" for p in payloads) + b"0\r\n\r\n"
    result, payload, used, total = native.chunk_decode(data.draw(split(body + behind)))
    assert (result, bytes(payload), used, total) == (native.CHUNK_END, b"".join(payloads), len(body), len(payload))


@given(st.lists(st.binary(min_size=1, max_size=30), max_size=4), mutations, st.data())
def test_damaged_chunks_are_judged_as_by_the_model(payloads, mutation, data):
    body = b"".join(native.chunk_size(len(p)) + p + b"\r\n" for p in payloads) + b"0\r\n\r\n"
    body = mutated(body, *mutation)
    whole = native.chunk_decode([body])
    assert native.chunk_decode(data.draw(split(body))) == whole
    expected = model_of_chunks(body)
    if expected is not None:
        assert whole[0] == native.CHUNK_END
        assert (bytes(whole[1]), body[whole[2] :]) == expected
    elif b";" not in body and b":" not in body:  # extensions and trailers are not in the model
        assert whole[0] != native.CHUNK_END


# ---- JSON

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**15), 10**15)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
)
documents = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4))
counts = st.none() | st.integers(0, 2**63 - 1) | st.integers(0, 2**70)
known = st.fixed_dictionaries(
    {},
    optional={
        "model": texts,
        "stream": st.none() | st.booleans() | st.just("true"),
        "max_tokens": counts,
        "max_completion_tokens": counts,
        "n": counts | st.floats(0, 5),
        "stream_options": st.none()
        | st.fixed_dictionaries({}, optional={"include_usage": st.booleans(), "x": documents})
        | st.just([]),
        "parameters": st.fixed_dictionaries({}, optional={"max_new_tokens": counts, "y": documents}) | scalars,
    },
)


@st.composite
def bodies(draw):
    members = list({**draw(st.dictionaries(texts, documents, max_size=4)), **draw(known)}.items())
    text = json.dumps(
        dict(draw(st.permutations(members))),
        ensure_ascii=draw(st.booleans()),
        indent=draw(st.sampled_from([None, 1])),
        separators=draw(st.sampled_from([None, (",", ":")])),
    )
    return text.encode()


class RefusedError(Exception):
    """The oracle refuses."""


def oracle(data):
    """What json.loads makes of it, made as strict as RFC 8259, as an object whose top-level names are unique."""

    def constant(_):
        raise RefusedError

    def strict(value):
        if isinstance(value, str):
            value.encode()  # a lone surrogate: UnicodeEncodeError
        elif isinstance(value, list | tuple):
            for item in value:
                strict(item)

    try:
        top = json.loads(data.decode(), object_pairs_hook=tuple, parse_constant=constant)
        strict(top)
    except (ValueError, RefusedError):
        return None
    if not isinstance(top, tuple):
        return None
    names = [name for name, _ in top]
    return dict(top) if len(set(names)) == len(names) else None


def well_typed(top):
    """Whether the members that are read have their types: (it is so, what should have been read)."""
    count = lambda v: isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**63  # noqa: E731
    options = top.get("stream_options")
    parameters = top.get("parameters")
    new = [v for k, v in parameters if k == "max_new_tokens"] if is_object(parameters) else []
    usage = [v for k, v in options if k == "include_usage"] if is_object(options) else []
    ordered = [top.get("max_completion_tokens"), top.get("max_tokens"), top.get("max_output_tokens"), *new]
    fine = (
        ("model" not in top or (isinstance(top["model"], str) and len(top["model"].encode()) <= 256))
        and (top.get("stream") is None or isinstance(top["stream"], bool))
        and all(v is None or count(v) for v in [*ordered, top.get("n")])
        and (options is None or is_object(options))
        and all(v is None or isinstance(v, bool) for v in usage)
        and len(new) < 2
        and len(usage) < 2
    )
    return fine, next((v for v in ordered if v is not None), -1)


def is_object(value):
    """An object, as the oracle reads it: an array is a list."""
    return isinstance(value, tuple)


@settings(max_examples=400)
@given(bodies(), mutations, st.data())
def test_requests_are_read_as_json_loads_reads_them(body, mutation, data):
    body = mutated(body, *mutation)
    error, _, fields = native.json_request([body])
    pieces = data.draw(split(body))
    split_error, _, split_fields = native.json_request(pieces, seed=99)
    assert split_error == error
    if error in {native.JSON_NUMBER, native.JSON_DEPTH, native.JSON_KEYS}:
        return
    top = oracle(body)
    if top is None:
        assert error != native.JSON_OK
        return
    fine, tokens = well_typed(top)
    assert error == (native.JSON_OK if fine else native.JSON_FIELD) or (not fine and error == native.JSON_DUPLICATE)
    if error != native.JSON_OK:
        return
    assert split_fields == fields
    assert fields["has_model"] == ("model" in top)
    assert fields["model"].decode() == top.get("model", "")
    if "model" in top:
        assert json.loads(body[fields["model_off"] :][: fields["model_raw_len"]]) == top["model"]
    assert fields["stream"] == {None: -1, False: 0, True: 1}[top.get("stream")]
    assert fields["max_tokens"] == tokens
    assert fields["n"] == (-1 if top.get("n") is None else top["n"])
    assert (fields["options_raw_len"] > 0) == ("stream_options" in top)
    assert fields["empty"] == (not top)


answers = st.fixed_dictionaries(
    {},
    optional={
        "id": texts,
        "usage": st.none()
        | st.fixed_dictionaries(
            {},
            optional={"prompt_tokens": st.integers(0, 2**40), "completion_tokens": st.integers(0, 9), "x": documents},
        ),
        "choices": st.lists(
            st.fixed_dictionaries(
                {},
                optional={
                    "delta": st.fixed_dictionaries({}, optional={"content": st.none() | texts, "y": documents}),
                    "usage": st.just({"prompt_tokens": 77}),
                    "finish_reason": st.sampled_from([None, "stop", "length", "abort"]),
                },
            ),
            max_size=3,
        ),
        "error": st.none() | texts,
        "other": documents,
    },
)


def said(top):
    """What json_facts should say of an answer, from its parsed form."""
    usage = top.get("usage") or {}
    choices = top.get("choices", [])
    reasons = [c.get("finish_reason") for c in choices if c.get("finish_reason")]
    names = {"stop": native.FINISH_STOP, "length": native.FINISH_LENGTH, "abort": native.FINISH_ABORT}
    return {
        "usage_in": usage.get("prompt_tokens", -1),
        "usage_out": usage.get("completion_tokens", -1),
        "finish": names[reasons[-1]] if reasons else native.FINISH_NONE,
        "has_error": top.get("error") is not None,
        "has_content": any((c.get("delta") or {}).get("content") for c in choices),
        "choices_empty": top.get("choices") == [],
    }


@given(answers, st.data(), st.sampled_from([None, (",", ":")]))
def test_answers_are_counted_and_usage_can_be_blanked(answer, data, separators):
    names = data.draw(st.permutations(list(answer)))
    top = {name: answer[name] for name in names}
    text = json.dumps(top, separators=separators).encode()
    fine, facts = native.json_answer([text], native.OPENAI)
    assert native.json_answer(data.draw(split(text)), native.OPENAI) == (fine, facts)
    assert fine
    assert {name: facts[name] for name in said(top)} == said(top)
    off, length = facts["usage_off"], facts["usage_raw_len"]
    assert (length > 0) == ("usage" in top)
    blanked = text[:off] + b" " * length + text[off + length :]
    assert json.loads(blanked) == {k: v for k, v in top.items() if k != "usage"}


# ---- events

lines = st.sampled_from(
    [
        b"data: {}",
        b"data:",
        b"data",
        b": c",
        b"event: message_stop",
        b"id: 1",
        b"data: [DONE]",
        b'data: {"usage":',
        b"{}",
        b"",
    ]
)


@given(st.lists(st.tuples(lines, st.sampled_from([b"\n", b"\r\n", b"\r"])), max_size=12), st.data())
def test_streams_split_anywhere_say_the_same(parts, data):
    stream = b"".join(line + end for line, end in parts)
    for dialect in (native.OPENAI, native.MESSAGES, native.NONE):
        events, state = native.sse([stream], dialect)
        pieces = [p for p in data.draw(split(stream)) if p]
        again, split_state = native.sse(pieces, dialect)
        assert again == events == model_of_events(stream)
        assert {**split_state, "progress": None} == {**state, "progress": None}


def model_of_events(stream):
    """How many events WHATWG HTML 9.2.6 dispatches, the slow way."""
    rows = stream.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n")[:-1]
    events, data = 0, False
    for row in rows:
        if row == "":
            events, data = events + data, False
        elif row.partition(":")[0] == "data":
            data = True
    return events
