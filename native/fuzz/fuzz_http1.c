/* units: http1.c */
/* Any bytes as a request and as a response head: whole, and grown byte by byte, must come to the same verdict and
 * meaning; every span lies within the head. */
#include "../http1.h"

#include <stdlib.h>
#include <string.h>

static void check(bool holds)
{
    if (!holds)
        abort();
}

static void spans(const http1_head *head, size_t len)
{
    check(head->head_len <= len && head->n_fields <= HTTP1_MAX_FIELDS);
    check((size_t)head->target.off + head->target.len <= head->head_len);
    check(head->path.off == head->target.off && head->path.len <= head->target.len);
    check((size_t)head->query.off + head->query.len <= head->head_len);
    for (uint32_t i = 0; i < head->n_fields; i++) {
        const http1_field *field = &head->fields[i];
        check(field->name.len > 0 && (size_t)field->value.off + field->value.len <= head->head_len);
        check(field->id < HTTP1_N_NAMES && (field->id == 0 || head->count[field->id] > 0));
    }
}

static enum http1_result parse(http1_head *head, const char *bytes, size_t len, size_t seen, int kind)
{
    static const http1_limits limits = {120, 200, 2000, 12};
    if (kind == 0)
        return http1_parse_request(head, bytes, len, seen, &limits);
    return http1_parse_response(head, bytes, len, seen, kind == 2, &limits);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    for (int kind = 0; kind < 3; kind++) {
        static http1_head whole, grown;
        enum http1_result verdict = parse(&whole, (const char *)data, size, 0, kind), step = HTTP1_PARTIAL;
        size_t n = 0;
        while (step == HTTP1_PARTIAL && n < size) {
            char *exact = malloc(n + 1);
            memcpy(exact, data, n + 1);
            step = parse(&grown, exact, n + 1, n, kind);
            free(exact);
            n++;
        }
        if (verdict == HTTP1_DONE) {
            spans(&whole, size);
            check(step == HTTP1_DONE && n == whole.head_len && grown.n_fields == whole.n_fields);
            check(grown.framing == whole.framing && grown.content_length == whole.content_length);
            check(grown.keep_alive == whole.keep_alive && grown.status == whole.status);
            check(memcmp(whole.fields, grown.fields, whole.n_fields * sizeof *whole.fields) == 0);
        } else {
            check(step != HTTP1_DONE && (verdict != HTTP1_PARTIAL || step == HTTP1_PARTIAL));
            check(verdict != HTTP1_ERROR || (whole.reject != HTTP1_OK && whole.why));
        }
    }
    return 0;
}
