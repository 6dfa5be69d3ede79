"""Chunked bodies, JSON bodies and event streams three ways: whole, byte by byte, and with trailing data."""

import json

import pytest

from ascproxy import _parsers as native


def single(data):
    return [data[i : i + 1] for i in range(len(data))]


CHUNKED = b'4\r\nwiki\r\n5;x="a;b"\r\npedia\r\nA\r\n\r\n\r\n012345\r\n0\r\nSum: 1\r\n\r\n'


def test_chunks_three_ways():
    whole = native.chunk_decode([CHUNKED])
    assert whole == (native.CHUNK_END, b"wikipedia\r\n\r\n012345", len(CHUNKED), 19)
    assert native.chunk_decode(single(CHUNKED)) == whole
    assert native.chunk_decode([CHUNKED + b"HTTP/1.1 200 OK\r\n"]) == whole


@pytest.mark.parametrize("length", [1, 9, 15, 16, 255, 65536, 2**63 - 1])
def test_chunk_sizes_are_read_back(length):
    line = native.chunk_size(length)
    assert line == b"%x\r\n" % length
    assert native.chunk_decode([line])[0] == native.CHUNK_MORE


def test_chunk_extensions_and_trailers_are_bounded():
    chunk = b"1;" + b"e" * 200 + b"\r\nx\r\n"
    result, payload, _, _ = native.chunk_decode([chunk * 100])
    assert result == native.CHUNK_BAD
    assert len(payload) == 16384 // 200
    assert native.chunk_decode([b"0\r\nt: " + b"x" * 9000])[0] == native.CHUNK_BAD


BODY = json.dumps(
    {
        "messages": [{"role": "user", "content": 'né "quoted" 😀', "model": "other"}],
        "model": "m/é",
        "stream": True,
        "stream_options": {"include_usage": False, "continuous_usage_stats": True},
        "n": 3,
        "max_completion_tokens": 17,
        "max_tokens": 16,
    },
    indent=1,
).encode()


def test_json_three_ways():
    whole = native.json_request([BODY])
    assert whole[0] == native.JSON_OK
    assert native.json_request(single(BODY)) == whole
    assert native.json_request([BODY, b" \r\n\t"])[2] == whole[2]
    assert native.json_request([BODY, b"{}"])[0] == native.JSON_TRAILING


def test_json_says():
    fields = native.json_request([BODY])[2]
    assert fields["model"].decode() == "m/é"
    raw = BODY[fields["model_off"] :][: fields["model_raw_len"]]
    assert raw == b'"m/\\u00e9"'
    options = BODY[fields["options_off"] :][: fields["options_raw_len"]]
    assert json.loads(options) == {"include_usage": False, "continuous_usage_stats": True}
    assert (fields["stream"], fields["n"], fields["max_tokens"]) == (1, 3, 17)
    assert (fields["include_usage"], fields["continuous_usage"]) == (0, 1)
    assert BODY[: fields["open_off"]] == b"{"


def test_the_seed_changes_no_verdict():
    for seed in (0, 1, 2**64 - 1):
        assert native.json_request([b'{"a":1,"b":2,"a":3}'], seed=seed)[0] == native.JSON_DUPLICATE
        assert native.json_request([b'{"a":1,"b":2,"":3,"A":4}'], seed=seed)[0] == native.JSON_OK


STREAM = (
    b"event: message_start\r\n"
    b'data: {"type":"message_start","message":{"usage":{"input_tokens":9,"output_tokens":0}}}\r\n'
    b'\r\n: ping\r\n\r\ndata: {"type":"content_block_delta"}\n\ndata: {"type":"message_delta","delta":'
    b'{"stop_reason":"end_turn"},"usage":{"output_tokens":4}}\r\rdata: {"type":"message_stop"}\n\n'
)


def test_streams_three_ways():
    events, state = native.sse([STREAM], native.MESSAGES)
    assert events == state["events"] == 4
    assert (state["usage_in"], state["usage_out"], state["finish"]) == (9, 4, native.FINISH_STOP)
    assert (state["terminated"], state["content"], state["error"], state["at_boundary"]) == (True, True, False, True)
    assert native.sse(single(STREAM), native.MESSAGES) == (events, {**state, "progress": False})
    behind = native.sse([STREAM + b"data: {"], native.MESSAGES)[1]
    assert behind == {**state, "bytes": len(STREAM) + 7, "at_boundary": False}


def test_usage_of_each_event_is_found_and_can_be_blanked():
    frame = b'data: {"id":"x","choices":[{"delta":{"content":"a"}}],"usage":{"prompt_tokens":%d},"z":1}\n\n'
    stream = bytearray(b"".join(frame % n for n in range(12)))
    events = native.sse_events([bytes(stream)], native.OPENAI)
    assert [facts["usage_in"] for _, _, facts in events] == list(range(12))
    for _, (off, length), _ in events:
        stream[off : off + length] = b" " * length
    for line in bytes(stream).splitlines()[::2]:
        assert json.loads(line[6:]) == {"id": "x", "choices": [{"delta": {"content": "a"}}], "z": 1}
