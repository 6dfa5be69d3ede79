/* units: chunk.c */
/* Any bytes as a chunked body: whole, in pieces whose size the first byte chooses, and byte by byte, must give the same
 * payload, verdict and length; payload never exceeds input. */
#include "../chunk.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

static void check(bool holds)
{
    if (!holds)
        abort();
}

static enum chunk_result decode(const uint8_t *data, size_t size, size_t step, char *out, size_t *out_len, size_t *used)
{
    chunk_decoder decoder;
    enum chunk_result result = CHUNK_MORE;
    chunk_init(&decoder, &(chunk_limits)CHUNK_LIMITS);
    *out_len = *used = 0;
    while (result == CHUNK_MORE && *used < size) {
        size_t n = size - *used < step ? size - *used : step, off, len, consumed;
        char *piece = malloc(n);
        memcpy(piece, data + *used, n);
        result = chunk_decode(&decoder, piece, n, &off, &len, &consumed);
        check(consumed <= n && off + len <= consumed && (result != CHUNK_MORE || consumed == n));
        memcpy(out + *out_len, piece + off, len);
        check(memcmp(piece + consumed, data + *used + consumed, n - consumed) == 0);
        *out_len += len;
        *used += consumed;
        free(piece);
    }
    check(decoder.total == *out_len);
    return result;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 2)
        return 0;
    size_t steps[] = {size, 1, 1 + data[0] % 32}, len[3], used[3];
    char *out[3];
    enum chunk_result result[3];
    for (int i = 0; i < 3; i++) {
        out[i] = malloc(size);
        result[i] = decode(data + 1, size - 1, steps[i], out[i], &len[i], &used[i]);
        check(result[i] == result[0] && len[i] == len[0] && used[i] == used[0] && memcmp(out[i], out[0], len[0]) == 0);
    }
    for (int i = 0; i < 3; i++)
        free(out[i]);
    return 0;
}
