/* units: sse.c jsonscan.c */
/* Streams with all kinds of line ends, split at every width. */
#include "../sse.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

static sse_scanner watch(const char *text, enum json_dialect dialect, size_t width)
{
    sse_scanner scanner;
    sse_init(&scanner, dialect);
    size_t len = strlen(text);
    uint64_t events = 0;
    for (size_t at = 0, n; at < len; at += n) {
        n = len - at < width ? len - at : width;
        char *piece = malloc(n);
        memcpy(piece, text + at, n);
        events += sse_feed(&scanner, piece, n);
        free(piece);
    }
    assert(events == scanner.events && scanner.bytes == len);
    return scanner;
}

static sse_scanner verdict(const char *text, enum json_dialect dialect, uint64_t events, uint64_t boundary)
{
    sse_scanner whole = watch(text, dialect, strlen(text));
    for (size_t width = 1; width < strlen(text); width++) {
        sse_scanner split = watch(text, dialect, width);
        assert(split.events == events && split.boundary == boundary && split.terminated == whole.terminated);
        assert(split.error == whole.error && split.content == whole.content && split.finish == whole.finish);
        assert(split.usage_in == whole.usage_in && split.usage_out == whole.usage_out);
    }
    assert(whole.events == events && whole.boundary == boundary);
    return whole;
}

static void lines(void)
{
    assert(verdict("data: a\n\ndata:b\r\n\r\ndata\r\rdata: [DONE]\n\n", JSON_OPENAI, 4, 39).terminated);
    assert(!verdict("data: [DONE]\ndata: x\n\n", JSON_OPENAI, 1, 22).terminated);
    assert(!verdict("data: [DONE]", JSON_OPENAI, 0, 0).terminated);
    assert(!verdict("data: [DONE] \n\nxdata: [DONE]\n\n", JSON_OPENAI, 1, 30).terminated);
    assert(verdict("\xef\xbb\xbf" "data: [DONE]\n\n", JSON_OPENAI, 1, 17).terminated);
    verdict(": comment\n\nevent: x\nid: 3\n\nretry: 1\n", JSON_OPENAI, 0, 27);
    assert(verdict("data: {\"usage\":\ndata: {\"prompt_tokens\":5}}\n\n", JSON_OPENAI, 1, 44).usage_in == 5);
    sse_scanner scanner;
    sse_init(&scanner, JSON_OPENAI);
    assert(sse_feed(&scanner, ": ping\n\n", 8) == 0 && !scanner.progress && sse_at_boundary(&scanner));
    assert(sse_feed(&scanner, "data: {", 7) == 0 && scanner.progress && !sse_at_boundary(&scanner));
    assert(sse_feed(&scanner, "}\n\n: a", 6) == 1 && scanner.progress && scanner.boundary == 18);
}

static void dialects(void)
{
    sse_scanner s = verdict("data: {\"error\":{}}\n\ndata: [DONE]\n\n", JSON_OPENAI, 2, 34);
    assert(s.error && s.terminated && !s.content);
    s = verdict("event: content_block_delta\ndata: {}\n\nevent: message_stop\ndata: {\"type\":\"message_stop\"}\n\n", JSON_MESSAGES, 2, 88);
    assert(s.content && s.terminated && !s.error);
    s = verdict("event: error\ndata: {\"type\":\"error\",\"error\":{}}\n\n", JSON_MESSAGES, 1, 48);
    assert(s.error && !s.terminated);
    s = verdict("data: {\"type\":\"response.failed\",\"response\":{\"status\":\"failed\"}}\n\n", JSON_RESPONSES, 1, 65);
    assert(s.error && s.terminated && s.finish == FINISH_ERROR);
    s = verdict("data: {\"type\":\"response.incomplete\"}\n\n", JSON_RESPONSES, 1, 38);
    assert(!s.error && s.terminated);
    s = verdict("data:{\"token\":{},\"generated_text\":null}\n\n", JSON_TGI, 1, 41);
    assert(s.content && !s.terminated);
    s = verdict("data:{\"token\":{},\"generated_text\":\"x\"}\n\n", JSON_TGI, 1, 40);
    assert(s.terminated);
    s = verdict("data: anything\n\n", JSON_NONE, 1, 16);
    assert(s.content && !s.terminated && !s.error);
}

static void one_by_one(void)
{
    const char *text = ": x\n\ndata: {\"a\":1,\"usage\":{\"prompt_tokens\":1}}\r\n\r\ndata: {}\n\ndata: tail";
    sse_scanner scanner;
    sse_init(&scanner, JSON_OPENAI);
    size_t at = 0, consumed;
    uint64_t off, len;
    assert(sse_next(&scanner, text, strlen(text), &consumed) && consumed == 50);
    assert(sse_usage(&scanner, &off, &len) && len == 28 && memcmp(text + off, ",\"usage\":{\"prompt_tokens\":1}", len) == 0);
    at += consumed;
    assert(sse_next(&scanner, text + at, strlen(text) - at, &consumed) && !sse_usage(&scanner, &off, &len));
    at += consumed;
    assert(!sse_next(&scanner, text + at, strlen(text) - at, &consumed) && at + consumed == strlen(text));
}

int main(void)
{
    lines();
    dialects();
    one_by_one();
    return 0;
}
