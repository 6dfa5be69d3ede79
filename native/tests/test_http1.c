/* units: http1.c */
/* Heads in exact blocks, so that the sanitizer sees a byte read beyond: accepted and refused, whole and grown. */
#include "../http1.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const http1_limits limits = {8192, 16384, 32768, 100};

static enum http1_result parse(http1_head *head, const char *text, size_t len, size_t seen, int response)
{
    char *exact = malloc(len ? len : 1);
    memcpy(exact, text, len);
    enum http1_result result = response ? http1_parse_response(head, exact, len, seen, response == 2, &limits)
                                        : http1_parse_request(head, exact, len, seen, &limits);
    free(exact);
    return result;
}

/* The verdict when it is whole; grown by single bytes it must be the same, and never before the last byte is needed. */
static http1_head verdict(const char *text, int response, enum http1_result expected)
{
    http1_head head, grown;
    size_t len = strlen(text), n = 0;
    enum http1_result result = parse(&head, text, len, 0, response), step = HTTP1_PARTIAL;
    while (step == HTTP1_PARTIAL && n < len) {
        n++;
        step = parse(&grown, text, n, n - 1, response);
    }
    if (result != expected || step != expected) {
        fprintf(stderr, "%s\n  whole %d (%s), grown %d\n", text, result, head.why ? head.why : "", step);
        abort();
    }
    return head;
}

static void requests(void)
{
    http1_head head = verdict("POST /v1/chat/completions?a=%2F HTTP/1.1\r\nHost: [::1]:8000\r\ncontent-LENGTH:  12 \t\r\n"
                              "X-Api-Key:\r\n\r\n", 0, HTTP1_DONE);
    assert(head.framing == HTTP1_LENGTH && head.content_length == 12 && head.keep_alive && head.n_fields == 3);
    assert(head.path.len == 20 && head.query.len == 5 && http1_value(&head, HTTP1_CONTENT_LENGTH).len == 2);
    assert(head.first[HTTP1_X_API_KEY] == 3 && http1_value(&head, HTTP1_X_API_KEY).len == 0);
    head = verdict("\r\nGET / HTTP/1.0\r\nconnection: foo , Keep-Alive\r\n\r\n", 0, HTTP1_DONE);
    assert(head.keep_alive && head.minor == 0 && head.framing == HTTP1_NO_BODY && head.head_len == 50);
    head = verdict("PUT / HTTP/1.1\r\nHost: a\r\nExpect: 100-Continue\r\nTransfer-Encoding: CHUNKED\r\n\r\n", 0, HTTP1_DONE);
    assert(head.expect_continue && head.framing == HTTP1_CHUNKED);
    head = verdict("GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nUpgrade: h2c\r\nx: \xe9\r\n\r\n", 0, HTTP1_DONE);
    assert(!head.keep_alive && head.upgrade);
}

static void refusals(void)
{
    static const char *const bad[] = {
        "\x16\x03\x01", "\n", "\r\n\r\n", " GET", "GET\t/ HTTP/1.1\r\n", "GET  / HTTP/1.1\r\n", "GET /\r\n", "GET / HTTP/1.1\n",
        "GET / HTTP/2.0\r\n", "GET / http/1.1\r\n", "GET http://a/ HTTP/1.1\r\n", "OPTIONS * HTTP/1.1\r\n",
        "CONNECT a:1 HTTP/1.1\r\n", "GET /#a HTTP/1.1\r\n", "GET /%4 HTTP/1.1\r\n", "GET /\xc3 HTTP/1.1\r\n",
        "GET / HTTP/1.1\r\n\r\n", "GET / HTTP/1.1\r\nHost:\r\n\r\n", "GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a,b\r\n\r\n", "GET / HTTP/1.1\r\nHost: a:99999\r\n\r\n", "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\n b\r\n\r\n", "GET / HTTP/1.1\r\n Host: a\r\n\r\n", "GET / HTTP/1.1\r\nHost : a\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nx: \x01\r\n\r\n", "GET / HTTP/1.1\r\nHost: a\r\nx: a\rb\r\n\r\n", "GET / HTTP/1.1\r\n: a\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9223372036854775808\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n",
        "HEAD / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
        "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", "POST / HTTP/1.1\r\nHost: a\r\nContent_Length: 1\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\n-TransferEncoding_: chunked\r\n\r\n", "GET / HTTP/1.1\r\nHost: a\r\nExpect: x\r\n\r\n",
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        verdict(bad[i], 0, HTTP1_ERROR);
}

static void responses(void)
{
    http1_head head = verdict("HTTP/1.1 200 OK\r\n\r\n", 1, HTTP1_DONE);
    assert(head.framing == HTTP1_TO_CLOSE && !head.keep_alive && head.status == 200);
    head = verdict("HTTP/1.1 204\r\ncontent-length: 5\r\n\r\n", 1, HTTP1_DONE);
    assert(head.framing == HTTP1_NO_BODY && head.keep_alive);
    head = verdict("HTTP/1.1 200 \xe9\r\ntransfer-encoding: chunked\r\n\r\n", 2, HTTP1_DONE);
    assert(head.framing == HTTP1_NO_BODY);
    static const char *const bad[] = {
        "HTTP/1.1 20 OK\r\n\r\n", "HTTP/1.1 099 x\r\n\r\n", "HTTP/1.1 2000\r\n\r\n", "HTTP/3.1 200 OK\r\n\r\n", "ICY 200 OK\r\n",
        "HTTP/1.1  200 OK\r\n\r\n", "HTTP/1.1 200 OK\n", "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", "\r\nHTTP/1.1 200 OK\r\n\r\n",
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        verdict(bad[i], 1, HTTP1_ERROR);
}

static char *with(const char *before, char fill, size_t n, const char *after)
{
    char *text = malloc(strlen(before) + n + strlen(after) + 1), *p = stpcpy(text, before);
    memset(p, fill, n);
    strcpy(p + n, after);
    return text;
}

static void at_limits(void)
{
    /* the line without its CRLF: "GET /" + n + " HTTP/1.1" */
    for (size_t over = 0; over < 2; over++) {
        char *text = with("GET /", 'a', 8192 - 14 + over, " HTTP/1.1\r\nHost: a\r\n\r\n");
        http1_head head = verdict(text, 0, over ? HTTP1_ERROR : HTTP1_DONE);
        assert(head.reject == (over ? HTTP1_LINE_TOO_LONG : HTTP1_OK));
        assert(head.over == (over ? HTTP1_OVER_LINE : HTTP1_OVER_NOTHING));
        free(text);
        text = with("GET / HTTP/1.1\r\nHost: a\r\nx: ", 'a', 16384 - 3 + over, "\r\n\r\n");
        head = verdict(text, 0, over ? HTTP1_ERROR : HTTP1_DONE);
        assert(head.reject == (over ? HTTP1_FIELDS_TOO_LARGE : HTTP1_OK));
        assert(head.over == (over ? HTTP1_OVER_FIELD : HTTP1_OVER_NOTHING));
        free(text);
        text = with("GET / HTTP/1.1\r\nHost: a\r\nx: \r\n", 'a', 0, "");
        text = realloc(text, 4000);
        for (size_t i = 2; i < 100 + over; i++)
            strcat(text, "y: 1\r\n");
        strcat(text, "\r\n");
        head = verdict(text, 0, over ? HTTP1_ERROR : HTTP1_DONE);
        assert(head.reject == (over ? HTTP1_FIELDS_TOO_LARGE : HTTP1_OK));
        assert(head.over == (over ? HTTP1_OVER_FIELDS : HTTP1_OVER_NOTHING));
        free(text);
        /* two fields of the largest size fill a head */
        text = realloc(with("GET / HTTP/1.1\r\nHost: a\r\nx: ", 'a', 16381, "\r\n"), 40000);
        size_t room = 32768 - strlen(text) - strlen("y: \r\n\r\n");
        strcat(text, "y: ");
        char *end = text + strlen(text);
        memset(end, 'b', room + over);
        strcpy(end + room + over, "\r\n\r\n");
        head = verdict(text, 0, over ? HTTP1_ERROR : HTTP1_DONE);
        assert(head.over == (over ? HTTP1_OVER_HEAD : HTTP1_OVER_NOTHING));
        free(text);
    }
}

int main(void)
{
    requests();
    refusals();
    responses();
    at_limits();
    return 0;
}
