/* Server-sent events, watched as they pass. See sse.h.
 *
 * A line is a field name, a colon, perhaps one space, and a value (WHATWG HTML 9.2.6); an empty line ends the event.
 * Data goes straight into the JSON scan, line by line, so that nothing is kept but the state of both.
 */
#include "sse.h"

#include <string.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define DONE "[DONE]"
#define NAME_LONG 0xff
#define NO_MATCH 0xff

enum state { STREAM_START, BOM_1, BOM_2, LINE_START, NAME, COLON, VALUE };
enum field { OTHER, DATA, EVENT };

/* First CR or LF, or end. */
static inline const char *line_end(const char *p, const char *end)
{
#if defined(__SSE2__)
    const __m128i cr = _mm_set1_epi8('\r'), lf = _mm_set1_epi8('\n');
    for (; end - p >= 16; p += 16) {
        __m128i x = _mm_loadu_si128((const __m128i *)(const void *)p);
        unsigned mask = (unsigned)_mm_movemask_epi8(_mm_or_si128(_mm_cmpeq_epi8(x, cr), _mm_cmpeq_epi8(x, lf)));
        if (mask)
            return p + __builtin_ctz(mask);
    }
#endif
    while (p < end && *p != '\r' && *p != '\n')
        p++;
    return p;
}

void sse_init(sse_scanner *s, enum json_dialect dialect)
{
    memset(s, 0, sizeof *s);
    s->dialect = (uint8_t)dialect;
    s->usage_in = s->usage_out = -1;
}

static void begin_data(sse_scanner *s, uint64_t at)
{
    s->progress = true;
    if (s->has_data) { /* a further line: joined by a LF, which is white space to JSON */
        s->data_lines++;
        s->done_match = NO_MATCH;
        json_answer_feed(&s->json, "\n", 1);
        return;
    }
    s->has_data = true;
    s->done_match = 0;
    s->data_off = at;
    s->data_lines = 1;
    json_answer_start(&s->json, (enum json_dialect)s->dialect);
}

static void more_data(sse_scanner *s, const char *p, size_t n)
{
    if (n == 0)
        return;
    s->progress = true;
    if (s->dialect == JSON_NONE) {
        s->content = true;
        return;
    }
    for (size_t i = 0; i < n && s->done_match != NO_MATCH; i++) {
        bool match = s->done_match < sizeof DONE - 1 && p[i] == DONE[s->done_match];
        s->done_match = match ? (uint8_t)(s->done_match + 1) : NO_MATCH;
    }
    json_answer_feed(&s->json, p, n);
    s->content |= json_answer_facts(&s->json)->has_content;
}

static void more_event(sse_scanner *s, const char *p, size_t n)
{
    size_t room = sizeof s->event - s->event_len;
    n = n < room ? n : room;
    memcpy(s->event + s->event_len, p, n);
    s->event_len = (uint8_t)(s->event_len + n);
}

static enum field field_of(const sse_scanner *s)
{
    if (s->name_len == 4 && memcmp(s->name, "data", 4) == 0)
        return DATA;
    return s->name_len == 5 && memcmp(s->name, "event", 5) == 0 ? EVENT : OTHER;
}

static void begin_value(sse_scanner *s, uint64_t at)
{
    s->state = VALUE;
    if (s->field == DATA)
        begin_data(s, at);
    else if (s->field == EVENT)
        s->event_len = 0;
}

static bool is_type(const char *type, size_t len, const char *name)
{
    return len == strlen(name) && memcmp(type, name, len) == 0;
}

/* An empty line: what the event said becomes what the stream said. */
static bool dispatch(sse_scanner *s)
{
    size_t event_len = s->event_len;
    s->event_len = 0;
    if (!s->has_data)
        return false;
    s->has_data = false;
    s->events++;
    if (s->dialect == JSON_NONE)
        return true;
    const json_facts *f = json_answer_facts(&s->json);
    if (f->usage_in >= 0)
        s->usage_in = f->usage_in;
    if (f->usage_out >= 0)
        s->usage_out = f->usage_out;
    if (f->finish != FINISH_NONE)
        s->finish = f->finish;
    s->error |= f->has_error;
    /* what the data calls itself counts, and the event's name where the data says nothing */
    const char *type = f->type_len ? f->type : s->event;
    size_t len = f->type_len ? f->type_len : event_len;
    s->content_events += f->has_content || (s->dialect == JSON_MESSAGES && is_type(type, len, "content_block_delta"));
    switch ((enum json_dialect)s->dialect) {
    case JSON_OPENAI:
        s->terminated |= s->done_match == sizeof DONE - 1;
        break;
    case JSON_MESSAGES:
        s->terminated |= is_type(type, len, "message_stop");
        s->error |= is_type(type, len, "error");
        s->content |= is_type(type, len, "content_block_delta");
        break;
    case JSON_RESPONSES:
        if (is_type(type, len, "response.failed"))
            s->terminated = s->error = true;
        s->terminated |= is_type(type, len, "response.completed") || is_type(type, len, "response.incomplete");
        s->error |= is_type(type, len, "error");
        break;
    case JSON_TGI:
        s->terminated |= f->final_text;
        break;
    case JSON_NONE:
        break;
    }
    return true;
}

bool sse_next(sse_scanner *s, const char *bytes, size_t len, size_t *consumed)
{
    const char *p = bytes, *const end = bytes + len;
    const uint64_t base = s->bytes;
    bool ended = false;

#define OFFSET(at) (base + (uint64_t)((at) - bytes))

    while (p < end) {
        switch ((enum state)s->state) {
        case STREAM_START: /* one byte order mark is not part of the first line */
            s->state = *p == '\xef' ? BOM_1 : LINE_START;
            p += *p == '\xef';
            break;
        case BOM_1:
        case BOM_2: {
            bool match = *p == (s->state == BOM_1 ? '\xbb' : '\xbf');
            s->state = !match ? NAME : s->state == BOM_1 ? BOM_2 : LINE_START;
            s->name_len = NAME_LONG; /* of a line that began with half of one */
            p += match;
            break;
        }
        case LINE_START:
            if (s->last_cr) {
                s->last_cr = false;
                if (*p == '\n') {
                    if (s->boundary == OFFSET(p))
                        s->boundary++;
                    p++;
                    break;
                }
            }
            if (*p == '\n' || *p == '\r') {
                s->last_cr = *p++ == '\r';
                ended = dispatch(s);
                if (s->last_cr && p < end && *p == '\n') {
                    s->last_cr = false;
                    p++;
                }
                s->boundary = OFFSET(p);
                if (ended)
                    goto out;
                break;
            }
            if (end - p >= 6 && memcmp(p, "data: ", 6) == 0) {
                p += 6;
                s->field = DATA;
                begin_value(s, OFFSET(p));
                break;
            }
            s->name_len = 0;
            s->state = NAME;
            break;
        case NAME:
            if (*p == ':') {
                s->field = (uint8_t)field_of(s);
                s->state = COLON;
                p++;
                break;
            }
            if (*p == '\r' || *p == '\n') { /* no colon: the whole line is the name, the value is empty */
                s->field = (uint8_t)field_of(s);
                begin_value(s, OFFSET(p));
                break;
            }
            if (s->name_len < sizeof s->name)
                s->name[s->name_len++] = *p;
            else
                s->name_len = NAME_LONG;
            p++;
            break;
        case COLON:
            if (*p == ' ')
                p++;
            begin_value(s, OFFSET(p));
            break;
        case VALUE: {
            const char *stop = line_end(p, end);
            if (s->field == DATA)
                more_data(s, p, (size_t)(stop - p));
            else if (s->field == EVENT)
                more_event(s, p, (size_t)(stop - p));
            p = stop;
            if (p < end) {
                s->last_cr = *p++ == '\r';
                s->state = LINE_START;
            }
            break;
        }
        }
    }

#undef OFFSET

out:
    *consumed = (size_t)(p - bytes);
    s->bytes += *consumed;
    return ended;
}

unsigned sse_feed(sse_scanner *s, const char *bytes, size_t len)
{
    unsigned events = 0;
    s->progress = false;
    for (size_t consumed; len > 0; bytes += consumed, len -= consumed)
        events += sse_next(s, bytes, len, &consumed);
    return events;
}

bool sse_usage(const sse_scanner *s, uint64_t *off, uint64_t *len)
{
    const json_facts *f = json_answer_facts(&s->json);
    if (s->has_data || s->events == 0 || s->dialect == JSON_NONE || s->data_lines != 1 || f->usage_raw_len == 0)
        return false;
    *off = s->data_off + f->usage_off;
    *len = f->usage_raw_len;
    return true;
}
