/* HTTP/1.1 framing as far as a stub and a load generator need it, for both directions.
 *
 * Both ends of the measurement are trusted, so this reader is lenient where the gateway's own is strict; what it must do is
 * find where a message ends (RFC 9112 section 6), because a benchmark that loses framing measures nothing. */
#ifndef BENCH_HTTP_H
#define BENCH_HTTP_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <strings.h>
#include <sys/types.h>

struct head {
    int64_t content_length; /* -1: not given */
    bool chunked;
    bool close;
};

/* Length of the head at p, its blank line included; 0 while incomplete. */
static inline size_t head_length(const char *p, size_t n) {
    const char *end = memmem(p, n, "\r\n\r\n", 4);
    return end ? (size_t)(end - p) + 4 : 0;
}

static inline bool field_is(const char *line, size_t n, const char *name, size_t name_len) {
    return n > name_len && line[name_len] == ':' && strncasecmp(line, name, name_len) == 0;
}

/* Reads the framing fields of a complete head of n bytes. False: a content-length that is not a number. */
static inline bool head_fields(const char *p, size_t n, struct head *h) {
    h->content_length = -1;
    h->chunked = h->close = false;
    const char *end = p + n - 2; /* the blank line */
    const char *line = (const char *)memchr(p, '\n', n) + 1;
    while (line < end) {
        const char *next = (const char *)memchr(line, '\n', (size_t)(end - line)) + 1;
        size_t len = (size_t)(next - line) - 2;
        /* The first letter decides: most lines of a head are none of these three. */
        switch (line[0] | 0x20) {
        case 'c':
            if (field_is(line, len, "content-length", 14)) {
                const char *q = line + 15, *stop = line + len;
                while (q < stop && *q == ' ')
                    q++;
                if (q == stop || stop - q > 15)
                    return false;
                h->content_length = 0;
                for (; q < stop && *q != ' '; q++) {
                    if (*q < '0' || *q > '9')
                        return false;
                    h->content_length = h->content_length * 10 + (*q - '0');
                }
            } else if (field_is(line, len, "connection", 10)) {
                h->close = memmem(line + 11, len - 11, "close", 5) != NULL;
            }
            break;
        case 't':
            if (field_is(line, len, "transfer-encoding", 17))
                h->chunked = memmem(line + 18, len - 18, "chunked", 7) != NULL;
            break;
        }
        line = next;
    }
    return true;
}

/* A marker: these letters and sixteen hexadecimal digits. A request has one of its own in its body, and its answer says
 * it back, so that an answer which belongs to somebody else is seen. */
enum { MARKER_WORD = 7, MARKER_DIGITS = 16 };
#define MARKER "marker-"

struct marker {
    unsigned at; /* bytes of it seen so far; all of them: it has been found */
    char digits[MARKER_DIGITS];
};

static inline bool marker_found(const struct marker *m) {
    return m->at == MARKER_WORD + MARKER_DIGITS;
}

/* Looks for the first marker in a piece of a body, across pieces. What follows the letters is taken as the digits: both
 * ends are trusted to say them, and whoever compares them sees it if they are none. */
static inline void marker_next(struct marker *m, const char *p, size_t n) {
    for (const char *end = p + n; p < end && !marker_found(m); p++) {
        if (m->at >= MARKER_WORD) {
            m->digits[m->at++ - MARKER_WORD] = *p;
            continue;
        }
        if (m->at == 0 && !(p = memchr(p, MARKER[0], (size_t)(end - p))))
            return;
        /* The first letter is in the word once, so that a mismatch begins anew with this byte or with the next. */
        m->at = *p == MARKER[m->at] ? m->at + 1 : *p == MARKER[0];
    }
}

/* Chunked coding (RFC 9112 section 7.1) as a table of one state and one byte; data is handed out in place. */
enum chunk_state { CHUNK_SIZE, CHUNK_EXTENSION, CHUNK_DATA, CHUNK_END, CHUNK_TRAILER, CHUNK_DONE, CHUNK_BAD };

struct chunks {
    enum chunk_state state;
    unsigned digits;   /* of the size line read so far */
    bool line_empty;   /* of the trailer line read so far */
    uint64_t left;     /* data bytes to come in this chunk */
    uint64_t count;    /* chunks with data, so far */
};

/* Consumes framing from p and at most one piece of data, named by *data and *len (0: none). Returns the bytes consumed;
 * call again while input is left and the state is neither CHUNK_DONE nor CHUNK_BAD. */
static inline size_t chunks_next(struct chunks *c, const char *p, size_t n, const char **data, size_t *len) {
    size_t i = 0;
    *len = 0;
    while (i < n) {
        unsigned char b = (unsigned char)p[i];
        switch (c->state) {
        case CHUNK_SIZE: {
            int digit = b >= '0' && b <= '9' ? b - '0' : (b | 0x20) >= 'a' && (b | 0x20) <= 'f' ? (b | 0x20) - 'a' + 10 : -1;
            if (digit >= 0 && c->digits < 15) {
                c->left = c->left * 16 + (unsigned)digit;
                c->digits++;
                i++;
            } else if (c->digits > 0 && digit < 0) {
                c->state = CHUNK_EXTENSION;
            } else {
                c->state = CHUNK_BAD;
                return i;
            }
            break;
        }
        case CHUNK_EXTENSION:
            i++;
            if (b == '\n') {
                c->digits = 0;
                c->line_empty = true;
                c->state = c->left > 0 ? CHUNK_DATA : CHUNK_TRAILER;
                if (c->left > 0)
                    c->count++;
            }
            break;
        case CHUNK_DATA:
            *data = p + i;
            *len = n - i < c->left ? n - i : (size_t)c->left;
            c->left -= *len;
            if (c->left == 0)
                c->state = CHUNK_END;
            return i + *len;
        case CHUNK_END:
            i++;
            if (b == '\n')
                c->state = CHUNK_SIZE;
            break;
        case CHUNK_TRAILER:
            i++;
            if (b == '\n') {
                if (c->line_empty) {
                    c->state = CHUNK_DONE;
                    return i;
                }
                c->line_empty = true;
            } else if (b != '\r') {
                c->line_empty = false;
            }
            break;
        case CHUNK_DONE:
        case CHUNK_BAD:
            return i;
        }
    }
    return i;
}

#endif
