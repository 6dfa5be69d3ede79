/* A bounded writer: bytes are appended up to the end of a caller's buffer; what does not fit sets `full` and is dropped. */
#ifndef ASC_WRITER_H
#define ASC_WRITER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    char *at, *end;
    bool full;
} asc_writer;

static inline void put(asc_writer *w, const char *bytes, size_t len)
{
    if (len > (size_t)(w->end - w->at)) {
        w->full = true;
        return;
    }
    if (len)
        memcpy(w->at, bytes, len);
    w->at += len;
}

#define put_literal(w, text) put((w), "" text, sizeof(text) - 1)

static inline void put_u64(asc_writer *w, uint64_t value)
{
    char digits[20];
    size_t at = sizeof digits;
    do {
        digits[--at] = (char)('0' + value % 10);
        value /= 10;
    } while (value);
    put(w, digits + at, sizeof digits - at);
}

static inline void put_i64(asc_writer *w, int64_t value)
{
    if (value < 0) {
        put_literal(w, "-");
        put_u64(w, 0 - (uint64_t)value);
    } else {
        put_u64(w, (uint64_t)value);
    }
}

/* The inside of a JSON string: control bytes, quote, backslash and everything outside ASCII escaped (LIMITS 2, log
 * injection); bytes above 0x7e are written as \u00xx, which keeps the line valid whatever a caller sends. */
void put_json(asc_writer *w, const char *bytes, size_t len);

#endif
