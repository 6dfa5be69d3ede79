/* The chunked transfer coding (RFC 9112 7.1), decoded in the caller's buffer.
 *
 * State is a few integers, so a body may be split anywhere. Payload is compacted in place: the first payload byte of
 * a call stays where it is and later pieces are moved down behind it, so that a read that holds one whole chunk moves
 * nothing. Extensions and trailers are skipped and dropped, within bounds.
 */
#ifndef ASC_CHUNK_H
#define ASC_CHUNK_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
    uint32_t max_extension;  /* bytes of extension on one chunk */
    uint32_t max_extensions; /* bytes of extensions in one body */
    uint32_t max_trailers;   /* bytes of trailer section */
} chunk_limits;

#define CHUNK_LIMITS {256, 16384, 8192} /* what is usual */

enum chunk_over { CHUNK_OVER_NOTHING, CHUNK_OVER_EXTENSION, CHUNK_OVER_EXTENSIONS, CHUNK_OVER_TRAILERS };

typedef struct {
    uint64_t left;       /* payload bytes left in the current chunk */
    uint64_t total;      /* payload bytes of the body so far */
    chunk_limits limits;
    uint32_t extensions, extension, trailers;
    uint8_t state, digits;
    uint8_t over;        /* enum chunk_over: the limit that made it CHUNK_BAD, if one did */
} chunk_decoder;

enum chunk_result { CHUNK_MORE = 0, CHUNK_END = 1, CHUNK_BAD = -1 };

void chunk_init(chunk_decoder *decoder, const chunk_limits *limits);

/* Decode buf[0..len). On return *data_off, *data_len tell where in buf the payload of this call lies (contiguous) and
 * *consumed how many bytes of input belonged to this body: less than len only with CHUNK_END (the rest is the next
 * message, untouched at buf + *consumed) or CHUNK_BAD. Bare LF line ends, sizes over 63 bits, more than 16 digits, signs, white
 * space around the size and control bytes in extensions are CHUNK_BAD. Trailer lines must be well-formed fields. */
enum chunk_result chunk_decode(chunk_decoder *decoder, char *buf, size_t len, size_t *data_off, size_t *data_len,
                               size_t *consumed);

/* Write the size line of a chunk of `len` bytes, "1a3\r\n", so that it *ends* at end[0]: returns its first byte. Needs 18 bytes
 * of room before `end`. */
char *chunk_size_before(char *end, uint64_t len);

#endif
