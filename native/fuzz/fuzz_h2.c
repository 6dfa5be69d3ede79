/* units: h2.c limit.c http1.c */
/* libs: -lnghttp2 */
/* Any bytes as an HTTP/2 client, with or without its preface, in pieces whose size the first byte chooses. Each stream is
 * answered, reset, or left alone as the second says. Heads that are handed out are given to the parser; each stream is
 * named only while it is open; after the end nothing is read. */
#include "../h2.h"
#include "../http1.h"

#include <stdlib.h>
#include <string.h>

enum { STREAMS = 512 };

typedef struct {
    int32_t id;
    size_t ready;
    bool open;
} stream;

typedef struct {
    h2_session *h;
    stream streams[STREAMS];
    size_t n;
    uint8_t manner;
    unsigned writable;
    size_t out, read;
} owner;

static void check(bool holds)
{
    if (!holds)
        abort();
}

static const h2_limits limits = {
    .streams = 20, .stream_window = 65536, .connection_window = 1 << 20, .frame = 16384, .table = 4096,
    .resets = 50, .resets_rate = 20, .glitches = 200, .glitches_rate = 33, .settings = 20, .pings = 20,
    .settings_entries = 32, .continuations = 8, .priorities = 100, .empty_data = 10, .queued = 1000,
    .max_head = 4096, .max_fields = 64, .max_trailers = 1024,
};

static bool request(void *data, int32_t id, const char *head, size_t len, bool ended)
{
    static const http1_limits lines = {2048, 2048, 4096, 64};
    owner *o = data;
    http1_head parsed;
    char *copy = malloc(len);
    memcpy(copy, head, len);
    enum http1_result result = http1_parse_request(&parsed, copy, len, 0, &lines);
    check(result != HTTP1_PARTIAL); /* a whole head, or one that is over */
    if (result == HTTP1_DONE)
        check(parsed.head_len == len && parsed.minor == 1); /* no byte of a field has ended it early */
    free(copy);
    if (o->n == STREAMS || (o->manner & 8 && id % 7 == 0))
        return false;
    stream *s = &o->streams[o->n++];
    *s = (stream){id, (size_t)o->manner * 700u, true};
    h2_adopt(o->h, id, s);
    if (o->manner & 1 || ended) {
        char lines_out[] = "Content-Type: x\r\nx-request-id: y\r\n\r\n";
        check(h2_answer(o->h, id, 200, lines_out, sizeof lines_out - 1, o->manner & 2));
    }
    if (o->manner & 4 && id % 3 == 0) {
        h2_reset(o->h, id, H2_INTERNAL_ERROR);
        h2_forget(o->h, id);
        s->open = false;
    }
    return true;
}

static void body(void *data, void *named, const char *bytes, size_t len)
{
    owner *o = data;
    check(((stream *)named)->open);
    for (size_t i = 0; i < len; i++)
        o->read += (uint8_t)bytes[i]; /* all of them are there */
}

static void ended(void *data, void *named)
{
    (void)data;
    check(((stream *)named)->open);
}

static void over(void *data, void *named, enum asc_limit limit)
{
    (void)data;
    check(((stream *)named)->open && limit == LIMIT_MAX_TRAILERS);
}

static void closed(void *data, void *named, uint32_t code)
{
    (void)data, (void)code;
    check(((stream *)named)->open);
    ((stream *)named)->open = false;
}

static size_t ready(void *data, void *named, bool *last)
{
    (void)data;
    *last = true;
    return ((stream *)named)->ready;
}

static void sends(void *data, void *named, const uint8_t header[9], size_t len)
{
    owner *o = data;
    stream *s = named;
    check(s->open && len <= s->ready && header[3] == 0);
    s->ready -= len;
    o->out += 9 + len;
}

static void writes(void *data, const uint8_t *bytes, size_t len)
{
    owner *o = data;
    check(len > 0 && bytes != NULL);
    o->out += len;
}

static bool writable(void *data)
{
    owner *o = data;
    return o->manner & 16 ? o->writable++ % 3 != 0 : true;
}

static void refused(void *data, enum asc_limit limit)
{
    (void)data;
    check(limit == LIMIT_H2_STREAMS);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const h2_calls calls = {request, body, ended, over, closed, ready, sends, writes, writable, refused};
    if (size < 3)
        return 0;
    size_t step = 1 + data[0];
    owner *o = calloc(1, sizeof *o);
    o->manner = data[1];
    o->h = h2_new(o, &calls, &limits, 1000000000);
    check(o->h != NULL);
    uint64_t now = 1000000000;
    bool goes_on = true;
    if (data[2] & 1) {
        static const uint8_t start[] = H2_PREFACE "\0\0\0\4\0\0\0\0";
        goes_on = h2_receive(o->h, start, sizeof start, now);
    }
    data += 3;
    size -= 3;
    for (size_t at = 0; at < size && goes_on; at += step, now += 1000000) {
        size_t n = size - at < step ? size - at : step;
        uint8_t *piece = malloc(n);
        memcpy(piece, data + at, n);
        goes_on = h2_receive(o->h, piece, n, now);
        free(piece);
        if (goes_on && at % 3 == 0)
            goes_on = h2_send(o->h, now);
        if (o->manner & 32 && at > size / 2)
            h2_leave(o->h);
    }
    size_t requests = o->n;
    o->manner &= (uint8_t)~16u;
    (void)h2_send(o->h, now);
    if (!goes_on)
        check(!h2_receive(o->h, (const uint8_t *)"\0\0\0\4\0\0\0\0\0", 9, now) && o->n == requests);
    h2_free(o->h);
    free(o);
    return 0;
}
