/* A client's connection: it turns bytes into exchanges, one at a time and in order.
 *
 * While an exchange is under way the connection keeps reading, so that a FIN is seen at once; what a client sends early
 * waits in `pending` up to PIPELINE_MAX, then reading pauses. A client that leaves meanwhile is told by the event of its
 * socket (EPOLLRDHUP).
 */
#include "py_core.h"

#include "py_certificate.h"
#include "py_tls.h"
#include "tls_context.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>
#include <linux/sockios.h>

static Downstream *downstream_new(Core *core, Listener *listener)
{
    Downstream *d = PyObject_New(Downstream, &Downstream_Type);
    if (d == NULL)
        return NULL;
    memset((char *)d + sizeof(PyObject), 0, sizeof *d - sizeof(PyObject));
    d->conn.core = (Core *)Py_NewRef(core);
    d->conn.fd = d->conn.socket = -1;
    d->conn.timer.owner = d;
    d->listener = (Listener *)Py_NewRef(listener);
    d->trust = listener->trust;
    return d;
}

static void down_dealloc(Downstream *d)
{
    wheel_set(&d->conn.core->wheel, &d->conn.timer, 0);
    if (d->conn.tls != NULL)
        tls_free(d->conn.tls);
    if (d->stream != NULL) { /* the loop ended with an exchange under way */
        d->stream->down = NULL;
        Py_DECREF(d->stream);
    }
    frames_free(d);
    Py_XDECREF(d->listener);
    Py_XDECREF(d->client_cert);
    Py_XDECREF(d->client_line);
    buffer_free(&d->pending);
    buffer_free(&d->conn.out);
    free(d->client);
    Py_DECREF(d->conn.core);
    PyObject_Free(d);
}

/* While draining, an idle connection stays for a while of the drain's own: for one request more, answered with close. */
static void idle_deadline(Downstream *d, uint64_t now)
{
    const Core *core = d->conn.core;
    uint64_t idle = d->listener->limits.idle_timeout;
    if (core->draining && idle > core->drain_idle_ns)
        idle = core->drain_idle_ns;
    conn_deadline(&d->conn, DOWN_IDLE, now + idle);
}

void down_draining(Downstream *d, uint64_t now)
{
    bool linger = d->conn.core->drain_idle_ns > 0;
    if (d->frames != NULL) {
        frames_draining(d, now);
    } else if (d->stream != NULL) {
        /* an answer that has begun may have promised to keep the connection: with time to linger, that is kept */
        d->last = d->last || !linger;
    } else if (d->pending.len != 0 || d->conn.kind == DOWN_LINGER) {
        return; /* a head is under way: its answer will say close, like all while draining */
    } else if (!linger) {
        d->last = true;
        conn_close(&d->conn);
    } else if (d->conn.kind == DOWN_IDLE && d->conn.timer.deadline_ns > now + d->conn.core->drain_idle_ns) {
        idle_deadline(d, now);
    }
}

/* ---- closing ------------------------------------------------------------------------------------------------------ */

/* Close after everything queued has left. A client that may still be sending is drained for a moment, or the reset that
 * follows unread bytes would take our answer away from it. */
void down_close(Downstream *d)
{
    Conn *c = &d->conn;
    if (c->fd < 0)
        return;
    if (!d->linger || d->eof) {
        conn_close(c);
        return;
    }
    if (c->tls != NULL) {
        tls_shutdown(c->tls);
        (void)conn_flush(c);
    }
    if (c->fd < 0)
        return;
    conn_end(c);
    conn_resume_reading(c);
    conn_deadline(c, DOWN_LINGER, asc_now() + LINGER_NS);
}

void down_cut(Downstream *d, bool reset)
{
    if (d->conn.fd >= 0 && reset) {
        struct linger now = {.l_onoff = 1, .l_linger = 0};
        (void)setsockopt(d->conn.fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    }
    conn_abort(&d->conn);
}

/* ---- the next request --------------------------------------------------------------------------------------------- */

static void reject_head(Downstream *d, const char *code, enum asc_limit limit)
{
    Stream *s = stream_new(d, NULL, NULL);
    if (s == NULL) {
        PyErr_Clear();
        down_cut(d, false);
        return;
    }
    d->linger = true;
    if (limit != LIMIT_NONE)
        stream_trip(s, limit);
    stream_reject(s, code);
}

const char *head_reject_code(uint8_t reject)
{
    switch (reject) {
    case HTTP1_LINE_TOO_LONG:
        return "uri_too_long";
    case HTTP1_FIELDS_TOO_LARGE:
        return "headers_too_large";
    case HTTP1_BAD_VERSION:
        return "version_not_supported";
    default:
        return "invalid_request";
    }
}

/* A CA or a revocation list was changed after this client was let in: would it be now? Asked before its next request, so
 * that a reload does not have to look at every connection at once. */
bool down_trusted(Downstream *d)
{
    if (d->trust == d->listener->trust)
        return true;
    if (d->conn.tls != NULL && d->listener->tls != Py_None &&
        !tls_context_trusts(asc_tls_context(d->listener->tls), tls_peer(d->conn.tls), tls_peer_chain(d->conn.tls)))
        return false;
    d->trust = d->listener->trust;
    return true;
}

/* Begin an exchange from the head at bytes[0..len): bytes used, 0 when the head is not complete. */
static size_t down_head(Downstream *d, const char *bytes, size_t len, size_t seen)
{
    Core *core = d->conn.core;
    http1_head *head = &core->head;
    enum http1_result result = http1_parse_request(head, bytes, len, seen, &d->listener->limits.head);
    if (result == HTTP1_PARTIAL)
        return 0;
    if (result == HTTP1_ERROR) {
        reject_head(d, head_reject_code(head->reject), head_limit(head));
        return len; /* nothing after a bad head can be trusted to begin a request */
    }
    Stream *s = stream_new(d, bytes, head);
    if (s == NULL) {
        PyErr_Clear();
        down_cut(d, false);
        return len;
    }
    if (core->overload >= OVERLOAD_REFUSE) { /* before anything is collected */
        d->linger = head->framing == HTTP1_CHUNKED || head->content_length > len - head->head_len;
        stream_trip(s, LIMIT_MEMORY_REFUSE);
        stream_reject(s, "overloaded");
        return len;
    }
    return head->head_len;
}

/* The body of the exchange under way: bytes used. */
static size_t down_body(Downstream *d, char *bytes, size_t len, bool first)
{
    Stream *s = d->stream;
    size_t used = 0;
    bool complete = false;
    if (!stream_take_body(s, bytes, len, &used, &complete)) {
        d->linger = true;
        return len;
    }
    if (complete) {
        stream_request(s);
        return used;
    }
    if (first) { /* the rest will take time: may this caller send it at all? */
        d->linger = true;
        if (!stream_admit_body(s))
            return len;
        if (s->expect_continue && used == 0 && s->body_len == 0) {
            static const char go_on[] = "HTTP/1.1 100 Continue\r\n\r\n";
            struct iovec iov = {.iov_base = (char *)go_on, .iov_len = sizeof go_on - 1};
            (void)conn_send(&d->conn, &iov, 1);
        }
    }
    return used;
}

static void body_deadline(Downstream *d)
{
    conn_deadline(&d->conn, DOWN_BODY, stream_body_deadline(d->stream));
}

/* In plaintext: does the client begin as one that knows that we speak HTTP/2 (RFC 9113 3.3)? */
enum preface { PREFACE_NONE, PREFACE_PARTIAL, PREFACE_WHOLE };

static enum preface down_preface(const Downstream *d, const char *bytes, size_t len)
{
    if (d->requests || !d->listener->http2 || d->conn.tls != NULL)
        return PREFACE_NONE;
    size_t n = len < H2_PREFACE_LEN ? len : H2_PREFACE_LEN;
    if (memcmp(bytes, H2_PREFACE, n) != 0)
        return PREFACE_NONE;
    return n < H2_PREFACE_LEN ? PREFACE_PARTIAL : PREFACE_WHOLE;
}

/* Everything that has come goes to the frames from now on. */
static void down_upgrade(Downstream *d, const char *bytes, size_t len)
{
    asc_buffer early = d->pending;
    d->pending = (asc_buffer){0};
    d->seen = 0;
    frames_open(d);
    if (d->frames != NULL)
        frames_input(d, bytes, len);
    buffer_free(&early);
}

/* Work through bytes as far as requests may begin. New bytes stand in the caller's buffer, or behind what is pending. */
void down_run(Downstream *d, char *bytes, size_t len)
{
    Conn *c = &d->conn;
    if (d->running || (d->pending.len && len)) {
        if (len && !buffer_append(&d->pending, bytes, len, 0)) {
            down_cut(d, false);
            return;
        }
        if (d->running)
            return;
        len = 0;
    }
    bool kept = d->pending.len != 0; /* work on pending, else on the caller's buffer */
    size_t used = 0, seen = d->seen;
    bool partial = false;
    Py_INCREF(d);
    d->running = true;
    for (;;) {
        char *at = kept ? d->pending.bytes + d->pending.off : bytes + used;
        size_t left = kept ? d->pending.len : len - used;
        size_t took;
        if (c->fd < 0)
            break;
        if (d->stream == NULL) {
            if (left == 0 || d->last || c->write_paused)
                break;
            if (!down_trusted(d)) {
                d->last = true;
                break;
            }
            enum preface preface = down_preface(d, at, left);
            if (preface == PREFACE_WHOLE) {
                d->running = false;
                down_upgrade(d, at, left);
                Py_DECREF(d);
                return;
            }
            partial = preface == PREFACE_PARTIAL;
            if (partial)
                break;
            took = down_head(d, at, left, seen);
            seen = 0;
            if (took == 0) {
                partial = true;
                break;
            }
            d->head_ns = 0; /* the next head has a deadline of its own */
            if (d->stream != NULL && d->stream->phase == PHASE_BODY) {
                size_t body = down_body(d, at + took, left - took, true);
                took += body;
            }
        } else if (d->stream->phase == PHASE_BODY) {
            if (left == 0)
                break;
            took = down_body(d, at, left, false);
        } else {
            break;
        }
        if (kept) {
            took = took < d->pending.len ? took : d->pending.len;
            d->pending.off += took;
            d->pending.len -= took;
        } else {
            used += took < left ? took : left;
        }
    }
    d->running = false;
    if (c->fd >= 0) {
        if (!kept && used < len && !d->last && !buffer_append(&d->pending, bytes + used, len - used, 0))
            down_cut(d, false);
        if (d->pending.len == 0 && d->pending.cap > 16384)
            buffer_free(&d->pending);
        d->seen = partial ? d->pending.len : 0;
        Stream *s = d->stream;
        if ((s == NULL && !d->last) || (s != NULL && s->phase == PHASE_BODY))
            conn_resume_reading(c); /* the next bytes are wanted */
        if (s != NULL && s->phase == PHASE_BODY) {
            s->body_last_ns = asc_now();
            body_deadline(d);
        } else if (s != NULL) {
            if (!c->write_paused)
                c->kind = DOWN_NONE;
            if (d->pending.len > PIPELINE_MAX)
                conn_pause_reading(c);
        } else if (d->last) {
            down_close(d);
        } else if (partial) {
            if (d->head_ns == 0)
                d->head_ns = asc_now();
            conn_deadline(c, DOWN_HEADER, d->head_ns + d->listener->limits.header_timeout);
        } else if (!c->write_paused) {
            idle_deadline(d, asc_now());
        }
    }
    Py_DECREF(d);
}

/* The exchange is settled: go on with what waits. */
void down_settled(Downstream *d)
{
    Conn *c = &d->conn;
    if (c->fd < 0 || d->running)
        return; /* down_run goes on by itself */
    if (d->last) {
        down_close(d);
        return;
    }
    down_run(d, NULL, 0);
}

/* ---- deadlines ---------------------------------------------------------------------------------------------------- */

/* A number that changes whenever the client takes something: bytes that wait here plus bytes in the kernel. */
static uint64_t backlog(Downstream *d)
{
    int kernel = 0;
    (void)ioctl(d->conn.fd, SIOCOUTQ, &kernel);
    return d->conn.out.len + (uint64_t)kernel;
}

bool down_stalled(Downstream *d, uint64_t now)
{
    uint64_t mark = backlog(d);
    if (mark != d->stall_mark) {
        d->stall_mark = mark;
        d->stall_ns = now;
    }
    return now >= d->stall_ns + d->listener->limits.write_stall;
}

enum asc_limit down_last(const Downstream *d, uint64_t now)
{
    return d->requests >= d->listener->limits.connection_requests   ? LIMIT_CONNECTION_REQUESTS
           : now - d->opened_ns > d->age_ns                         ? LIMIT_CONNECTION_AGE
           : d->conn.core->overload == OVERLOAD_NO_KEEP_ALIVE       ? LIMIT_MEMORY_KEEP_ALIVE
                                                                    : LIMIT_NONE;
}

static void body_due(Downstream *d, uint64_t now)
{
    Stream *s = d->stream;
    enum asc_limit over = stream_body_due(s, now);
    if (over != LIMIT_NONE) {
        d->linger = true;
        stream_trip(s, over);
        stream_reject(s, "request_timeout");
    } else {
        body_deadline(d);
    }
}

void down_due(Downstream *d, uint64_t now)
{
    Conn *c = &d->conn;
    Py_INCREF(d);
    switch (c->kind) {
    case DOWN_HANDSHAKE:
        page_add(c->core->page, PAGE_CELL_TLS_FAILED, 1);
        core_trip(c->core, LIMIT_TLS_HANDSHAKE);
        conn_abort(c);
        break;
    case DOWN_HEADER:
        d->last = true;
        reject_head(d, "request_timeout", LIMIT_HEADER_TIMEOUT);
        break;
    case DOWN_BODY:
        if (d->stream != NULL && d->stream->phase == PHASE_BODY)
            body_due(d, now);
        break;
    case DOWN_IDLE:
        if (d->stream == NULL) {
            core_trip(c->core, LIMIT_IDLE_TIMEOUT);
            conn_close(c);
        }
        break;
    case DOWN_STALL:
        if (c->write_paused && c->fd >= 0) {
            if (down_stalled(d, now)) {
                if (d->stream != NULL)
                    stream_trip(d->stream, LIMIT_WRITE_STALL);
                else
                    core_trip(c->core, LIMIT_WRITE_STALL);
                down_cut(d, true);
                if (d->stream != NULL)
                    stream_gone(d->stream, "write_stall");
            } else {
                conn_deadline(c, DOWN_STALL, now + PROGRESS_NS);
            }
        }
        break;
    case DOWN_LINGER:
        conn_abort(c);
        break;
    case DOWN_PROXY:
        down_proxy_due(d);
        break;
    case DOWN_FRAMES:
        frames_due(d, now);
        break;
    default:
        break;
    }
    Py_DECREF(d);
}

void down_vanished(Downstream *d)
{
    Py_INCREF(d);
    down_cut(d, false);
    if (d->stream != NULL)
        stream_gone(d->stream, "client_gone");
    Py_DECREF(d);
}

/* ---- coming and going --------------------------------------------------------------------------------------------- */

/* Write the peer down; `address` gets it as 16 bytes, where it has one: a Unix socket has none. Its family. */
static int name_peer(Downstream *d, const struct sockaddr_storage *name, uint8_t address[16])
{
    char host[INET6_ADDRSTRLEN] = "";
    if (name->ss_family == AF_INET) {
        const struct sockaddr_in *v4 = (const struct sockaddr_in *)name;
        memset(address, 0, 10);
        memset(address + 10, 0xff, 2);
        memcpy(address + 12, &v4->sin_addr, 4);
        inet_ntop(AF_INET, &v4->sin_addr, host, sizeof host);
        snprintf(d->peer, sizeof d->peer, "%s:%u", host, ntohs(v4->sin_port));
    } else if (name->ss_family == AF_INET6) {
        const struct sockaddr_in6 *v6 = (const struct sockaddr_in6 *)name;
        memcpy(address, &v6->sin6_addr, 16);
        inet_ntop(AF_INET6, &v6->sin6_addr, host, sizeof host);
        snprintf(d->peer, sizeof d->peer, "[%s]:%u", host, ntohs(v6->sin6_port));
    } else {
        snprintf(d->peer, sizeof d->peer, "unix");
    }
    return name->ss_family;
}

/* Which limit keeps this connection out, LIMIT_NONE when it may stay. */
static enum asc_limit admit(Downstream *d, const struct sockaddr_storage *peer)
{
    Core *core = d->conn.core;
    uint8_t address[16];
    int family = name_peer(d, peer, address);
    bool network = family == AF_INET || family == AF_INET6;
    if (core->n_downs > core->limits.max_connections)
        return LIMIT_MAX_CONNECTIONS;
    d->trusted = network && core_trusts(core, address);
    if (d->listener->proxy_protocol) {
        /* who may open a Unix socket is what the permissions of its folder say */
        if (!d->trusted && family != AF_UNIX)
            return LIMIT_PROXY_UNTRUSTED;
        d->unproxied = true; /* its header says who is counted */
        return LIMIT_NONE;
    }
    return network ? down_count(d, address) : LIMIT_NONE;
}

enum asc_limit down_count(Downstream *d, const uint8_t address[16])
{
    Core *core = d->conn.core;
    for (uint32_t i = 0; i < core->n_exempt; i++)
        if (peers_within(address, core->exempt[i].address, core->exempt[i].bits))
            return LIMIT_NONE;
    const asc_limits *limits = &core->limits;
    switch (peers_enter(core->peers, address, limits->max_connections_per_ip, limits->max_unauthenticated_per_ip, &d->address)) {
    case PEERS_WELCOME:
        return LIMIT_NONE;
    case PEERS_TOO_MANY:
        return LIMIT_MAX_CONNECTIONS_PER_IP;
    case PEERS_TOO_MANY_UNAUTHENTICATED:
        return LIMIT_MAX_UNAUTHENTICATED_PER_IP;
    default:
        return LIMIT_MAX_CONNECTIONS; /* cannot be: the table has room for as many */
    }
}

void down_begin(Downstream *d)
{
    if (d->listener->tls == Py_None) {
        /* the head deadline runs from the first byte; until then the connection is idle */
        idle_deadline(d, asc_now());
        return;
    }
    d->conn.tls = tls_new_server(asc_tls_context(d->listener->tls), &d->conn.core->output);
    if (d->conn.tls == NULL)
        conn_abort(&d->conn);
    else
        conn_deadline(&d->conn, DOWN_HANDSHAKE, d->opened_ns + d->listener->limits.tls_handshake);
}

void down_accept(Core *core, Listener *listener, int fd, const struct sockaddr_storage *peer)
{
    Downstream *d = downstream_new(core, listener);
    if (d == NULL || !conn_open(&d->conn, fd)) {
        PyErr_Clear();
        Py_XDECREF(d);
        (void)close(fd);
        return;
    }
    d->next = core->downs;
    if (core->downs != NULL)
        core->downs->prev = d;
    core->downs = d;
    core->n_downs++;
    page_add(core->page, PAGE_CELL_ACCEPTED, 1);
    enum asc_limit over = admit(d, peer);
    d->opened_ns = asc_now();
    /* +-10 %: connections that were opened together do not all end together */
    uint64_t age = d->listener->limits.connection_age;
    d->age_ns = age ? age - age / 10 + core_random(core) % (age / 5 + 1) : UINT64_MAX / 2;
    /* One that was accepted in the turn in which the drain began is served like the others: it was not refused. */
    if (over != LIMIT_NONE) { /* no answer: who is over a cap gets nothing that costs us something */
        if (over == LIMIT_PROXY_UNTRUSTED)
            down_refuse(d, over, "it is none of trusted_peers");
        else
            down_refuse(d, over, NULL);
    } else if (d->unproxied) {
        /* before TLS the header has the handshake's time, which is absolute; before HTTP that of a head */
        const asc_limits *limits = &d->listener->limits;
        uint64_t most = d->listener->tls != Py_None ? limits->tls_handshake : limits->header_timeout;
        conn_deadline(&d->conn, DOWN_PROXY, d->opened_ns + most);
    } else {
        down_begin(d);
    }
    Py_DECREF(d); /* from here on it is the core's */
}

void down_lost(Downstream *d)
{
    Core *core = d->conn.core;
    if (d->stream != NULL)
        stream_gone(d->stream, "client_gone");
    frames_gone(d, "client_gone");
    if (d->prev != NULL)
        d->prev->next = d->next;
    else
        core->downs = d->next;
    if (d->next != NULL)
        d->next->prev = d->prev;
    core->n_downs--;
    if (d->conn.write_paused)
        core->n_paused--;
    if (d->address != NULL)
        peers_leave(core->peers, d->address);
    d->address = NULL;
    buffer_free(&d->pending);
    frames_free(d);
}

/* The client sends no more. */
void down_end(Downstream *d)
{
    Stream *s = d->stream;
    d->eof = true;
    if (s != NULL && s->phase == PHASE_FLUSH) {
        d->last = true;
        return; /* all of the answer is written: let it drain, then close */
    }
    if (d->conn.write_paused)
        down_cut(d, true); /* a client that left and reads no more would keep what is queued, and all of this, for good */
    else
        conn_close(&d->conn);
    if (s != NULL)
        stream_gone(s, "client_gone");
    frames_gone(d, "client_gone");
}

static void down_plain(Downstream *d, char *bytes, size_t len)
{
    if (d->frames != NULL)
        frames_input(d, bytes, len);
    else
        down_run(d, bytes, len);
}

/* Who the client is by its certificate, if it showed one. */
static bool name_client(Downstream *d)
{
    X509 *certificate = tls_peer(d->conn.tls);
    if (certificate == NULL || asc_client_certificate(certificate, &d->client_cert, &d->client_line))
        return true;
    PyErr_Clear();
    return false;
}

static void down_decrypt(Downstream *d, const char *bytes, size_t len)
{
    Conn *c = &d->conn;
    Core *core = c->core;
    tls_input(c->tls, bytes, len);
    while (c->tls != NULL && c->fd >= 0) {
        int got = tls_read(c->tls, core->plain, DOWN_READ);
        (void)conn_flush(c);
        if (c->kind == DOWN_HANDSHAKE && tls_established(c->tls)) {
            idle_deadline(d, asc_now());
            if (!name_client(d)) {
                down_cut(d, false);
                break;
            }
            if (strcmp(tls_alpn(c->tls), "h2") == 0)
                frames_open(d);
        }
        if (got > 0) {
            bool drained = tls_drained(c->tls);
            if (c->kind != DOWN_LINGER)
                down_plain(d, core->plain, (size_t)got);
            if (drained)
                break; /* asking once more would only be told to wait */
        } else if (got == TLS_WANT) {
            break;
        } else if (got == TLS_CLOSED) {
            down_end(d);
            break;
        } else {
            if (!tls_established(c->tls))
                page_add(core->page, PAGE_CELL_TLS_FAILED, 1);
            /* the alert is on its way: drain before closing, or a reset may overtake it */
            d->linger = d->last = true;
            if (d->stream != NULL)
                stream_gone(d->stream, "client_gone"); /* closes when it settles */
            else
                down_close(d);
            frames_gone(d, "client_gone");
            break;
        }
    }
}

void down_input(Downstream *d, char *bytes, size_t len)
{
    if (d->conn.tls != NULL)
        down_decrypt(d, bytes, len);
    else
        down_plain(d, bytes, len);
}

void down_read(Downstream *d, char *bytes, size_t len)
{
    if (d->conn.kind == DOWN_LINGER)
        return;
    if (d->unproxied)
        down_proxy(d, bytes, len);
    else
        down_input(d, bytes, len);
}

void down_blocked(Downstream *d)
{
    Conn *c = &d->conn;
    c->write_paused = true;
    c->core->n_paused++;
    d->stall_ns = asc_now();
    d->stall_mark = UINT64_MAX;
    if (c->kind != DOWN_LINGER && c->kind != DOWN_HANDSHAKE && c->kind != DOWN_FRAMES)
        conn_deadline(c, DOWN_STALL, d->stall_ns + PROGRESS_NS);
    if (d->stream != NULL && d->stream->up != NULL && d->stream->phase == PHASE_RELAY)
        conn_pause_reading(&d->stream->up->conn);
}

void down_drained(Downstream *d)
{
    Conn *c = &d->conn;
    if (!c->write_paused)
        return;
    c->write_paused = false;
    c->core->n_paused--;
    if (c->kind == DOWN_STALL)
        c->kind = DOWN_NONE;
    Stream *s = d->stream;
    if (s != NULL && s->phase == PHASE_BODY)
        body_deadline(d); /* the rest of a request is waited for as before */
    if (d->frames != NULL)
        frames_touch(d);
    else if (s != NULL && s->phase == PHASE_FLUSH)
        stream_flushed(s);
    else if (s != NULL && s->up != NULL)
        conn_resume_reading(&s->up->conn);
    else if (s == NULL && c->fd >= 0)
        down_settled(d);
}

PyTypeObject Downstream_Type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "ascproxy._native.Downstream",
    .tp_basicsize = sizeof(Downstream),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_doc = "A client's connection.",
    .tp_dealloc = (destructor)down_dealloc,
};
