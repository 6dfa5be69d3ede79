/* units: proxy2.c forwarded.c */
/* Any bytes as a PROXY v2 header: no part of one has another verdict than the whole, bytes behind it change nothing, and
 * its length is within bounds. The same bytes as X-Forwarded-For: elements get fewer, and what is an address reads the
 * same from its own text. */
#include "../forwarded.h"
#include "../proxy2.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

static void check(bool holds)
{
    if (!holds)
        abort();
}

static enum proxy2_result parse(proxy2_header *header, const uint8_t *data, size_t size)
{
    char *copy = malloc(size ? size : 1);
    memcpy(copy, data, size);
    enum proxy2_result result = proxy2_parse(header, copy, size);
    free(copy);
    return result;
}

static void header(const uint8_t *data, size_t size)
{
    proxy2_header whole, part;
    enum proxy2_result result = parse(&whole, data, size);
    check(result != PROXY2_ERROR || whole.why[0] != 0);
    check(result == PROXY2_OK || whole.len == 0);
    size_t parts = result == PROXY2_OK ? whole.len : size;
    check(result != PROXY2_OK || (whole.len >= PROXY2_FIXED && whole.len <= PROXY2_MAX && whole.len <= size));
    check(result != PROXY2_PARTIAL || size < PROXY2_MAX);
    for (size_t n = 0; n < parts; n += n < 64 ? 1 : 97) {
        enum proxy2_result early = parse(&part, data, n);
        check(early == PROXY2_PARTIAL || (early == PROXY2_ERROR && result == PROXY2_ERROR));
    }
    if (result == PROXY2_OK) {
        check(parse(&part, data, whole.len) == PROXY2_OK);
        check(part.source == whole.source && part.port == whole.port && memcmp(part.address, whole.address, 16) == 0);
    }
}

static void list(const uint8_t *data, size_t size)
{
    char *copy = malloc(size ? size : 1), text[FORWARDED_TEXT];
    memcpy(copy, data, size);
    uint8_t address[16], again[16];
    enum forwarded_result result;
    for (size_t len = size, before = size; (result = forwarded_last(copy, &len, address)) != FORWARDED_END; before = len) {
        check(len < before);
        if (result == FORWARDED_ADDRESS) {
            forwarded_text(address, text);
            size_t n = strlen(text);
            check(forwarded_last(text, &n, again) == FORWARDED_ADDRESS && n == 0 && memcmp(address, again, 16) == 0);
        }
    }
    free(copy);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    header(data, size);
    list(data, size);
    return 0;
}
