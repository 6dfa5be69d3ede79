/* units: chunk.c */
/* Chunked bodies split at every place, in exact blocks; the bytes behind the body stay as they were. */
#include "../chunk.h"

#include <stdbool.h>

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_EXTENSION = 256 };

static enum chunk_result decode(const char *text, size_t first, char *payload, size_t *len, size_t *used)
{
    chunk_decoder decoder;
    chunk_init(&decoder, &(chunk_limits)CHUNK_LIMITS);
    size_t total = strlen(text), off, n, consumed;
    enum chunk_result result = CHUNK_MORE;
    *len = *used = 0;
    while (result == CHUNK_MORE && *used < total) {
        size_t size = *used < first ? first - *used : total - *used;
        char *piece = malloc(size);
        memcpy(piece, text + *used, size);
        result = chunk_decode(&decoder, piece, size, &off, &n, &consumed);
        memcpy(payload + *len, piece + off, n);
        assert(memcmp(piece + consumed, text + *used + consumed, size - consumed) == 0);
        *len += n;
        *used += consumed;
        free(piece);
    }
    assert(decoder.total == *len);
    return result;
}

static void expect(const char *text, enum chunk_result expected, const char *payload, size_t used)
{
    char *out = malloc(strlen(text) + 1);
    for (size_t first = 0; first <= strlen(text); first++) {
        size_t len, at;
        enum chunk_result result = decode(text, first, out, &len, &at);
        if (result != expected || (payload && (len != strlen(payload) || memcmp(out, payload, len) != 0)) || at != used) {
            fprintf(stderr, "%s split at %zu: %d, %zu of payload, %zu used\n", text, first, result, len, at);
            abort();
        }
    }
    free(out);
}

/* Each limit at its bound and one byte over it, and which one it says it was. */
static void limits(void)
{
    static const chunk_limits small = {.max_extension = 4, .max_extensions = 6, .max_trailers = 8};
    static const struct {
        const char *text;
        enum chunk_result result;
        enum chunk_over over;
    } cases[] = {
        {"1;abcd\r\nx\r\n0;ab\r\na: bcdef\r\n\r\n", CHUNK_END, CHUNK_OVER_NOTHING},
        {"1;abcde\r\n", CHUNK_BAD, CHUNK_OVER_EXTENSION},
        {"1;abcd\r\nx\r\n1;abc\r\n", CHUNK_BAD, CHUNK_OVER_EXTENSIONS},
        {"0\r\na: bcdefg\r\n\r\n", CHUNK_BAD, CHUNK_OVER_TRAILERS},
        {"0\r\na:\r\nb:\r\nabcde:\r\n", CHUNK_BAD, CHUNK_OVER_TRAILERS},
        {"0\r\nabcdefghi", CHUNK_BAD, CHUNK_OVER_TRAILERS},
        {"1;a\x01", CHUNK_BAD, CHUNK_OVER_NOTHING},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        chunk_decoder decoder;
        chunk_init(&decoder, &small);
        char copy[64];
        size_t off, len, consumed;
        strcpy(copy, cases[i].text);
        assert(chunk_decode(&decoder, copy, strlen(cases[i].text), &off, &len, &consumed) == cases[i].result);
        assert(decoder.over == cases[i].over);
    }
}

int main(void)
{
    expect("0\r\n\r\n", CHUNK_END, "", 5);
    expect("3\r\nabc\r\n0A\r\n0123456789\r\n000\r\n\r\nGET /", CHUNK_END, "abc0123456789", 31);
    expect("1;a=\"\\\";\" ; b\r\nx\r\n0;z\r\nTrailer: a\r\nb:\r\n\r\n", CHUNK_END, "x", 41);
    expect("5\r\nabc", CHUNK_MORE, "abc", 6);
    expect("\r\n", CHUNK_BAD, "", 0);
    expect("g\r\n", CHUNK_BAD, "", 0);
    expect("0x1\r\n", CHUNK_BAD, "", 1);
    expect(" 1\r\n", CHUNK_BAD, "", 0);
    expect("1 \r\n", CHUNK_BAD, "", 1);
    expect("+1\r\n", CHUNK_BAD, "", 0);
    expect("1\nx", CHUNK_BAD, "", 1);
    expect("1\r\nxy\r\n", CHUNK_BAD, "x", 4);
    expect("1\r\nx\n", CHUNK_BAD, "x", 4);
    expect("1\r\r", CHUNK_BAD, "", 2);
    expect("1;\x01\r\n", CHUNK_BAD, "", 2);
    expect("1;a\n", CHUNK_BAD, "", 3);
    expect("1;\"\r\n", CHUNK_BAD, "", 3);
    expect("00000000000000001\r\n", CHUNK_BAD, "", 16);
    expect("8000000000000000\r\n", CHUNK_BAD, "", 15);
    expect("7fffffffffffffff\r\nab", CHUNK_MORE, "ab", 20);
    expect("0\r\na b\r\n\r\n", CHUNK_BAD, "", 4);
    expect("0\r\n a: b\r\n\r\n", CHUNK_BAD, "", 3);
    expect("0\r\n\nGET", CHUNK_BAD, "", 3);

    char line[18], text[MAX_EXTENSION + 32];
    for (size_t n = MAX_EXTENSION; n <= MAX_EXTENSION + 1; n++) {
        memset(text, 0, sizeof text);
        memcpy(text, "1;", 2);
        memset(text + 2, 'e', n);
        strcpy(text + 2 + n, "\r\nx\r\n");
        bool fits = n == MAX_EXTENSION;
        expect(text, fits ? CHUNK_MORE : CHUNK_BAD, fits ? "x" : "", fits ? strlen(text) : 2 + MAX_EXTENSION);
    }
    limits();
    char *from = chunk_size_before(line + sizeof line, UINT64_MAX);
    assert(from == line && memcmp(from, "ffffffffffffffff\r\n", 18) == 0);
    from = chunk_size_before(line + sizeof line, 0);
    assert(memcmp(from, "0\r\n", 3) == 0);
    return 0;
}
