/* A client's connection that speaks HTTP/2: the binding of h2.c to Downstream and Stream.
 *
 * An exchange is the same Stream as with HTTP/1 and takes the same walk; only where it comes from and where its answer
 * goes is here. Frames are collected in a block and leave together, once a turn of the loop (core_flush).
 *
 * Bytes of an answer leave from where the upstream's were read, as far as the client's windows and its socket take them.
 * What they do not take is copied to the stream, which is `blocked` from then on: nothing more is read from its upstream
 * until all of that is gone. So a client that stalls one of its streams costs one read's worth of memory, and holds up no
 * other.
 */
#include "py_core.h"

#define TICK_NS (1000 * MS)      /* how often exchanges are looked at for their deadlines */
#define PATIENCE_NS (10000 * MS) /* how long a connection that is to end waits for a moment without exchanges */
#define LEAVE_NS (1000 * MS)     /* how long a client then has to answer the ping */

struct Frames {
    h2_session *session;
    Stream *streams, *freed; /* newest first, owned; those that take bytes again, referenced */
    uint32_t n_streams;
    Downstream *next_dirty;
    char *out;               /* what leaves at the end of this turn; NULL while there is nothing */
    size_t out_len;
    uint64_t now_ns, idle_ns, leave_ns;
    bool busy;               /* inside of the session: it is not entered again */
    bool dirty;              /* in core->dirty */
    bool parting;            /* to be ended as soon as nothing is under way */
    bool over;               /* only to be closed */
    bool closed;             /* that has been done */
};

/* ---- out ---------------------------------------------------------------------------------------------------------- */

void frames_touch(Downstream *d)
{
    Frames *f = d->frames;
    if (f == NULL || f->dirty)
        return;
    f->dirty = true;
    f->next_dirty = d->conn.core->dirty;
    d->conn.core->dirty = (Downstream *)Py_NewRef(d);
}

/* Into the block; what does not fit goes behind it from where it lies. */
static void put_out(Downstream *d, const void *bytes, size_t len)
{
    Frames *f = d->frames;
    Core *core = d->conn.core;
    if (f->out == NULL)
        f->out = core->n_spare_outs ? core->spare_outs[--core->n_spare_outs] : malloc(OUT_BLOCK);
    if (f->out == NULL) {
        conn_abort(&d->conn);
        return;
    }
    if (len <= OUT_BLOCK - f->out_len) {
        memcpy(f->out + f->out_len, bytes, len);
        f->out_len += len;
        return;
    }
    struct iovec iov[2] = {{f->out, f->out_len}, {(char *)bytes, len}};
    bool empty = f->out_len == 0;
    f->out_len = 0;
    (void)conn_send(&d->conn, iov + empty, 2 - empty);
}

static void send_out(Downstream *d)
{
    Frames *f = d->frames;
    Core *core = d->conn.core;
    if (f->out_len) {
        struct iovec all = {f->out, f->out_len};
        f->out_len = 0;
        (void)conn_send(&d->conn, &all, 1);
    }
    if (f->out != NULL && core->n_spare_outs < sizeof core->spare_outs / sizeof core->spare_outs[0])
        core->spare_outs[core->n_spare_outs++] = f->out;
    else
        free(f->out);
    f->out = NULL;
}

/* Frames, as many as can leave. */
static void pump(Downstream *d)
{
    Frames *f = d->frames;
    f->busy = true;
    if (!h2_send(f->session, asc_now()))
        f->over = true;
    f->busy = false;
}

static void block(Stream *s)
{
    if (s->h2.blocked)
        return;
    s->h2.blocked = s->h2.moved = true;
    s->core->n_paused++;
}

static void unblock(Stream *s)
{
    if (!s->h2.blocked)
        return;
    s->h2.blocked = false;
    s->core->n_paused--;
}

/* Go on with the exchanges whose bytes are all gone. */
static void go_on(Downstream *d)
{
    Stream *s;
    while ((s = d->frames->freed) != NULL) {
        d->frames->freed = s->h2.next_freed;
        s->h2.freed = false;
        if (s->h2.n_ready == 0 && (!s->h2.last || s->h2.ended))
            unblock(s);
        if (s->phase == PHASE_FLUSH)
            stream_flushed(s);
        else if (s->phase != PHASE_DONE && !s->h2.blocked && s->up != NULL && s->up->stream == s)
            conn_resume_reading(&s->up->conn);
        Py_DECREF(s);
    }
}

/* A limit has ended the connection: it counts once, and is named by each exchange that ends with it. */
static void name_limit(Downstream *d, enum asc_limit limit)
{
    core_trip(d->conn.core, limit);
    for (Stream *s = d->frames->streams; s != NULL; s = s->h2.next)
        s->limit = (uint8_t)limit;
}

static void flush(Downstream *d)
{
    Frames *f = d->frames;
    if (d->conn.fd < 0 || f->closed)
        return;
    pump(d);
    go_on(d);
    if (f->over) {
        pump(d); /* what is left to say, whatever waits in the transport */
        enum asc_limit limit = h2_tripped(f->session);
        if (limit != LIMIT_NONE)
            name_limit(d, limit);
        d->linger = true; /* the client may still be sending, if only WINDOW_UPDATE */
        frames_gone(d, "client_gone");
    }
    send_out(d);
    f->closed = f->over;
    if (f->over)
        down_close(d);
}

/* The end of a turn of the loop: everything that was collected leaves. */
void core_flush(Core *core)
{
    Downstream *d;
    while ((d = core->dirty) != NULL) {
        Frames *f = d->frames;
        core->dirty = f->next_dirty;
        f->dirty = false;
        if (!f->busy) /* else whoever is inside of it comes back here */
            flush(d);
        Py_DECREF(d);
    }
}

/* ---- answers ------------------------------------------------------------------------------------------------------ */

/* Send a part of an answer, behind its head if that has not been sent. With `end`, the answer is complete. */
int frames_write(Stream *s, const struct iovec *parts, int n, bool end)
{
    Downstream *d = s->down;
    Frames *f = d->frames;
    asc_h2_stream *h = &s->h2;
    struct iovec own[8];
    size_t total = 0;
    for (int i = 0; i < n; i++) {
        own[i] = parts[i];
        total += parts[i].iov_len;
    }
    s->bytes_out += s->head_out + total;
    size_t head = s->head_out;
    s->head_out = 0;
    if (d->conn.fd < 0 || h->closed)
        return -1;
    s->committed |= head || total || end;
    if (head) {
        h->last = h->ended = end && total == 0;
        if (!h2_answer(f->session, h->id, s->status, s->core->heads, head, h->last)) {
            conn_abort(&d->conn);
            return -1;
        }
    }
    if (!h->ended && (total || end)) {
        h->last = end;
        h->n_ready += total;
        h->parts = own;
        h->n_parts = n;
        h2_more(f->session, h->id);
        if (h->queued.len == 0 && !f->busy && !d->conn.write_paused)
            pump(d);
        for (int i = 0; i < h->n_parts; i++) /* what did not leave */
            if (h->parts[i].iov_len && !buffer_append(&h->queued, h->parts[i].iov_base, h->parts[i].iov_len, 0)) {
                conn_abort(&d->conn);
                return -1;
            }
        h->parts = NULL;
        h->n_parts = 0;
        if (h->n_ready || (end && !h->ended))
            block(s);
    }
    frames_touch(d);
    return 0;
}

void frames_continue(Stream *s)
{
    (void)h2_continue(s->down->frames->session, s->h2.id);
    frames_touch(s->down);
}

static size_t on_ready(void *owner, void *stream, bool *last)
{
    (void)owner;
    const asc_h2_stream *h = &((Stream *)stream)->h2;
    *last = h->last;
    return h->n_ready;
}

static void on_send(void *owner, void *stream, const uint8_t header[9], size_t len)
{
    Downstream *d = owner;
    Stream *s = stream;
    asc_h2_stream *h = &s->h2;
    put_out(d, header, 9);
    h->n_ready -= len;
    h->moved = true;
    h->ended = h->last && h->n_ready == 0;
    if (h->queued.len) {
        put_out(d, h->queued.bytes + h->queued.off, len);
        h->queued.off += len;
        h->queued.len -= len;
        if (h->queued.len == 0)
            buffer_free(&h->queued);
    }
    while (len && h->n_parts) {
        size_t n = len < h->parts->iov_len ? len : h->parts->iov_len;
        if (n)
            put_out(d, h->parts->iov_base, n);
        h->parts->iov_base = (char *)h->parts->iov_base + n;
        h->parts->iov_len -= n;
        len -= n;
        if (h->parts->iov_len == 0) {
            h->parts++;
            h->n_parts--;
        }
    }
    if (h->blocked && h->n_ready == 0 && !h->freed) {
        h->freed = true;
        h->next_freed = d->frames->freed;
        d->frames->freed = (Stream *)Py_NewRef(s);
    }
}

static void on_write(void *owner, const uint8_t *bytes, size_t len)
{
    put_out(owner, bytes, len);
}

static bool on_writable(void *owner)
{
    const Downstream *d = owner;
    return d->conn.fd >= 0 && (!d->conn.write_paused || d->frames->over);
}

/* End the connection gracefully, best while it is quiet: to some clients (Python's h2 library) any GOAWAY means that the
 * answers under way are lost, though it says the contrary. */
static void part(Downstream *d, uint64_t now)
{
    Frames *f = d->frames;
    bool quiet = f->n_streams == 0;
    if (!f->parting)
        f->leave_ns = now + PATIENCE_NS;
    f->parting = true;
    if (h2_leaving(f->session)) {
        if (now >= f->leave_ns)
            h2_leave_now(f->session);
    } else if (quiet || now >= f->leave_ns) {
        f->leave_ns = now + LEAVE_NS;
        h2_leave(f->session);
    }
}

/* ---- requests ----------------------------------------------------------------------------------------------------- */

static void tick_soon(Downstream *d)
{
    uint64_t at = d->frames->now_ns + TICK_NS;
    if (d->conn.kind != DOWN_FRAMES || d->conn.timer.deadline_ns > at)
        conn_deadline(&d->conn, DOWN_FRAMES, at);
}

/* An exchange begins. Without a head: only to be refused. */
static Stream *adopt(Downstream *d, int32_t id, const char *bytes, const http1_head *head)
{
    Frames *f = d->frames;
    Stream *s = stream_new(d, bytes, head);
    if (s == NULL) {
        PyErr_Clear();
        return NULL;
    }
    s->h2.id = id;
    s->h2.fresh = true;
    s->h2.next = f->streams;
    if (f->streams != NULL)
        f->streams->h2.prev = s;
    f->streams = s;
    f->n_streams++;
    h2_adopt(f->session, id, s);
    tick_soon(d);
    return s;
}

static bool on_request(void *owner, int32_t id, const char *bytes, size_t len, bool ended)
{
    Downstream *d = owner;
    Core *core = d->conn.core;
    http1_head *head = &core->head;
    if (!down_trusted(d)) { /* what is under way may end */
        h2_leave_now(d->frames->session);
        return false;
    }
    if (http1_parse_request(head, bytes, len, 0, &d->listener->limits.head) != HTTP1_DONE) {
        Stream *s = adopt(d, id, NULL, NULL);
        if (s == NULL)
            return false;
        if (head_limit(head) != LIMIT_NONE)
            stream_trip(s, head_limit(head));
        stream_reject(s, head_reject_code(head->reject));
        return true;
    }
    if (!ended && head->framing == HTTP1_NO_BODY)
        head->framing = HTTP1_CHUNKED; /* of unknown length */
    Stream *s = adopt(d, id, bytes, head);
    if (s == NULL)
        return false;
    enum asc_limit over = core->draining ? LIMIT_NONE : down_last(d, s->t_start);
    if (over != LIMIT_NONE && !d->frames->parting) {
        core_trip(core, over);
        part(d, s->t_start);
    }
    if (core->overload >= OVERLOAD_REFUSE) { /* before anything is collected */
        stream_trip(s, LIMIT_MEMORY_REFUSE);
        stream_reject(s, "overloaded");
    } else if (core->n_downs + core->n_in_flight > 2 * core->limits.max_connections) {
        /* Each may take a connection of its own to a server: a descriptor, as a client does. With HTTP/1 there are never
         * more of them than clients. */
        stream_trip(s, LIMIT_MAX_CONNECTIONS);
        stream_reject(s, "overloaded");
    }
    return true;
}

static bool takes_no_body(const Stream *s)
{
    return s->head_method || (s->method.len == 3 && memcmp(stream_at(s, s->method), "GET", 3) == 0);
}

static void on_body(void *owner, void *stream, const char *bytes, size_t len)
{
    Stream *s = stream;
    if (s->phase != PHASE_BODY)
        return; /* refused: the client has not heard yet */
    Py_INCREF(s);
    s->bytes_in += len;
    s->body_last_ns = ((Downstream *)owner)->frames->now_ns;
    if (takes_no_body(s))
        stream_reject(s, "invalid_request");
    else
        (void)stream_keep_body(s, bytes, len);
    Py_DECREF(s);
}

static void on_ended(void *owner, void *stream)
{
    (void)owner;
    Stream *s = stream;
    if (s->phase != PHASE_BODY)
        return;
    Py_INCREF(s);
    stream_request(s);
    Py_DECREF(s);
}

static void on_over(void *owner, void *stream, enum asc_limit limit)
{
    (void)owner;
    Stream *s = stream;
    if (s->phase != PHASE_BODY)
        return;
    Py_INCREF(s);
    stream_trip(s, limit);
    stream_reject(s, "invalid_request");
    Py_DECREF(s);
}

/* The client has reset the stream, or sent what resets it; or all is said by both. */
static void on_closed(void *owner, void *stream, uint32_t code)
{
    (void)owner;
    Stream *s = stream;
    s->h2.closed = true;
    if (code != H2_NO_ERROR || !s->h2.ended)
        stream_gone(s, "client_gone");
}

static void on_refused(void *owner, enum asc_limit limit)
{
    core_trip(((Downstream *)owner)->conn.core, limit);
}

/* Of the exchanges that began in this read: may the bodies that are not here yet come? */
static void admit_bodies(Downstream *d)
{
    Stream *s = d->frames->streams;
    Py_XINCREF(s);
    while (s != NULL && s->h2.fresh) {
        Stream *next = (Stream *)Py_XNewRef(s->h2.next);
        s->h2.fresh = false;
        if (s->phase == PHASE_BODY && stream_admit_body(s) && s->expect_continue && s->body_len == 0)
            frames_continue(s);
        Py_DECREF(s);
        s = next;
    }
    Py_XDECREF(s);
}

void frames_input(Downstream *d, const char *bytes, size_t len)
{
    Frames *f = d->frames;
    if (f->over || d->conn.fd < 0)
        return;
    f->now_ns = asc_now();
    f->busy = true;
    if (!h2_receive(f->session, (const uint8_t *)bytes, len, f->now_ns))
        f->over = true;
    f->busy = false;
    admit_bodies(d);
    if (h2_head_since(f->session))
        tick_soon(d);
    frames_touch(d);
}

/* ---- time --------------------------------------------------------------------------------------------------------- */

static void stream_due(Downstream *d, Stream *s, uint64_t now)
{
    if (s->phase == PHASE_BODY) {
        enum asc_limit over = stream_body_due(s, now);
        if (over != LIMIT_NONE) {
            stream_trip(s, over);
            stream_reject(s, "request_timeout");
        }
    } else if (s->h2.blocked) {
        if (s->h2.moved)
            s->h2.stall_ns = now;
        s->h2.moved = false;
        if (now >= s->h2.stall_ns + d->listener->limits.write_stall) {
            stream_trip(s, LIMIT_WRITE_STALL);
            stream_gone(s, "write_stall");
        }
    }
}

static void each_due(Downstream *d, uint64_t now, void (*due)(Downstream *, Stream *, uint64_t))
{
    Stream *s = d->frames->streams;
    Py_XINCREF(s);
    while (s != NULL) {
        Stream *next = (Stream *)Py_XNewRef(s->h2.next);
        if (s->phase != PHASE_DONE)
            due(d, s, now);
        Py_DECREF(s);
        s = next;
    }
}

void frames_due(Downstream *d, uint64_t now)
{
    Frames *f = d->frames;
    const Core *core = d->conn.core;
    const asc_limits *limits = &d->listener->limits;
    uint64_t head = h2_head_since(f->session);
    uint64_t idle = core->draining && limits->idle_timeout > core->drain_idle_ns ? core->drain_idle_ns : limits->idle_timeout;
    uint64_t born = d->opened_ns + d->age_ns;
    if (d->conn.write_paused && down_stalled(d, now)) {
        name_limit(d, LIMIT_WRITE_STALL);
        down_cut(d, true);
        frames_gone(d, "write_stall");
        return;
    }
    each_due(d, now, stream_due);
    h2_hush(f->session);
    if (head && now >= head + limits->header_timeout) {
        h2_trip(f->session, LIMIT_HEADER_TIMEOUT);
        f->over = true;
    } else if (f->n_streams == 0 && head == 0 && now >= f->idle_ns + idle && !h2_left(f->session)) {
        core_trip(d->conn.core, LIMIT_IDLE_TIMEOUT);
        h2_leave_now(f->session);
    } else if (f->parting || now >= born) {
        if (!f->parting)
            core_trip(d->conn.core, LIMIT_CONNECTION_AGE);
        part(d, now);
    }
    uint64_t at = f->idle_ns + idle < born ? f->idle_ns + idle : born;
    bool waits = f->n_streams == 0 && head == 0 && !f->parting && !d->conn.write_paused && !h2_unheard(f->session);
    conn_deadline(&d->conn, DOWN_FRAMES, waits && at > now ? at : now + TICK_NS);
    frames_touch(d);
}

void frames_draining(Downstream *d, uint64_t now)
{
    Frames *f = d->frames;
    if (f->n_streams == 0 && d->conn.core->drain_idle_ns == 0) {
        h2_leave_now(f->session);
    } else {
        part(d, now);
        f->now_ns = now;
        tick_soon(d);
    }
    frames_touch(d);
}

static void stream_drained(Downstream *d, Stream *s, uint64_t now)
{
    core_cut_drained(d->conn.core, s, now);
}

void frames_drained(Downstream *d, uint64_t now)
{
    each_due(d, now, stream_drained);
}

/* ---- beginning and end -------------------------------------------------------------------------------------------- */

void frames_open(Downstream *d)
{
    static const h2_calls calls = {
        .request = on_request, .body = on_body, .ended = on_ended, .over = on_over, .closed = on_closed,
        .ready = on_ready, .send = on_send, .write = on_write, .writable = on_writable, .refused = on_refused,
    };
    uint64_t now = asc_now();
    Frames *f = calloc(1, sizeof *f);
    if (f != NULL)
        f->session = h2_new(d, &calls, &d->listener->limits.h2, now);
    if (f == NULL || f->session == NULL) {
        free(f);
        conn_abort(&d->conn);
        return;
    }
    f->now_ns = f->idle_ns = now;
    d->frames = f;
    tick_soon(d);
    if (d->conn.core->draining)
        frames_draining(d, now);
    frames_touch(d);
}

/* The exchange has ended: its stream ends with it if that has not been said. */
void frames_settled(Downstream *d, Stream *s)
{
    Frames *f = d->frames;
    if (s->h2.prev != NULL)
        s->h2.prev->h2.next = s->h2.next;
    else
        f->streams = s->h2.next;
    if (s->h2.next != NULL)
        s->h2.next->h2.prev = s->h2.prev;
    s->h2.next = s->h2.prev = NULL;
    unblock(s);
    buffer_free(&s->h2.queued);
    s->h2.n_ready = 0;
    if (!s->h2.closed) {
        if (!s->h2.ended)
            h2_reset(f->session, s->h2.id, H2_INTERNAL_ERROR);
        h2_forget(f->session, s->h2.id);
    }
    if (--f->n_streams == 0) {
        f->idle_ns = asc_now();
        if (f->parting)
            part(d, f->idle_ns);
    }
    frames_touch(d);
}

void frames_gone(Downstream *d, const char *outcome)
{
    if (d->frames == NULL)
        return;
    d->frames->over = true;
    Stream *s = d->frames->streams;
    Py_XINCREF(s);
    while (s != NULL) {
        Stream *next = (Stream *)Py_XNewRef(s->h2.next);
        stream_gone(s, outcome);
        Py_DECREF(s);
        s = next;
    }
}

void frames_free(Downstream *d)
{
    Frames *f = d->frames;
    if (f == NULL)
        return;
    if (f->dirty) {
        Downstream **at = &d->conn.core->dirty;
        while (*at != d)
            at = &(*at)->frames->next_dirty;
        *at = f->next_dirty;
    }
    bool referenced = f->dirty;
    for (Stream *s = f->freed, *next; s != NULL; s = next) {
        next = s->h2.next_freed;
        Py_DECREF(s);
    }
    for (Stream *s = f->streams, *next; s != NULL; s = next) { /* the loop ended with exchanges under way */
        next = s->h2.next;
        s->down = NULL;
        Py_DECREF(s);
    }
    d->frames = NULL;
    h2_free(f->session);
    free(f->out);
    free(f);
    if (referenced)
        Py_DECREF(d); /* the caller has one of its own */
}
