/* Server-sent events of model servers (WHATWG HTML 9.2.6), watched as they pass.
 *
 * The scanner changes nothing: it tells where events end, and what they said: usage, finish reason, error frames,
 * the terminator of the dialect. Events may be split anywhere, between and inside lines, and end in CR, LF or CRLF.
 * Comment lines (":") are no progress (SEMANTICS 3: they do not reset the idle deadline).
 */
#ifndef ASC_SSE_H
#define ASC_SSE_H

#include "jsonscan.h"

typedef struct {
    json_answer json;       /* scan of the data of the event under way */
    uint64_t events;        /* events with data that have ended */
    uint64_t content_events; /* those of them that carried content: about as many as tokens */
    uint64_t bytes;         /* bytes fed */
    uint64_t boundary;      /* offset just after the last complete event or comment block: 0 at first */
    int64_t usage_in, usage_out; /* last usage seen, -1 none */
    uint8_t dialect;        /* enum json_dialect */
    uint8_t finish;         /* enum json_finish: the last not none */
    bool terminated;        /* OPENAI: data [DONE]; MESSAGES: message_stop; RESPONSES: response.completed, .incomplete
                               or .failed; TGI: generated_text not null */
    bool error;             /* an error frame passed: OPENAI/TGI top-level "error"; MESSAGES: type error; RESPONSES:
                               type error or response.failed */
    bool content;           /* a content byte has passed (SEMANTICS 3, commit): OPENAI a non-empty delta.content,
                               .reasoning, .reasoning_content, .refusal, text, or any tool_calls; MESSAGES
                               content_block_delta;
                               RESPONSES any *.delta; TGI any token; NONE any data */
    bool progress;          /* set when data (not a comment) was seen in the last feed */
    uint64_t data_off;      /* offset of the first data byte of the event under way, or of the one that ended last */
    uint32_t data_lines;    /* how many data lines it has */
    /* private line state */
    uint8_t state, field, name_len, event_len, done_match;
    bool last_cr, has_data;
    char name[8];
    char event[40];
} sse_scanner;

void sse_init(sse_scanner *scanner, enum json_dialect dialect);

/* Watch bytes[0..len). Returns how many events ended in it. */
unsigned sse_feed(sse_scanner *scanner, const char *bytes, size_t len);

/* As sse_feed, but stop behind the next event: true when one ended at bytes + *consumed (its facts are those of
 * scanner->json until the next call), false when all bytes were consumed. progress is set here and never reset. */
bool sse_next(sse_scanner *scanner, const char *bytes, size_t len, size_t *consumed);

/* Where in the stream the usage member of the event that ended last lies (json_facts.usage_off as a stream offset), so
 * that it can be overwritten with spaces. False when it has none, or when its data is spread over several lines. */
bool sse_usage(const sse_scanner *scanner, uint64_t *off, uint64_t *len);

/* True when the stream so far ends exactly at an event boundary (a frame may be inserted here). */
static inline bool sse_at_boundary(const sse_scanner *scanner) { return scanner->boundary == scanner->bytes; }

#endif
