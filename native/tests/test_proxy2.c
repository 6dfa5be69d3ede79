/* units: proxy2.c */
/* The PROXY v2 header: what the sections of the specification say, each case whole, byte by byte and with bytes behind it. */
#include "../proxy2.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SIG "\r\n\r\n\0\r\nQUIT\n"
#define V4 "\xc0\x00\x02\x01\x0a\x00\x00\x01\x30\x39\x01\xbb" /* 192.0.2.1:12345 to 10.0.0.1:443 */
#define V6 "\x20\x01\x0d\xb8\0\0\0\0\0\0\0\0\0\0\0\x01" "\x20\x01\x0d\xb8\0\0\0\0\0\0\0\0\0\0\0\x02" "\x30\x39\x01\xbb"
#define BYTES(text) "" text, sizeof text - 1

/* The same verdict, however it comes: an exact copy, so that the sanitizer sees a read beyond it. */
static proxy2_header parse(const char *bytes, size_t len, enum proxy2_result wanted)
{
    proxy2_header header = {0}, again;
    enum proxy2_result result = PROXY2_PARTIAL;
    size_t n = 0;
    for (; n <= len && result == PROXY2_PARTIAL; n++) {
        char *copy = malloc(n ? n : 1);
        memcpy(copy, bytes, n);
        result = proxy2_parse(&header, copy, n);
        free(copy);
    }
    if (result != wanted) {
        fprintf(stderr, "%d instead of %d: %s\n", result, wanted, header.why);
        abort();
    }
    if (wanted == PROXY2_OK) {
        char *longer = malloc(len + 5);
        memcpy(longer, bytes, len);
        memcpy(longer + len, "GET /", 5);
        assert(proxy2_parse(&again, longer, len + 5) == PROXY2_OK && again.len == header.len && header.len == n - 1);
        assert(again.source == header.source && again.port == header.port && memcmp(again.address, header.address, 16) == 0);
        free(longer);
    }
    return header;
}

static void is_wrong(const char *bytes, size_t len, const char *why)
{
    proxy2_header header = parse(bytes, len, PROXY2_ERROR);
    if (strstr(header.why, why) == NULL) {
        fprintf(stderr, "%s instead of %s\n", header.why, why);
        abort();
    }
}

static void addresses(void)
{
    static const uint8_t v4[16] = {[10] = 0xff, [11] = 0xff, 192, 0, 2, 1}, v6[16] = {0x20, 0x01, 0x0d, 0xb8, [15] = 1};
    proxy2_header h = parse(BYTES(SIG "\x21\x11\0\x0c" V4), PROXY2_OK);
    assert(h.source == PROXY2_NETWORK && h.port == 12345 && memcmp(h.address, v4, 16) == 0 && h.len == 28);
    h = parse(BYTES(SIG "\x21\x12\0\x0c" V4), PROXY2_OK); /* UDP: the address is one all the same */
    assert(h.source == PROXY2_NETWORK && memcmp(h.address, v4, 16) == 0);
    h = parse(BYTES(SIG "\x21\x21\0\x24" V6), PROXY2_OK);
    assert(h.source == PROXY2_NETWORK && h.port == 12345 && memcmp(h.address, v6, 16) == 0 && h.len == 52);
    char unix_block[PROXY2_FIXED + 216] = SIG "\x21\x31\0\xd8";
    assert(parse(unix_block, sizeof unix_block, PROXY2_OK).source == PROXY2_UNIX);
}

static void without_an_address(void)
{
    assert(parse(BYTES(SIG "\x20\x00\0\0"), PROXY2_OK).source == PROXY2_REAL);
    /* LOCAL: the block is discarded, its family ignored, and its length believed */
    assert(parse(BYTES(SIG "\x20\x11\0\x0c" V4), PROXY2_OK).source == PROXY2_REAL);
    assert(parse(BYTES(SIG "\x20\x11\0\x02xy"), PROXY2_OK).source == PROXY2_REAL);
    assert(parse(BYTES(SIG "\x20\xff\0\x02xy"), PROXY2_OK).len == 18);
    /* UNSPEC in either half */
    assert(parse(BYTES(SIG "\x21\x00\0\x03\xff\xff\xff"), PROXY2_OK).source == PROXY2_REAL);
    assert(parse(BYTES(SIG "\x21\x01\0\0"), PROXY2_OK).source == PROXY2_REAL);
    assert(parse(BYTES(SIG "\x21\x10\0\x0c" V4), PROXY2_OK).source == PROXY2_REAL);
    assert(parse(BYTES(SIG "\x21\x30\0\0"), PROXY2_OK).source == PROXY2_REAL);
}

static void what_is_none(void)
{
    is_wrong(BYTES("GET / HTTP/1.1\r\n"), "there is none");
    is_wrong(BYTES("\x16\x03\x01\x02\x00\x01"), "there is none");
    is_wrong(BYTES("\r\n\r\nGET"), "there is none");
    is_wrong(BYTES("\r\n\r\n\0\r\nQUIT\r"), "there is none");
    is_wrong(BYTES(SIG "\x11\x11\0\x0c" V4), "version");
    is_wrong(BYTES(SIG "\x31\x11\0\x0c" V4), "version");
    is_wrong(BYTES(SIG "\x22\x11\0\x0c" V4), "command");
    is_wrong(BYTES(SIG "\x2f\x00\0\0"), "command");
    is_wrong(BYTES(SIG "\x21\x41\0\x0c" V4), "family");
    is_wrong(BYTES(SIG "\x21\x13\0\x0c" V4), "family");
    is_wrong(BYTES(SIG "\x21\x11\0\x0b" V4), "addresses are cut off");
    is_wrong(BYTES(SIG "\x21\x21\0\x0c" V4), "addresses are cut off");
    is_wrong(BYTES(SIG "\x21\x31\0\xd7"), "addresses are cut off");
    is_wrong(BYTES(SIG "\x21\x11\x0f\xf1"), "longer");
    is_wrong(BYTES(SIG "\x20\x00\xff\xff"), "longer");
    proxy2_header h;
    assert(proxy2_parse(&h, "PROXY TCP4 1.1.1.1 2.2.2.2 1 2\r\n", 32) == PROXY2_ERROR && strstr(h.why, "version 1") != NULL);
    for (size_t n = 0; n < 28; n++) /* every part of one is a part, with nothing read from it */
        assert(proxy2_parse(&h, SIG "\x21\x11\0\x0c" V4, n) == PROXY2_PARTIAL && h.source == PROXY2_REAL && h.len == 0);
    char most[PROXY2_MAX] = SIG "\x21\x11\x0f\xf0" V4 "\x04\x0f\xe1";
    assert(parse(most, sizeof most, PROXY2_OK).len == PROXY2_MAX);
}

static void tlvs(void)
{
    assert(parse(BYTES(SIG "\x21\x11\0\x0f" V4 "\x04\0\0"), PROXY2_OK).len == 31);
    assert(parse(BYTES(SIG "\x21\x11\0\x15" V4 "\x02\0\x01" "a\xee\0\x02zz"), PROXY2_OK).len == 37);
    is_wrong(BYTES(SIG "\x21\x11\0\x0d" V4 "\x04"), "cut off");
    is_wrong(BYTES(SIG "\x21\x11\0\x0e" V4 "\x04\0"), "cut off");
    is_wrong(BYTES(SIG "\x21\x11\0\x10" V4 "\x04\0\x02" "a"), "longer than the header");
    is_wrong(BYTES(SIG "\x21\x11\0\x0f" V4 "\x04\xff\xff"), "longer than the header");
}

/* The checksums come from the reference in RFC 4960, computed apart. */
static void checksums(void)
{
    static const char good[] = SIG "\x21\x11\0\x13" V4 "\x03\0\x04\x4c\x74\x47\xa8";
    size_t len = sizeof good - 1;
    assert(parse(good, len, PROXY2_OK).source == PROXY2_NETWORK);
    for (size_t i = 16; i < len; i++) { /* every bit of addresses and checksum */
        if (i >= 28 && i < 31)
            continue; /* its type and length: another TLV then */
        for (unsigned bit = 0; bit < 8; bit++) {
            char bad[sizeof good];
            memcpy(bad, good, sizeof good);
            bad[i] = (char)(bad[i] ^ (1 << bit));
            is_wrong(bad, len, "checksum is wrong");
        }
    }
    is_wrong(BYTES(SIG "\x21\x11\0\x12" V4 "\x03\0\x03\0\0\0"), "4 bytes");
    is_wrong(BYTES(SIG "\x21\x11\0\x1a" V4 "\x03\0\x04\0\0\0\0" "\x03\0\x04\0\0\0\0"), "two checksums");
    is_wrong(BYTES(SIG "\x20\x00\0\x07\x03\0\x04\0\0\0\x01"), "checksum is wrong");
    assert(parse(BYTES(SIG "\x20\x00\0\x07\x03\0\x04\xa9\xb8\x7e\x8f"), PROXY2_OK).source == PROXY2_REAL);
}

int main(void)
{
    addresses();
    without_an_address();
    what_is_none();
    tlvs();
    checksums();
    return 0;
}
