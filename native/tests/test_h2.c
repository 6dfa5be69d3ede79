/* units: h2.c limit.c */
/* libs: -lnghttp2 */
/* A client's frames, whole and split at every place: what is handed out, what is counted, and what is said at the end. */
#include "../h2.h"

#include <assert.h>
#include <nghttp2/nghttp2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define S 1000000000ull

/* What the connection was told, as text; and what it says of its answers. */
typedef struct {
    char log[65536];
    size_t len;
    uint8_t out[1 << 20];
    size_t out_len;
    h2_session *h;
    size_t ready;
    bool last, stopped, refuse;
    int requests, bodies, closed;
    size_t body;
    char head[65536];
    size_t head_len;
    int sent_frames;
    size_t sent;
} owner;

static bool request(void *data, int32_t id, const char *head, size_t len, bool ended)
{
    owner *o = data;
    o->requests++;
    assert(len < sizeof o->head);
    memcpy(o->head, head, len);
    o->head_len = len;
    o->len += (size_t)snprintf(o->log + o->len, sizeof o->log - o->len, "request %d%s\n", id, ended ? " ended" : "");
    if (o->refuse)
        return false;
    h2_adopt(o->h, id, o);
    return true;
}

static void body(void *data, void *stream, const char *bytes, size_t len)
{
    owner *o = data;
    (void)bytes;
    assert(stream == o);
    o->body += len;
}

static void ended(void *data, void *stream)
{
    owner *o = data;
    assert(stream == o);
    o->len += (size_t)snprintf(o->log + o->len, sizeof o->log - o->len, "ended\n");
}

static void over(void *data, void *stream, enum asc_limit limit)
{
    owner *o = data;
    assert(stream == o);
    o->len += (size_t)snprintf(o->log + o->len, sizeof o->log - o->len, "over %s\n", limit_name(limit));
}

static void closed(void *data, void *stream, uint32_t code)
{
    owner *o = data;
    assert(stream == o);
    o->closed++;
    o->len += (size_t)snprintf(o->log + o->len, sizeof o->log - o->len, "closed %u\n", code);
}

static size_t ready(void *data, void *stream, bool *last)
{
    owner *o = data;
    assert(stream == o);
    *last = o->last;
    return o->ready;
}

static void put(owner *o, const void *bytes, size_t len)
{
    assert(o->out_len + len <= sizeof o->out);
    memcpy(o->out + o->out_len, bytes, len);
    o->out_len += len;
}

static void sends(void *data, void *stream, const uint8_t header[9], size_t len)
{
    owner *o = data;
    static const uint8_t zero[1 << 14];
    assert(stream == o && len <= o->ready && len <= sizeof zero);
    put(o, header, 9);
    put(o, zero, len);
    o->ready -= len;
    o->sent += len;
    o->sent_frames++;
}

static void writes(void *data, const uint8_t *bytes, size_t len)
{
    put(data, bytes, len);
}

static bool writable(void *data)
{
    return !((owner *)data)->stopped;
}

static void refused(void *data, enum asc_limit limit)
{
    owner *o = data;
    o->len += (size_t)snprintf(o->log + o->len, sizeof o->log - o->len, "refused %s\n", limit_name(limit));
}

static const h2_calls calls = {request, body, ended, over, closed, ready, sends, writes, writable, refused};

static h2_limits limits(void)
{
    return (h2_limits){
        .streams = 100, .stream_window = 65536, .connection_window = 1 << 20, .frame = 16384, .table = 4096,
        .resets = 20, .resets_rate = 2, .glitches = 30, .glitches_rate = 3, .settings = 5, .pings = 5,
        .settings_entries = 8, .continuations = 3, .priorities = 4, .empty_data = 3, .queued = 100,
        .max_head = 4096, .max_fields = 32, .max_trailers = 256,
    };
}

/* ---- a client's bytes --------------------------------------------------------------------------------------------- */

typedef struct {
    uint8_t bytes[1 << 20];
    size_t len;
    nghttp2_hd_deflater *deflater;
} wire;

static void frame(wire *w, uint8_t type, uint8_t flags, uint32_t id, const void *payload, size_t len)
{
    uint8_t header[9] = {(uint8_t)(len >> 16), (uint8_t)(len >> 8), (uint8_t)len, type, flags,
                         (uint8_t)(id >> 24), (uint8_t)(id >> 16), (uint8_t)(id >> 8), (uint8_t)id};
    assert(w->len + 9 + len <= sizeof w->bytes);
    memcpy(w->bytes + w->len, header, 9);
    if (len)
        memcpy(w->bytes + w->len + 9, payload, len);
    w->len += 9 + len;
}

static wire *begin(void)
{
    wire *w = calloc(1, sizeof *w);
    memcpy(w->bytes, H2_PREFACE, H2_PREFACE_LEN);
    w->len = H2_PREFACE_LEN;
    assert(nghttp2_hd_deflate_new(&w->deflater, 0) == 0);
    frame(w, NGHTTP2_SETTINGS, 0, 0, NULL, 0);
    return w;
}

static void done(wire *w)
{
    nghttp2_hd_deflate_del(w->deflater);
    free(w);
}

/* pairs: name, value, ..., NULL */
static size_t encode(wire *w, uint8_t *block, size_t cap, const char *const *pairs)
{
    nghttp2_nv nv[64];
    size_t n = 0;
    for (; pairs[2 * n] != NULL; n++)
        nv[n] = (nghttp2_nv){(uint8_t *)pairs[2 * n], (uint8_t *)pairs[2 * n + 1], strlen(pairs[2 * n]),
                             strlen(pairs[2 * n + 1]), NGHTTP2_NV_FLAG_NO_INDEX};
    ssize_t len = nghttp2_hd_deflate_hd(w->deflater, block, cap, nv, n);
    assert(len > 0);
    return (size_t)len;
}

static void head(wire *w, uint32_t id, uint8_t flags, const char *const *pairs)
{
    uint8_t block[16384];
    size_t len = encode(w, block, sizeof block, pairs);
    frame(w, NGHTTP2_HEADERS, flags, id, block, len);
}

#define PSEUDO ":method", "POST", ":scheme", "https", ":path", "/v1/x?a=b", ":authority", "gateway"
static const char *const plain[] = {PSEUDO, NULL};
enum { END_HEADERS = NGHTTP2_FLAG_END_HEADERS, END_STREAM = NGHTTP2_FLAG_END_STREAM };

static owner *open_with(const h2_limits *l)
{
    owner *o = calloc(1, sizeof *o);
    o->h = h2_new(o, &calls, l, S);
    assert(o->h != NULL);
    return o;
}

static void close_owner(owner *o)
{
    h2_free(o->h);
    free(o);
}

/* The code of the GOAWAY that was said last, -1 without one. */
static int goaway(const owner *o)
{
    int code = -1;
    for (size_t at = 0; at + 9 <= o->out_len;) {
        size_t len = (size_t)o->out[at] << 16 | (size_t)o->out[at + 1] << 8 | o->out[at + 2];
        if (o->out[at + 3] == NGHTTP2_GOAWAY)
            code = o->out[at + 16];
        at += 9 + len;
    }
    return code;
}

/* ---- tests -------------------------------------------------------------------------------------------------------- */

static void a_request_in_pieces(void)
{
    h2_limits l = limits();
    wire *w = begin();
    static const char *const with_fields[] = {PSEUDO, "content-length", "5", "accept", "*/*", "host", "GATEWAY", NULL};
    head(w, 1, END_HEADERS, with_fields);
    frame(w, NGHTTP2_DATA, NGHTTP2_FLAG_PADDED, 1, "\2ab\0\0", 5);
    frame(w, 0x42, 0, 0, "??", 2);
    frame(w, NGHTTP2_DATA, END_STREAM, 1, "cde", 3);
    head(w, 3, END_HEADERS | END_STREAM, plain);
    static const char expected[] = "POST /v1/x?a=b HTTP/1.1\r\nhost: gateway\r\n\r\n";
    for (size_t step = 1; step <= w->len; step = step < 40 ? step + 1 : step + 37) {
        owner *o = open_with(&l);
        for (size_t at = 0; at < w->len; at += step) {
            size_t n = w->len - at < step ? w->len - at : step;
            uint8_t *piece = malloc(n);
            memcpy(piece, w->bytes + at, n);
            assert(h2_receive(o->h, piece, n, S));
            free(piece);
        }
        assert(strcmp(o->log, "request 1\nended\nrequest 3 ended\nended\n") == 0);
        assert(o->body == 5 && o->head_len == sizeof expected - 1 && memcmp(o->head, expected, o->head_len) == 0);
        assert(h2_head_since(o->h) == 0);
        close_owner(o);
    }
    done(w);
}

static void a_head_that_is_over(void)
{
    h2_limits l = limits();
    wire *w = begin();
    char value[1000];
    memset(value, 'v', sizeof value - 1);
    value[sizeof value - 1] = '\0';
    const char *pairs[] = {PSEUDO, "a", value, "b", value, "c", value, "d", value, "e", value, NULL};
    head(w, 1, END_HEADERS | END_STREAM, pairs);
    owner *o = open_with(&l);
    assert(h2_receive(o->h, w->bytes, w->len, S));
    assert(o->requests == 1 && o->head_len == l.max_head + 1); /* one byte more than allowed: the parser says it is over */
    close_owner(o);
    done(w);
}

static void expect_trip(wire *w, const h2_limits *l, enum asc_limit limit, const char *what)
{
    owner *o = open_with(l);
    bool goes_on = h2_receive(o->h, w->bytes, w->len, S);
    if (goes_on)
        goes_on = h2_send(o->h, S);
    if (goes_on || h2_tripped(o->h) != limit) {
        fprintf(stderr, "%s: %s instead of %s\n", what, limit_name(h2_tripped(o->h)), limit_name(limit));
        abort();
    }
    (void)h2_send(o->h, S);
    assert(goaway(o) == NGHTTP2_ENHANCE_YOUR_CALM);
    int seen = o->requests;
    assert(!h2_receive(o->h, w->bytes, w->len, S) && o->requests == seen); /* nothing more is read */
    close_owner(o);
    done(w);
}

/* Exactly as many as allowed pass, one more does not. */
static void expect_limit(void (*repeat)(wire *, int), int most, enum asc_limit limit, const char *what)
{
    h2_limits l = limits();
    wire *w = begin();
    for (int i = 0; i < most; i++)
        repeat(w, i);
    owner *o = open_with(&l);
    if (!h2_receive(o->h, w->bytes, w->len, S) || !h2_send(o->h, S)) {
        fprintf(stderr, "%s: over with %d\n", what, most);
        abort();
    }
    close_owner(o);
    repeat(w, most);
    expect_trip(w, &l, limit, what);
}

static void one_reset(wire *w, int i)
{
    head(w, 2u * (uint32_t)i + 1, END_HEADERS | END_STREAM, plain);
    frame(w, NGHTTP2_RST_STREAM, 0, 2u * (uint32_t)i + 1, "\0\0\0\x08", 4);
}

static void one_malformed(wire *w, int i)
{
    static const char *const pairs[] = {PSEUDO, "connection", "close", NULL};
    head(w, 2u * (uint32_t)i + 1, END_HEADERS | END_STREAM, pairs);
}

static void one_settings(wire *w, int i)
{
    if (i > 0) /* begin has sent the first */
        frame(w, NGHTTP2_SETTINGS, 0, 0, NULL, 0);
}

static void one_ping(wire *w, int i)
{
    (void)i;
    frame(w, NGHTTP2_PING, 0, 0, "12345678", 8);
}

static void one_priority(wire *w, int i)
{
    frame(w, NGHTTP2_PRIORITY, 0, 2u * (uint32_t)i + 1, "\0\0\0\0\5", 5);
}

static void one_unknown(wire *w, int i)
{
    frame(w, 0x77, 0xff, (uint32_t)i, "payload", 7);
}

static void one_window(wire *w, int i)
{
    (void)i;
    frame(w, NGHTTP2_WINDOW_UPDATE, 0, 0, "\0\0\0\1", 4);
}

static void one_empty(wire *w, int i)
{
    if (i == 0)
        head(w, 1, END_HEADERS, plain);
    frame(w, NGHTTP2_DATA, i % 2 ? NGHTTP2_FLAG_PADDED : 0, 1, "\3\0\0\0", i % 2 ? 4 : 0);
}

static void one_continuation(wire *w, int i)
{
    uint8_t block[1024];
    if (i == 0) {
        size_t len = encode(w, block, sizeof block, plain);
        frame(w, NGHTTP2_HEADERS, END_STREAM, 1, block, len);
    }
    static const char *const more[] = {"x", "y", NULL};
    frame(w, NGHTTP2_CONTINUATION, 0, 1, block, encode(w, block, sizeof block, more));
}

static void limits_at_their_bounds(void)
{
    expect_limit(one_reset, 20, LIMIT_H2_RESETS, "resets");
    expect_limit(one_malformed, 20, LIMIT_H2_RESETS, "malformed");
    expect_limit(one_settings, 5, LIMIT_H2_SETTINGS, "settings");
    expect_limit(one_ping, 5, LIMIT_H2_PINGS, "pings");
    expect_limit(one_priority, 4, LIMIT_H2_PRIORITIES, "priorities");
    expect_limit(one_unknown, 30, LIMIT_H2_GLITCHES, "unknown");
    expect_limit(one_window, 30, LIMIT_H2_GLITCHES, "windows");
    expect_limit(one_empty, 3, LIMIT_H2_EMPTY_DATA, "empty data");
    expect_limit(one_continuation, 3, LIMIT_H2_CONTINUATIONS, "continuations");
    h2_limits l = limits();
    wire *w = begin();
    uint8_t entries[54] = {0};
    for (int i = 0; i < 9; i++)
        entries[6 * i + 1] = 4;
    frame(w, NGHTTP2_SETTINGS, 0, 0, entries, sizeof entries);
    expect_trip(w, &l, LIMIT_H2_SETTINGS_ENTRIES, "entries");
    w = begin();
    one_continuation(w, 0);
    frame(w, NGHTTP2_CONTINUATION, 0, 1, NULL, 0);
    expect_trip(w, &l, LIMIT_H2_CONTINUATIONS, "an empty continuation");
    w = begin();
    uint8_t block[8192];
    size_t len = encode(w, block, sizeof block, plain);
    memset(block + len, 0x8f, 4000); /* accept-charset, without a value */
    frame(w, NGHTTP2_HEADERS, END_HEADERS, 1, block, len + 4000);
    expect_trip(w, &l, LIMIT_MAX_FIELDS, "a bomb");
}

static void what_is_forgiven(void)
{
    h2_limits l = limits();
    wire *w = begin();
    owner *o = open_with(&l);
    assert(h2_receive(o->h, w->bytes, w->len, S));
    w->len = 0;
    for (int i = 0; i < 30; i++)
        one_unknown(w, i);
    assert(h2_receive(o->h, w->bytes, w->len, S));
    w->len = 0;
    for (int i = 0; i < 3; i++)
        one_unknown(w, i);
    for (uint64_t second = 2; second < 6; second++)
        assert(h2_receive(o->h, w->bytes, w->len, second * S));
    one_unknown(w, 3);
    assert(!h2_receive(o->h, w->bytes, w->len, 6 * S) && h2_tripped(o->h) == LIMIT_H2_GLITCHES);
    close_owner(o);
    done(w);
}

/* An answer of more than the window: what is sent, what waits, and what the client earns by taking it. */
static void answers_and_windows(void)
{
    h2_limits l = limits();
    wire *w = begin();
    head(w, 1, END_HEADERS | END_STREAM, plain);
    owner *o = open_with(&l);
    assert(h2_receive(o->h, w->bytes, w->len, S));
    char lines[] = "Content-Type: text/plain\r\nX-Request-ID: 1\r\nTransfer-Encoding: chunked\r\n\r\n";
    o->ready = 100000;
    o->last = true;
    assert(h2_answer(o->h, 1, 200, lines, sizeof lines - 1, false));
    o->stopped = true;
    assert(h2_send(o->h, S) && o->out_len == 0); /* nothing is taken */
    o->stopped = false;
    assert(h2_send(o->h, S));
    assert(o->sent == 65535 && o->ready == 100000 - 65535 && o->closed == 0);
    w->len = 0;
    frame(w, NGHTTP2_WINDOW_UPDATE, 0, 0, "\0\1\0\0", 4);
    frame(w, NGHTTP2_WINDOW_UPDATE, 0, 1, "\0\1\0\0", 4);
    assert(h2_receive(o->h, w->bytes, w->len, S) && h2_send(o->h, S));
    assert(o->ready == 0 && o->closed == 1 && strstr(o->log, "closed 0") != NULL);
    close_owner(o);
    done(w);
}

static void the_rest_of_a_request_that_is_answered(void)
{
    h2_limits l = limits();
    wire *w = begin();
    head(w, 1, END_HEADERS, plain);
    owner *o = open_with(&l);
    assert(h2_receive(o->h, w->bytes, w->len, S));
    char lines[] = "x: y\r\n\r\n";
    assert(h2_answer(o->h, 1, 413, lines, sizeof lines - 1, true));
    h2_forget(o->h, 1);
    assert(h2_send(o->h, S) && h2_unheard(o->h));
    o->out_len = 0;
    h2_hush(o->h); /* it may have come a moment ago */
    assert(h2_send(o->h, S) && o->out_len == 0 && h2_unheard(o->h));
    h2_hush(o->h);
    assert(h2_send(o->h, S) && !h2_unheard(o->h));
    bool reset = false;
    for (size_t at = 0; at + 9 <= o->out_len; at += 9 + ((size_t)o->out[at + 1] << 8 | o->out[at + 2]))
        reset |= o->out[at + 3] == NGHTTP2_RST_STREAM && o->out[at + 12] == 0;
    assert(reset && o->closed == 0);
    w->len = 0;
    frame(w, NGHTTP2_DATA, END_STREAM, 1, "late", 4);
    assert(h2_receive(o->h, w->bytes, w->len, S) && o->body == 0);
    close_owner(o);
    done(w);
}

/* Frames of streams that are closed: what the client has ended itself is an error, what we have reset may be late. */
static void closed_streams(void)
{
    static const struct {
        bool reset_first, ours;
        int code; /* of GOAWAY */
    } cases[] = {{true, false, NGHTTP2_STREAM_CLOSED}, {false, false, NGHTTP2_STREAM_CLOSED}, {false, true, -1}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        h2_limits l = limits();
        wire *w = begin();
        head(w, 1, cases[i].reset_first || cases[i].ours ? END_HEADERS : END_HEADERS | END_STREAM, plain);
        if (cases[i].reset_first)
            frame(w, NGHTTP2_RST_STREAM, 0, 1, "\0\0\0\x08", 4);
        owner *o = open_with(&l);
        assert(h2_receive(o->h, w->bytes, w->len, S));
        if (!cases[i].reset_first) {
            h2_reset(o->h, 1, H2_INTERNAL_ERROR);
            h2_forget(o->h, 1);
        }
        assert(h2_send(o->h, S));
        w->len = 0;
        for (int n = 0; n < 3; n++)
            frame(w, NGHTTP2_DATA, 0, 1, "late", 4);
        assert(h2_receive(o->h, w->bytes, w->len, S) == (cases[i].code < 0));
        (void)h2_send(o->h, S);
        assert(goaway(o) == cases[i].code && o->body == 0);
        close_owner(o);
        done(w);
    }
    /* a stream that was passed over, while that is known, and when it is not known any more */
    for (uint32_t n = 1; n < 100; n += 40) {
        h2_limits l = limits();
        wire *w = begin();
        for (uint32_t id = 5; id < 5 + 2 * n; id += 2)
            head(w, id, END_HEADERS | END_STREAM, plain);
        head(w, 3, END_HEADERS | END_STREAM, plain);
        owner *o = open_with(&l);
        assert(h2_receive(o->h, w->bytes, w->len, S) == (n > 64));
        (void)h2_send(o->h, S);
        assert(goaway(o) == (n > 64 ? -1 : NGHTTP2_PROTOCOL_ERROR) && o->requests == (int)n);
        close_owner(o);
        done(w);
    }
}

static void leaving(void)
{
    h2_limits l = limits();
    wire *w = begin();
    head(w, 1, END_HEADERS | END_STREAM, plain);
    owner *o = open_with(&l);
    assert(h2_receive(o->h, w->bytes, w->len, S) && h2_send(o->h, S));
    assert(!h2_leaving(o->h));
    h2_leave(o->h);
    assert(h2_send(o->h, S) && goaway(o) == 0 && h2_leaving(o->h) && !h2_left(o->h));
    w->len = 0;
    head(w, 3, END_HEADERS | END_STREAM, plain); /* it does not know yet */
    frame(w, NGHTTP2_PING, NGHTTP2_FLAG_ACK, 0, "leaving", 8);
    head(w, 5, END_HEADERS | END_STREAM, plain); /* now it should */
    assert(h2_receive(o->h, w->bytes, w->len, S));
    assert(h2_left(o->h) && o->requests == 3 - 1 + (strstr(o->log, "request 5") != NULL));
    char lines[] = "\r\n";
    for (int32_t id = 1; id <= 5; id += 2)
        if (id < 5 || strstr(o->log, "request 5") != NULL)
            assert(h2_answer(o->h, id, 200, lines, 2, true));
    assert(!h2_send(o->h, S) && h2_tripped(o->h) == LIMIT_NONE); /* all is said */
    close_owner(o);
    done(w);
}

static void memory_that_is_not_there(void)
{
    h2_limits l = limits();
    wire *w = begin();
    head(w, 1, END_HEADERS, plain);
    owner *o = open_with(&l);
    o->refuse = true;
    assert(h2_receive(o->h, w->bytes, w->len, S) && h2_send(o->h, S));
    assert(o->closed == 0 && strcmp(o->log, "request 1\n") == 0);
    close_owner(o);
    done(w);
}

int main(void)
{
    a_request_in_pieces();
    a_head_that_is_over();
    limits_at_their_bounds();
    what_is_forgiven();
    answers_and_windows();
    the_rest_of_a_request_that_is_answered();
    closed_streams();
    leaving();
    memory_that_is_not_there();
    return 0;
}
