/* The chunked transfer coding, decoded in place. See chunk.h.
 *
 * The decoder is a table of states in reading order: one chunk is SIZE, perhaps EXTENSION, SIZE_LF, DATA, DATA_CR,
 * DATA_LF; the last chunk leads from SIZE_LF to the trailer section. White space between the size and ';' is allowed to
 * recipients by RFC 9112 7.1.1 and refused here: implementations differ in where they think that the size ends.
 */
#include "chunk.h"

#include <stdbool.h>
#include <string.h>

#define MAX_DIGITS 16u

enum state {
    SIZE,          /* the first byte of a size line */
    DIGITS,        /* in the size */
    EXTENSION,     /* after ';' */
    QUOTED,        /* in a quoted extension value */
    ESCAPED,       /* after a backslash in it */
    SIZE_LF,
    DATA,
    DATA_CR,
    DATA_LF,
    TRAILER,       /* the first byte of a trailer line */
    TRAILER_NAME,
    TRAILER_VALUE,
    TRAILER_LF,
    END_LF,        /* the LF of the empty line */
    ENDED,
    BROKEN,
};

static int hex_value(unsigned char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    c |= 0x20;
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

static bool is_token(unsigned char c)
{
    if ((c >= '0' && c <= '9') || ((c | 0x20) >= 'a' && (c | 0x20) <= 'z'))
        return true;
    return c && strchr("!#$%&'*+-.^_`|~", c);
}

static bool is_text(unsigned char c)
{
    return c == '\t' || (c >= 0x20 && c != 0x7f);
}

void chunk_init(chunk_decoder *decoder, const chunk_limits *limits)
{
    memset(decoder, 0, sizeof *decoder);
    decoder->limits = *limits;
}

static bool over(chunk_decoder *d, enum chunk_over limit)
{
    d->over = (uint8_t)limit;
    return false;
}

static bool trailer(chunk_decoder *d)
{
    return ++d->trailers <= d->limits.max_trailers || over(d, CHUNK_OVER_TRAILERS);
}

/* One byte of framing. Returns false when it is not allowed. */
static bool step(chunk_decoder *d, unsigned char c)
{
    switch ((enum state)d->state) {
    case SIZE:
        d->left = 0;
        d->digits = 0;
        d->extension = 0;
        d->state = DIGITS;
        if (hex_value(c) < 0)
            return false;
        /* fall through */
    case DIGITS: {
        int value = hex_value(c);
        if (value >= 0) {
            if (++d->digits > MAX_DIGITS || d->left >> 59) /* the result must stay below 2^63 */
                return false;
            d->left = d->left << 4 | (unsigned)value;
            return true;
        }
        if (c == ';')
            d->state = EXTENSION;
        else if (c == '\r')
            d->state = SIZE_LF;
        else
            return false;
        return true;
    }
    case EXTENSION:
    case QUOTED:
    case ESCAPED:
        if (c == '\r' && d->state == EXTENSION) {
            d->state = SIZE_LF;
            return true;
        }
        if (!is_text(c))
            return false;
        if (++d->extension > d->limits.max_extension)
            return over(d, CHUNK_OVER_EXTENSION);
        if (++d->extensions > d->limits.max_extensions)
            return over(d, CHUNK_OVER_EXTENSIONS);
        if (d->state == ESCAPED)
            d->state = QUOTED;
        else if (d->state == QUOTED)
            d->state = c == '"' ? EXTENSION : c == '\\' ? ESCAPED : QUOTED;
        else if (c == '"')
            d->state = QUOTED;
        return true;
    case SIZE_LF:
        d->state = d->left ? DATA : TRAILER;
        return c == '\n';
    case DATA_CR:
        d->state = DATA_LF;
        return c == '\r';
    case DATA_LF:
        d->state = SIZE;
        return c == '\n';
    case TRAILER:
        if (c == '\r') {
            d->state = END_LF;
            return true;
        }
        d->state = TRAILER_NAME;
        return is_token(c) && trailer(d);
    case TRAILER_NAME:
        if (c == ':')
            d->state = TRAILER_VALUE;
        else if (!is_token(c))
            return false;
        return trailer(d);
    case TRAILER_VALUE:
        if (c == '\r') {
            d->state = TRAILER_LF;
            return true;
        }
        return is_text(c) && trailer(d);
    case TRAILER_LF:
        d->state = TRAILER;
        return c == '\n';
    case END_LF:
        d->state = ENDED;
        return c == '\n';
    case DATA:
    case ENDED:
    case BROKEN:
        break;
    }
    return false;
}

enum chunk_result chunk_decode(chunk_decoder *d, char *buf, size_t len, size_t *data_off, size_t *data_len,
                               size_t *consumed)
{
    size_t at = 0, off = 0, out = 0; /* payload of this call: buf[off .. off + out) */
    enum chunk_result result = CHUNK_MORE;
    while (d->state != ENDED && d->state != BROKEN && at < len) {
        if (d->state != DATA) {
            if (!step(d, (unsigned char)buf[at]))
                d->state = BROKEN;
            else
                at++;
            continue;
        }
        size_t n = len - at < d->left ? len - at : (size_t)d->left;
        if (d->total + n > INT64_MAX) {
            d->state = BROKEN;
            break;
        }
        if (out == 0)
            off = at;
        else
            memmove(buf + off + out, buf + at, n);
        out += n;
        at += n;
        d->total += n;
        d->left -= n;
        if (d->left == 0)
            d->state = DATA_CR;
    }
    if (d->state == ENDED)
        result = CHUNK_END;
    else if (d->state == BROKEN)
        result = CHUNK_BAD;
    *data_off = off;
    *data_len = out;
    *consumed = at;
    return result;
}

char *chunk_size_before(char *end, uint64_t len)
{
    *--end = '\n';
    *--end = '\r';
    do {
        *--end = "0123456789abcdef"[len & 15];
        len >>= 4;
    } while (len);
    return end;
}
