/* units: sse.c jsonscan.c */
/* Any bytes as a stream of each dialect: whole and in pieces must end in the same state, and blanking a usage member
 * leaves a stream that says the same but for usage. The first byte chooses the size of the pieces. */
#include "../sse.h"

#include <stdlib.h>
#include <string.h>

static void check(bool holds)
{
    if (!holds)
        abort();
}

static void same(const sse_scanner *a, const sse_scanner *b)
{
    check(a->events == b->events && a->bytes == b->bytes && a->boundary == b->boundary && a->boundary <= a->bytes);
    check(a->usage_in == b->usage_in && a->usage_out == b->usage_out && a->finish == b->finish);
    check(a->terminated == b->terminated && a->error == b->error && a->content == b->content);
}

static void watch(sse_scanner *scanner, enum json_dialect dialect, const uint8_t *data, size_t size, size_t step)
{
    uint64_t events = 0;
    sse_init(scanner, dialect);
    for (size_t at = 0, n; at < size; at += n) {
        n = size - at < step ? size - at : step;
        char *piece = malloc(n);
        memcpy(piece, data + at, n);
        events += sse_feed(scanner, piece, n);
        free(piece);
    }
    check(events == scanner->events);
}

static void blank(const uint8_t *data, size_t size)
{
    char *bytes = malloc(size);
    memcpy(bytes, data, size);
    sse_scanner scanner, after;
    sse_init(&scanner, JSON_OPENAI);
    size_t consumed;
    for (size_t at = 0; at < size; at += consumed) {
        uint64_t off, len;
        if (sse_next(&scanner, (const char *)data + at, size - at, &consumed) && sse_usage(&scanner, &off, &len)) {
            check(off + len <= at + consumed);
            memset(bytes + off, ' ', len);
        }
        check(consumed > 0);
    }
    watch(&after, JSON_OPENAI, (const uint8_t *)bytes, size, size);
    check(after.events == scanner.events && after.finish == scanner.finish && after.content == scanner.content);
    check(after.boundary == scanner.boundary && after.terminated == scanner.terminated);
    free(bytes);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 2)
        return 0;
    size_t step = 1 + data[0] % 24;
    data++, size--;
    for (enum json_dialect dialect = JSON_NONE; dialect <= JSON_TGI; dialect++) {
        sse_scanner whole, split;
        watch(&whole, dialect, data, size, size);
        watch(&split, dialect, data, size, step);
        same(&whole, &split);
    }
    blank(data, size);
    return 0;
}
