/* One client's HTTP/2 connection (RFC 9113): nghttp2 with accounting of our own before it.
 *
 * nghttp2 keeps the protocol: streams, windows, HPACK, the grammar of heads. What a client may make us do is counted here,
 * on the frame headers as they arrive, because nghttp2 1.52 has no limit for most of it and tells nobody of frames that it
 * ignores (unknown types, streams that are closed). The first frame over a limit is not read any more; what is left to say
 * is GOAWAY ENHANCE_YOUR_CALM.
 *
 * No socket is touched and no clock is read. A request's head is handed out as the HTTP/1.1 head that says the same, so
 * that one parser judges both (http1.h): names and values have no byte that could end a line when it is written. What is
 * malformed as HTTP/2 is reset with PROTOCOL_ERROR and never handed out.
 *
 * Calls from inside of h2_receive and h2_send may call everything of this header but h2_receive, h2_send and h2_free.
 */
#ifndef ASC_H2_H
#define ASC_H2_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "limit.h"

#define H2_PREFACE "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
#define H2_PREFACE_LEN 24u

typedef struct {
    uint32_t streams, stream_window, connection_window, frame, table; /* what our SETTINGS say */
    uint32_t resets, resets_rate, glitches, glitches_rate;            /* at once, and forgiven a second */
    uint32_t settings, pings;                                         /* in ten seconds */
    uint32_t settings_entries, continuations, priorities, empty_data, queued;
    uint32_t max_head, max_fields, max_trailers;                      /* those of HTTP/1.1 */
} h2_limits;

/* Error codes of RFC 9113 7 that we send on purpose. */
enum h2_code { H2_NO_ERROR = 0, H2_PROTOCOL_ERROR = 1, H2_INTERNAL_ERROR = 2, H2_CANCEL = 8 };

/* What the connection is told and asked. `stream` is what h2_adopt was given for it. */
typedef struct {
    /* A request head of len bytes, longer than max_head and without an end when it is over that. `ended`: no body follows,
     * and `ended` is called next. False: it cannot be taken, the stream is reset. */
    bool (*request)(void *owner, int32_t id, const char *head, size_t len, bool ended);
    void (*body)(void *owner, void *stream, const char *bytes, size_t len);
    void (*ended)(void *owner, void *stream); /* the request is complete */
    void (*over)(void *owner, void *stream, enum asc_limit limit); /* its trailers are */
    /* The stream is closed: reset by either side, or both have ended it. It is not named again. */
    void (*closed)(void *owner, void *stream, uint32_t code);
    size_t (*ready)(void *owner, void *stream, bool *last); /* bytes of answer that can be sent; nothing follows them */
    void (*send)(void *owner, void *stream, const uint8_t header[9], size_t len); /* that frame, with len of these bytes */
    void (*write)(void *owner, const uint8_t *bytes, size_t len);                 /* any other frame */
    bool (*writable)(void *owner);                                                /* more is taken now */
    void (*refused)(void *owner, enum asc_limit limit); /* a stream was: the connection goes on */
} h2_calls;

typedef struct h2_session h2_session;

/* NULL when out of memory. Our SETTINGS wait to be sent. */
h2_session *h2_new(void *owner, const h2_calls *calls, const h2_limits *limits, uint64_t now_ns);
void h2_free(h2_session *h);

/* Bytes from the client, its preface first. False: nothing more is read, the connection is to be closed once h2_send has
 * said why. */
bool h2_receive(h2_session *h, const uint8_t *bytes, size_t len, uint64_t now_ns);
/* Hand out what can be sent, as long as more is taken. False as above. */
bool h2_send(h2_session *h, uint64_t now_ns);
/* The limit that ended the connection, else LIMIT_NONE. */
enum asc_limit h2_tripped(const h2_session *h);
/* End it for a limit that is kept elsewhere. */
void h2_trip(h2_session *h, enum asc_limit limit);

void h2_adopt(h2_session *h, int32_t id, void *stream); /* from `request` */
void h2_forget(h2_session *h, int32_t id);              /* its `stream` is not to be used again */
/* Answer a stream. `lines` are field lines, each "name: value" and CRLF, and are changed: names become lower case.
 * `last`: nothing follows. Else bytes follow as `ready` says. */
bool h2_answer(h2_session *h, int32_t id, unsigned status, char *lines, size_t len, bool last);
bool h2_continue(h2_session *h, int32_t id); /* 100 */
void h2_more(h2_session *h, int32_t id);     /* `ready` would say more than the last time */
void h2_reset(h2_session *h, int32_t id, enum h2_code code);

/* A client that was answered before its request was complete may go on sending for a while, unheard: some clients lose the
 * answer if their stream is reset at once. To be called every second while there is one: the second call resets it. */
bool h2_unheard(const h2_session *h);
void h2_hush(h2_session *h);

/* End gracefully (RFC 9113 6.8): tell the client to open no more streams, and a round trip later which was the last. */
void h2_leave(h2_session *h);
void h2_leave_now(h2_session *h); /* do not wait for the round trip */
bool h2_leaving(const h2_session *h);
bool h2_left(const h2_session *h); /* no stream will be opened any more */

/* Since when a head has been on its way that has not come whole, 0 when none is. */
uint64_t h2_head_since(const h2_session *h);

#endif
