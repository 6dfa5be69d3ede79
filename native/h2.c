/* HTTP/2 of one client. See h2.h for the contract. */
#include "h2.h"

#include <nghttp2/nghttp2.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#define S 1000000000ull
#define WINDOW_SECONDS 10u /* of h2_settings and h2_pings */
#define BOMB 4u            /* a head that decodes to this many times its limit ends the connection, not only its stream */
#define DRIBBLE 1024u      /* a DATA frame that the client's window cut below this earns it no WINDOW_UPDATE */
#define EARNED 2u          /* WINDOW_UPDATE frames that a DATA frame calls for: its stream's and the connection's */
#define EARNED_MAX 100000u
#define FIELDS_OUT 160u
#define RECENT 64u        /* streams that are remembered after nghttp2 has forgotten them */
#define ENDED 0x80000000u /* the client has said its last on that stream */
/* Streams take turns: since 1.48 by telling nghttp2 so and leaving the tree of RFC 7540 alone, which is fair by default. */
#define FAIR_SINCE 0x013000

/* Tokens: `burst` at once, `rate` more in `seconds`. */
typedef struct {
    uint64_t level, at_ns; /* level in billionths */
} bucket;

enum leaving { STAYING, NOTICED, LEFT };

/* A head as it is decoded: pseudo fields first, then the HTTP/1.1 head that says the same. */
typedef struct {
    char *bytes;
    uint32_t len, cap;
    struct {
        uint32_t off, len;
    } method, path, authority;
    uint32_t text;               /* where the head begins; 0 before the first field that is no pseudo field */
    uint64_t decoded;            /* bytes of names and values */
    uint32_t fields;
    bool full, malformed, trailers;
} head_text;

struct h2_session {
    nghttp2_session *session;
    void *owner;
    const h2_calls *calls;
    const h2_limits *limits;
    uint64_t now_ns;
    /* the frame under way: its header, and what is looked at behind it (header_size) */
    uint8_t header[13];
    uint8_t header_len;
    uint8_t preface;             /* bytes of it to come */
    uint32_t left;               /* bytes of its payload to come */
    /* what has been counted */
    bucket resets, glitches, settings, pings;
    uint32_t continuations, priorities, empty_data, opened, earned, asked;
    int32_t last_id;
    uint32_t recent[RECENT];     /* the last streams that were opened, by `opened`; 0 none; with ENDED */
    uint64_t head_ns;
    bool head_ends;              /* END_HEADERS has come: the head is complete with this frame's payload */
    int32_t *unheard;            /* streams that are answered and whose request goes on */
    uint32_t n_unheard, n_old;   /* of them, those that have been there for a second */
    bool cut, over, broken;      /* broken: GOAWAY is all that is left to say */
    uint8_t tripped, leaving;
    head_text head;
};

/* ---- counting ----------------------------------------------------------------------------------------------------- */

static bool take(bucket *b, uint32_t burst, uint32_t rate, uint32_t seconds, uint64_t now_ns)
{
    uint64_t most = (uint64_t)burst * S, gone = now_ns > b->at_ns ? now_ns - b->at_ns : 0;
    if (gone > 3600 * S)
        gone = 3600 * S; /* so that nothing overflows; more than any bucket needs to fill up but the absurd */
    b->level += gone / seconds * rate;
    if (b->level > most || b->at_ns == 0)
        b->level = most;
    b->at_ns = now_ns;
    if (b->level < S)
        return false;
    b->level -= S;
    return true;
}

static bool trip(h2_session *h, enum asc_limit limit)
{
    h2_trip(h, limit);
    return false;
}

static bool glitch(h2_session *h)
{
    const h2_limits *l = h->limits;
    return take(&h->glitches, l->glitches, l->glitches_rate, 1, h->now_ns) || trip(h, LIMIT_H2_GLITCHES);
}

static bool reset_counts(h2_session *h)
{
    const h2_limits *l = h->limits;
    return take(&h->resets, l->resets, l->resets_rate, 1, h->now_ns) || trip(h, LIMIT_H2_RESETS);
}

/* The client has reason for a few more WINDOW_UPDATE frames. */
static void earn(h2_session *h)
{
    if (h->earned < EARNED_MAX)
        h->earned += EARNED;
}

static uint32_t load24(const uint8_t *p)
{
    return (uint32_t)p[0] << 16 | (uint32_t)p[1] << 8 | p[2];
}

static int32_t load31(const uint8_t *p)
{
    return (int32_t)((uint32_t)(p[0] & 0x7f) << 24 | load24(p + 1));
}

static bool broken(h2_session *h, uint32_t code)
{
    if (!h->broken && h->tripped == LIMIT_NONE)
        (void)nghttp2_session_terminate_session(h->session, code);
    h->broken = true;
    return false;
}

/* The memory of a stream that was opened not long ago, NULL for any other. */
static uint32_t *recent(h2_session *h, int32_t id)
{
    for (uint32_t i = 0; i < RECENT && i < h->opened; i++) {
        uint32_t *known = &h->recent[(h->opened - 1 - i) % RECENT];
        if ((*known & ~ENDED) == (uint32_t)id)
            return known;
    }
    return NULL;
}

static void client_ended(h2_session *h, int32_t id)
{
    uint32_t *known = recent(h, id);
    if (known != NULL)
        *known |= ENDED;
}

/* A frame of a stream that nghttp2 does not know any more, and would ignore. It may have been on its way when we reset
 * that stream; but a client that has ended a stream itself, or goes back to one that it passed over, is wrong. */
static bool of_a_closed_stream(h2_session *h, int32_t id)
{
    if (id == 0 || id > h->last_id)
        return true; /* nghttp2 knows what to say */
    uint32_t *known = recent(h, id);
    uint32_t oldest = h->opened < RECENT ? 0 : h->recent[h->opened % RECENT] & ~ENDED;
    if (known == NULL && (uint32_t)id > oldest)
        return broken(h, NGHTTP2_PROTOCOL_ERROR); /* RFC 9113 5.1.1 */
    if (known != NULL && (*known & ENDED))
        return broken(h, NGHTTP2_STREAM_CLOSED); /* 5.1 */
    return glitch(h);
}

/* Is the frame, of which only the header is here, one too many? */
static bool count_frame(h2_session *h)
{
    const h2_limits *l = h->limits;
    const uint32_t len = load24(h->header);
    const uint8_t type = h->header[3], flags = h->header[4];
    const int32_t id = load31(h->header + 5);
    if ((type == NGHTTP2_DATA || type == NGHTTP2_HEADERS) && id <= h->last_id &&
        nghttp2_session_find_stream(h->session, id) == NULL)
        return of_a_closed_stream(h, id);
    switch (type) {
    case NGHTTP2_DATA: {
        bool padded = flags & NGHTTP2_FLAG_PADDED;
        bool empty = padded ? len <= 1u + h->header[9] : len == 0;
        h->empty_data = empty && !(flags & NGHTTP2_FLAG_END_STREAM) ? h->empty_data + 1 : 0;
        if (flags & NGHTTP2_FLAG_END_STREAM)
            client_ended(h, id);
        return h->empty_data <= l->empty_data || trip(h, LIMIT_H2_EMPTY_DATA);
    }
    case NGHTTP2_HEADERS:
        h->continuations = 0;
        h->head_ns = h->now_ns;
        h->head_ends = flags & NGHTTP2_FLAG_END_HEADERS;
        if (id > h->last_id) {
            h->last_id = id;
            h->recent[h->opened++ % RECENT] = (uint32_t)id;
            earn(h); /* some clients open a window with each stream */
        }
        if (flags & NGHTTP2_FLAG_END_STREAM)
            client_ended(h, id);
        return true;
    case NGHTTP2_CONTINUATION:
        h->head_ends = flags & NGHTTP2_FLAG_END_HEADERS;
        return (len > 0 && ++h->continuations <= l->continuations) || trip(h, LIMIT_H2_CONTINUATIONS);
    case NGHTTP2_RST_STREAM:
        client_ended(h, id);
        return reset_counts(h);
    case NGHTTP2_SETTINGS:
        if (flags & NGHTTP2_FLAG_ACK)
            return true; /* nghttp2 knows whether it was asked for */
        if (len / 6 > l->settings_entries)
            return trip(h, LIMIT_H2_SETTINGS_ENTRIES);
        return take(&h->settings, l->settings, l->settings, WINDOW_SECONDS, h->now_ns) || trip(h, LIMIT_H2_SETTINGS);
    case NGHTTP2_PING:
        if ((flags & NGHTTP2_FLAG_ACK) && h->asked) {
            h->asked--;
            return true;
        }
        if (flags & NGHTTP2_FLAG_ACK)
            return glitch(h);
        return take(&h->pings, l->pings, l->pings, WINDOW_SECONDS, h->now_ns) || trip(h, LIMIT_H2_PINGS);
    case NGHTTP2_PRIORITY: /* nghttp2 ignores them, also those that are wrong (RFC 9113 6.3; RFC 7540 5.3.1) */
        if (id == 0 || (h->header_len == 13 && load31(h->header + 9) == id))
            return broken(h, NGHTTP2_PROTOCOL_ERROR);
        return ++h->priorities <= (uint64_t)l->priorities + h->opened || trip(h, LIMIT_H2_PRIORITIES);
    case NGHTTP2_WINDOW_UPDATE:
        if (h->earned) {
            h->earned--;
            return true;
        }
        return glitch(h);
    default:
        return glitch(h);
    }
}

enum asc_limit h2_tripped(const h2_session *h)
{
    return (enum asc_limit)h->tripped;
}

void h2_trip(h2_session *h, enum asc_limit limit)
{
    if (h->tripped != LIMIT_NONE || h->broken || h->over)
        return;
    h->tripped = (uint8_t)limit;
    (void)nghttp2_session_terminate_session(h->session, NGHTTP2_ENHANCE_YOUR_CALM);
}

static void drop_head(h2_session *h)
{
    free(h->head.bytes);
    h->head = (head_text){0};
}

/* ---- receiving ---------------------------------------------------------------------------------------------------- */

/* How much of a frame is looked at before it is counted: of padded DATA the length of the padding, of PRIORITY the stream
 * that it names. */
static uint8_t header_size(const h2_session *h)
{
    if (h->header_len < 9)
        return 9;
    uint32_t len = load24(h->header);
    if (h->header[3] == NGHTTP2_DATA && (h->header[4] & NGHTTP2_FLAG_PADDED) && len > 0)
        return 10;
    return h->header[3] == NGHTTP2_PRIORITY && len == 5 ? 13 : 9;
}

/* How many of these bytes belong to one frame (or the preface); its header is counted once it is whole. 0: one too many. */
static size_t frame_bytes(h2_session *h, const uint8_t *bytes, size_t len)
{
    size_t n = 0;
    if (h->preface) {
        n = len < h->preface ? len : h->preface;
        h->preface = (uint8_t)(h->preface - n);
        return n;
    }
    if (h->left == 0) {
        while (n < len && h->header_len < header_size(h))
            h->header[h->header_len++] = bytes[n++];
        if (h->header_len < header_size(h))
            return n;
        if (!count_frame(h))
            return 0;
        h->left = load24(h->header) - (h->header_len - 9u);
    }
    size_t more = len - n < h->left ? len - n : h->left;
    h->left -= (uint32_t)more;
    if (h->left == 0) {
        h->header_len = 0;
        if (h->head_ends) {
            h->head_ns = 0;
            h->head_ends = false;
        }
    }
    return n + more;
}

bool h2_receive(h2_session *h, const uint8_t *bytes, size_t len, uint64_t now_ns)
{
    h->now_ns = now_ns;
    while (len && !h->over && !h->broken && h->tripped == LIMIT_NONE) {
        size_t n = frame_bytes(h, bytes, len);
        if (n == 0)
            break;
        ssize_t took = nghttp2_session_mem_recv(h->session, bytes, n);
        if (took < 0) {
            h->over = h->tripped == LIMIT_NONE;
            break;
        }
        bytes += n;
        len -= n;
    }
    if (h->head_ns == 0)
        drop_head(h); /* of a stream that was reset in the middle of it */
    if (h->tripped == LIMIT_NONE && !h->over &&
        nghttp2_session_get_outbound_queue_size(h->session) > h->limits->queued + h->limits->streams)
        h2_trip(h, LIMIT_H2_QUEUED);
    return !h->over && !h->broken && h->tripped == LIMIT_NONE;
}

uint64_t h2_head_since(const h2_session *h)
{
    return h->head_ns;
}

/* ---- a request's head --------------------------------------------------------------------------------------------- */

static void append(h2_session *h, const void *bytes, size_t len)
{
    head_text *head = &h->head;
    const uint32_t most = h->limits->max_head + 1; /* of a head; one byte more says that it is over */
    if (head->len - head->text + len > most) {
        head->full = true;
        len = head->len - head->text < most ? most - (head->len - head->text) : 0;
    }
    if (head->len + len > head->cap) {
        uint32_t cap = head->cap ? head->cap : 1024;
        while (cap < head->len + len)
            cap *= 2;
        char *grown = realloc(head->bytes, cap);
        if (grown == NULL) {
            head->malformed = true;
            return;
        }
        head->bytes = grown;
        head->cap = cap;
    }
    memcpy(head->bytes + head->len, bytes, len);
    head->len += (uint32_t)len;
}

/* A part of what has been appended, once more. */
static void again(h2_session *h, uint32_t off, uint32_t len)
{
    char piece[256];
    for (uint32_t at = 0; at < len; at += sizeof piece) { /* the block may move while it grows */
        size_t n = len - at < sizeof piece ? len - at : sizeof piece;
        memcpy(piece, h->head.bytes + off + at, n);
        append(h, piece, n);
    }
}

#define LITERAL(text) append(h, text, sizeof(text) - 1)

/* All pseudo fields are here: request line and Host. */
static void begin_text(h2_session *h)
{
    head_text *head = &h->head;
    if (head->text || head->malformed)
        return;
    head->text = head->len;
    head->full = false;
    again(h, head->method.off, head->method.len);
    LITERAL(" ");
    again(h, head->path.off, head->path.len);
    LITERAL(" HTTP/1.1\r\n");
    if (head->authority.len) {
        LITERAL("host: ");
        again(h, head->authority.off, head->authority.len);
        LITERAL("\r\n");
    }
}

static bool is_name(const uint8_t *name, size_t len)
{
    for (size_t i = 0; i < len; i++)
        if (name[i] <= ' ' || name[i] >= 0x7f || name[i] == ':' || (name[i] >= 'A' && name[i] <= 'Z'))
            return false;
    return len > 0;
}

static bool is_value(const uint8_t *value, size_t len)
{
    for (size_t i = 0; i < len; i++)
        if (value[i] == '\r' || value[i] == '\n' || value[i] == '\0')
            return false;
    return true;
}

static void take_pseudo(h2_session *h, const uint8_t *name, size_t len, const uint8_t *value, size_t value_len)
{
    head_text *head = &h->head;
    uint32_t off = head->len;
    append(h, value, value_len);
#define IS(text) (len == sizeof(text) - 1 && memcmp(name, text, len) == 0)
    if (IS(":method"))
        head->method.off = off, head->method.len = head->len - off;
    else if (IS(":path"))
        head->path.off = off, head->path.len = head->len - off;
    else if (IS(":authority"))
        head->authority.off = off, head->authority.len = head->len - off;
    else if (!IS(":scheme"))
        head->malformed = true;
#undef IS
}

static int on_begin_headers(nghttp2_session *session, const nghttp2_frame *frame, void *data)
{
    (void)session;
    h2_session *h = data;
    head_text *head = &h->head;
    char *bytes = head->bytes;
    uint32_t cap = head->cap;
    *head = (head_text){.bytes = bytes, .cap = cap, .trailers = frame->headers.cat != NGHTTP2_HCAT_REQUEST};
    return 0;
}

static int on_header(nghttp2_session *session, const nghttp2_frame *frame, const uint8_t *name, size_t name_len,
                     const uint8_t *value, size_t value_len, uint8_t flags, void *data)
{
    (void)session, (void)frame, (void)flags;
    h2_session *h = data;
    head_text *head = &h->head;
    const h2_limits *l = h->limits;
    head->decoded += name_len + value_len;
    head->fields++;
    /* Each byte on the wire may stand for a whole entry of the table: stop long before that costs something. */
    if (head->decoded > (uint64_t)BOMB * l->max_head || head->fields > (uint64_t)BOMB * l->max_fields) {
        h2_trip(h, head->decoded > (uint64_t)BOMB * l->max_head ? LIMIT_MAX_HEAD : LIMIT_MAX_FIELDS);
        return NGHTTP2_ERR_CALLBACK_FAILURE;
    }
    if (head->trailers)
        return 0; /* never passed on */
    if (!is_value(value, value_len)) {
        head->malformed = true;
    } else if (name_len && name[0] == ':') {
        take_pseudo(h, name, name_len, value, value_len);
    } else if (!is_name(name, name_len)) {
        head->malformed = true;
    } else {
        begin_text(h);
        if (name_len == 4 && memcmp(name, "host", 4) == 0 && head->authority.len) {
            /* RFC 9113 8.3.1: the same as :authority, or nobody can say which is meant */
            if (value_len != head->authority.len ||
                strncasecmp((const char *)value, head->bytes + head->authority.off, value_len) != 0)
                head->malformed = true;
            return 0;
        }
        append(h, name, name_len);
        LITERAL(": ");
        append(h, value, value_len);
        LITERAL("\r\n");
    }
    return 0;
}

/* A field that nghttp2 would leave out in silence. */
static int on_invalid_header(nghttp2_session *session, const nghttp2_frame *frame, const uint8_t *name, size_t name_len,
                             const uint8_t *value, size_t value_len, uint8_t flags, void *data)
{
    (void)session, (void)frame, (void)name, (void)name_len, (void)value, (void)value_len, (void)flags, (void)data;
    return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE; /* RST_STREAM PROTOCOL_ERROR */
}

static void begin_request(h2_session *h, int32_t id, bool ended)
{
    head_text *head = &h->head;
    begin_text(h);
    if (!head->full)
        LITERAL("\r\n");
    if (head->malformed) {
        h2_reset(h, id, H2_PROTOCOL_ERROR);
        return;
    }
#if NGHTTP2_VERSION_NUM >= FAIR_SINCE
    static const nghttp2_extpri in_turn = {.urgency = NGHTTP2_EXTPRI_DEFAULT_URGENCY, .inc = 1};
    (void)nghttp2_session_change_extpri_stream_priority(h->session, id, &in_turn, 1);
#endif
    if (!h->calls->request(h->owner, id, head->bytes + head->text, head->len - head->text, ended)) {
        h2_reset(h, id, H2_INTERNAL_ERROR);
        return;
    }
    void *stream = nghttp2_session_get_stream_user_data(h->session, id); /* NULL: answered and forgotten in there */
    if (ended && stream != NULL)
        h->calls->ended(h->owner, stream);
}

static int on_frame_recv(nghttp2_session *session, const nghttp2_frame *frame, void *data)
{
    h2_session *h = data;
    const int32_t id = frame->hd.stream_id;
    const bool ended = frame->hd.flags & NGHTTP2_FLAG_END_STREAM;
    if (frame->hd.type == NGHTTP2_HEADERS && frame->headers.cat == NGHTTP2_HCAT_REQUEST) {
        begin_request(h, id, ended);
        drop_head(h);
    } else if (frame->hd.type == NGHTTP2_HEADERS || frame->hd.type == NGHTTP2_DATA) {
        void *stream = nghttp2_session_get_stream_user_data(session, id);
        bool over = frame->hd.type == NGHTTP2_HEADERS && h->head.decoded > h->limits->max_trailers;
        if (frame->hd.type == NGHTTP2_HEADERS)
            drop_head(h);
        if (stream != NULL && over)
            h->calls->over(h->owner, stream, LIMIT_MAX_TRAILERS);
        else if (stream != NULL && ended)
            h->calls->ended(h->owner, stream);
    } else if (frame->hd.type == NGHTTP2_PING && (frame->hd.flags & NGHTTP2_FLAG_ACK) && h->leaving == NOTICED) {
        h2_leave_now(h); /* all that the client opened before it knew has come */
    }
    return h->tripped == LIMIT_NONE ? 0 : NGHTTP2_ERR_CALLBACK_FAILURE;
}

static int on_data_chunk(nghttp2_session *session, uint8_t flags, int32_t id, const uint8_t *bytes, size_t len, void *data)
{
    (void)flags;
    h2_session *h = data;
    void *stream = nghttp2_session_get_stream_user_data(session, id);
    if (stream != NULL)
        h->calls->body(h->owner, stream, (const char *)bytes, len);
    return 0;
}

static int on_stream_close(nghttp2_session *session, int32_t id, uint32_t code, void *data)
{
    h2_session *h = data;
    void *stream = nghttp2_session_get_stream_user_data(session, id);
    if (stream != NULL)
        h->calls->closed(h->owner, stream, code);
    return 0;
}

/* ---- sending ------------------------------------------------------------------------------------------------------ */

static ssize_t read_ready(nghttp2_session *session, int32_t id, uint8_t *buf, size_t length, uint32_t *flags,
                          nghttp2_data_source *source, void *data)
{
    (void)buf, (void)source;
    h2_session *h = data;
    void *stream = nghttp2_session_get_stream_user_data(session, id);
    if (stream == NULL) /* forgotten: it has been reset */
        return NGHTTP2_ERR_DEFERRED;
    bool last = false;
    size_t ready = h->calls->ready(h->owner, stream, &last), n = ready < length ? ready : length;
    if (n == 0 && !(last && ready == 0))
        return NGHTTP2_ERR_DEFERRED;
    *flags |= NGHTTP2_DATA_FLAG_NO_COPY;
    if (last && n == ready)
        *flags |= NGHTTP2_DATA_FLAG_EOF;
    h->cut = n < ready && n < DRIBBLE;
    return (ssize_t)n;
}

static int send_data(nghttp2_session *session, nghttp2_frame *frame, const uint8_t *header, size_t length,
                     nghttp2_data_source *source, void *data)
{
    (void)source;
    h2_session *h = data;
    void *stream = nghttp2_session_get_stream_user_data(session, frame->hd.stream_id);
    if (stream == NULL)
        return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE; /* cannot be: nothing comes between read_ready and this */
    h->calls->send(h->owner, stream, header, length);
    if (!h->cut && length)
        earn(h);
    return h->calls->writable(h->owner) ? 0 : NGHTTP2_ERR_PAUSE;
}

/* Answered before the request was complete: nobody reads the rest (RFC 9113 8.1). */
static void leave_unheard(h2_session *h, int32_t id)
{
    if (h->unheard == NULL)
        h->unheard = malloc(h->limits->streams * sizeof *h->unheard);
    if (h->unheard == NULL || h->n_unheard == h->limits->streams)
        h2_reset(h, id, H2_NO_ERROR);
    else
        h->unheard[h->n_unheard++] = id;
}

bool h2_unheard(const h2_session *h)
{
    return h->n_unheard != 0;
}

void h2_hush(h2_session *h)
{
    for (uint32_t i = 0; i < h->n_old; i++)
        if (nghttp2_session_find_stream(h->session, h->unheard[i]) != NULL)
            h2_reset(h, h->unheard[i], H2_NO_ERROR);
    h->n_unheard -= h->n_old;
    if (h->n_unheard)
        memmove(h->unheard, h->unheard + h->n_old, h->n_unheard * sizeof *h->unheard);
    h->n_old = h->n_unheard;
    if (h->n_unheard == 0) {
        free(h->unheard);
        h->unheard = NULL;
    }
}

static int on_frame_send(nghttp2_session *session, const nghttp2_frame *frame, void *data)
{
    h2_session *h = data;
    const int32_t id = frame->hd.stream_id;
    switch (frame->hd.type) {
    case NGHTTP2_RST_STREAM: /* those that the client has brought about count as its own */
        switch (frame->rst_stream.error_code) {
        case NGHTTP2_NO_ERROR: case NGHTTP2_INTERNAL_ERROR: case NGHTTP2_CANCEL:
            break;
        case NGHTTP2_REFUSED_STREAM:
            h->calls->refused(h->owner, LIMIT_H2_STREAMS);
            /* fall through */
        default:
            (void)reset_counts(h);
            break;
        }
        break;
    case NGHTTP2_HEADERS: case NGHTTP2_DATA:
        if ((frame->hd.flags & NGHTTP2_FLAG_END_STREAM) && nghttp2_session_get_stream_remote_close(session, id) == 0)
            leave_unheard(h, id);
        break;
    default:
        break;
    }
    return 0;
}

bool h2_send(h2_session *h, uint64_t now_ns)
{
    h->now_ns = now_ns;
    while (!h->over && h->calls->writable(h->owner)) {
        const uint8_t *bytes;
        ssize_t n = nghttp2_session_mem_send(h->session, &bytes);
        if (n < 0)
            h->over = true;
        if (n <= 0)
            break;
        h->calls->write(h->owner, bytes, (size_t)n);
    }
    if (!nghttp2_session_want_read(h->session) && !nghttp2_session_want_write(h->session))
        h->over = true; /* GOAWAY with an error has been sent */
    return !h->over && !h->broken && h->tripped == LIMIT_NONE;
}

static nghttp2_nv field(const char *name, size_t name_len, const char *value, size_t value_len)
{
    return (nghttp2_nv){(uint8_t *)name, (uint8_t *)value, name_len, value_len, NGHTTP2_NV_FLAG_NONE};
}

/* Fields of one connection only (RFC 9113 8.2.2). */
static bool hop_by_hop(const char *name, size_t len)
{
    static const char *const names[] = {"connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (strlen(names[i]) == len && memcmp(names[i], name, len) == 0)
            return true;
    return false;
}

static size_t split_lines(nghttp2_nv *fields, size_t n, char *lines, size_t len)
{
    for (char *at = lines, *end = lines + len; at < end && n < FIELDS_OUT;) {
        char *stop = memchr(at, '\r', (size_t)(end - at));
        char *colon = stop == NULL ? NULL : memchr(at, ':', (size_t)(stop - at));
        if (colon == NULL)
            break; /* the empty line */
        for (char *c = at; c < colon; c++)
            if (*c >= 'A' && *c <= 'Z')
                *c = (char)(*c + 32);
        char *value = colon + 1;
        while (value < stop && *value == ' ')
            value++;
        if (!hop_by_hop(at, (size_t)(colon - at))) {
            fields[n] = field(at, (size_t)(colon - at), value, (size_t)(stop - value));
            if (fields[n].namelen == 12 && memcmp(at, "x-request-id", 12) == 0)
                fields[n].flags = NGHTTP2_NV_FLAG_NO_INDEX; /* never the same twice: would only drive others out */
            n++;
        }
        at = stop + 2;
    }
    return n;
}

bool h2_answer(h2_session *h, int32_t id, unsigned status, char *lines, size_t len, bool last)
{
    nghttp2_nv fields[FIELDS_OUT];
    char digits[3] = {(char)('0' + status / 100 % 10), (char)('0' + status / 10 % 10), (char)('0' + status % 10)};
    fields[0] = field(":status", 7, digits, 3);
    size_t n = split_lines(fields, 1, lines, len);
    nghttp2_data_provider provider = {.read_callback = read_ready};
    return nghttp2_submit_response(h->session, id, fields, n, last ? NULL : &provider) == 0;
}

bool h2_continue(h2_session *h, int32_t id)
{
    nghttp2_nv status = field(":status", 7, "100", 3);
    return nghttp2_submit_headers(h->session, NGHTTP2_FLAG_NONE, id, NULL, &status, 1, NULL) == 0;
}

void h2_more(h2_session *h, int32_t id)
{
    (void)nghttp2_session_resume_data(h->session, id); /* fails when it is not waiting: then it will ask by itself */
}

void h2_reset(h2_session *h, int32_t id, enum h2_code code)
{
    (void)nghttp2_submit_rst_stream(h->session, NGHTTP2_FLAG_NONE, id, (uint32_t)code);
}

void h2_adopt(h2_session *h, int32_t id, void *stream)
{
    (void)nghttp2_session_set_stream_user_data(h->session, id, stream);
}

void h2_forget(h2_session *h, int32_t id)
{
    (void)nghttp2_session_set_stream_user_data(h->session, id, NULL);
}

/* ---- the end ------------------------------------------------------------------------------------------------------ */

void h2_leave(h2_session *h)
{
    static const uint8_t mark[8] = "leaving";
    if (h->leaving != STAYING)
        return;
    h->leaving = NOTICED;
    (void)nghttp2_submit_shutdown_notice(h->session);
    if (nghttp2_submit_ping(h->session, NGHTTP2_FLAG_NONE, mark) == 0)
        h->asked++;
}

void h2_leave_now(h2_session *h)
{
    if (h->leaving == LEFT)
        return;
    h->leaving = LEFT;
    (void)nghttp2_submit_goaway(h->session, NGHTTP2_FLAG_NONE, nghttp2_session_get_last_proc_stream_id(h->session),
                                NGHTTP2_NO_ERROR, NULL, 0);
}

bool h2_leaving(const h2_session *h)
{
    return h->leaving != STAYING;
}

bool h2_left(const h2_session *h)
{
    return h->leaving == LEFT;
}

/* ---- making ------------------------------------------------------------------------------------------------------- */

static nghttp2_session *make_session(h2_session *h)
{
    nghttp2_session *session = NULL;
    nghttp2_session_callbacks *callbacks = NULL;
    nghttp2_option *option = NULL;
    if (nghttp2_session_callbacks_new(&callbacks) != 0 || nghttp2_option_new(&option) != 0)
        goto out;
    nghttp2_session_callbacks_set_on_begin_headers_callback(callbacks, on_begin_headers);
    nghttp2_session_callbacks_set_on_header_callback(callbacks, on_header);
    nghttp2_session_callbacks_set_on_invalid_header_callback(callbacks, on_invalid_header);
    nghttp2_session_callbacks_set_on_frame_recv_callback(callbacks, on_frame_recv);
    nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, on_data_chunk);
    nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, on_stream_close);
    nghttp2_session_callbacks_set_on_frame_send_callback(callbacks, on_frame_send);
    nghttp2_session_callbacks_set_send_data_callback(callbacks, send_data);
    nghttp2_option_set_no_closed_streams(option, 1);
    nghttp2_option_set_max_settings(option, h->limits->settings_entries);
    if (nghttp2_session_server_new2(&session, callbacks, h, option) != 0)
        session = NULL;
out:
    nghttp2_session_callbacks_del(callbacks);
    nghttp2_option_del(option);
    return session;
}

h2_session *h2_new(void *owner, const h2_calls *calls, const h2_limits *limits, uint64_t now_ns)
{
    h2_session *h = calloc(1, sizeof *h);
    if (h == NULL)
        return NULL;
    h->owner = owner;
    h->calls = calls;
    h->limits = limits;
    h->now_ns = now_ns;
    h->preface = H2_PREFACE_LEN;
    h->session = make_session(h);
    nghttp2_settings_entry settings[] = {
        {NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS, limits->streams},
        {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, limits->stream_window},
        {NGHTTP2_SETTINGS_MAX_FRAME_SIZE, limits->frame},
        {NGHTTP2_SETTINGS_HEADER_TABLE_SIZE, limits->table},
        {NGHTTP2_SETTINGS_MAX_HEADER_LIST_SIZE, limits->max_head},
#if NGHTTP2_VERSION_NUM >= FAIR_SINCE
        {NGHTTP2_SETTINGS_NO_RFC7540_PRIORITIES, 1},
#endif
    };
    if (h->session == NULL ||
        nghttp2_submit_settings(h->session, NGHTTP2_FLAG_NONE, settings, sizeof settings / sizeof settings[0]) != 0 ||
        nghttp2_session_set_local_window_size(h->session, NGHTTP2_FLAG_NONE, 0, (int32_t)limits->connection_window) != 0) {
        h2_free(h);
        return NULL;
    }
    return h;
}

void h2_free(h2_session *h)
{
    if (h == NULL)
        return;
    nghttp2_session_del(h->session);
    free(h->head.bytes);
    free(h->unheard);
    free(h);
}
