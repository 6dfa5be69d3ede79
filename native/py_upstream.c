/* A connection to an endpoint, which carries one exchange at a time.
 *
 * Between exchanges it belongs to a pool and goes on reading, so that a server's FIN is seen. After anything unexpected,
 * a byte too many or a head that two parsers could read differently, it is not used again (LIMITS 2).
 */
#include "py_core.h"

#include "py_tls.h"

enum up_deadline_kind { UP_NONE, UP_ANSWER };

static Upstream *upstream_new(Core *core, int endpoint, PyObject *tls, PyObject *server_name, PyObject *ready)
{
    Upstream *u = PyObject_New(Upstream, &Upstream_Type);
    if (u == NULL)
        return NULL;
    memset((char *)u + sizeof(PyObject), 0, sizeof *u - sizeof(PyObject));
    u->conn.core = (Core *)Py_NewRef(core);
    u->conn.fd = u->conn.socket = -1;
    u->conn.timer.owner = u;
    u->endpoint = endpoint;
    u->tls_context = tls == Py_None ? NULL : Py_NewRef(tls);
    u->server_name = Py_NewRef(server_name);
    u->ready_callback = Py_NewRef(ready);
    return u;
}

static void up_dealloc(Upstream *u)
{
    wheel_set(&u->conn.core->wheel, &u->conn.timer, 0);
    if (u->conn.tls != NULL)
        tls_free(u->conn.tls);
    Py_XDECREF(u->ready_callback);
    Py_XDECREF(u->pool);
    Py_XDECREF(u->server_name);
    Py_XDECREF(u->tls_context);
    buffer_free(&u->partial);
    buffer_free(&u->conn.out);
    Py_DECREF(u->conn.core);
    PyObject_Free(u);
}

/* Say once whether this connection can carry requests. */
static void tell_ready(Upstream *u, const char *reason)
{
    PyObject *callback = u->ready_callback;
    if (callback == NULL)
        return;
    u->ready_callback = NULL;
    PyObject *done = PyObject_CallFunction(callback, "Os", (PyObject *)u, reason);
    if (done == NULL)
        PyErr_WriteUnraisable(callback);
    Py_XDECREF(done);
    Py_DECREF(callback);
}

static void up_down(Upstream *u)
{
    if (u->state == UP_READY && u->stream == NULL && u->conn.core->n_idle > 0)
        u->conn.core->n_idle--;
    u->state = UP_CLOSED;
    u->reusable = false;
    u->n_rest = 0;
}

static void up_close(Upstream *u, bool reset)
{
    up_down(u);
    if (reset)
        conn_abort(&u->conn);
    else
        conn_close(&u->conn);
}

/* The exchange no longer needs its upstream. What has not answered completely is cut: the server must stop generating. */
void up_release(Stream *s)
{
    Upstream *u = s->up;
    if (u == NULL || u->stream != s)
        return;
    Core *core = u->conn.core;
    u->stream = NULL;
    u->n_rest = 0;
    core->n_busy--;
    u->conn.kind = UP_NONE;
    if (u->state == UP_READY)
        core->n_idle++;
    if (!u->reusable) {
        up_close(u, true);
    } else {
        u->idle_since_ns = asc_now();
        conn_resume_reading(&u->conn);
    }
}

void up_deadline(Upstream *u, Stream *s, uint64_t now, uint64_t wait_ns)
{
    uint64_t at = wait_ns ? now + wait_ns : UINT64_MAX;
    uint64_t total = s->plan->total_ns;
    if (total && s->t_start + total < at)
        at = s->t_start + total;
    if (at == UINT64_MAX)
        u->conn.kind = UP_NONE;
    else
        conn_deadline(&u->conn, UP_ANSWER, at);
}

void up_due(Upstream *u, uint64_t now)
{
    Stream *s = u->stream;
    if (u->conn.kind != UP_ANSWER || s == NULL)
        return;
    if (s->phase >= PHASE_HOLD) { /* progress only writes a time down: is the deadline still the same? */
        uint64_t idle = s->plan->idle_ns;
        bool over = s->plan->total_ns && now >= s->t_start + s->plan->total_ns;
        bool stalled_client = stream_blocked(s); /* its own deadline runs */
        if (!over && (stalled_client || idle == 0 || now < s->t_last + idle)) {
            up_deadline(u, s, stalled_client ? now : s->t_last, idle);
            return;
        }
    }
    bool total = s->plan->total_ns && now >= s->t_start + s->plan->total_ns;
    stream_trip(s, total ? LIMIT_TOTAL : s->phase >= PHASE_HOLD ? LIMIT_BETWEEN_TOKENS : LIMIT_FIRST_BYTE);
    Py_INCREF(u);
    stream_failed(s, "timeout");
    Py_DECREF(u);
}

/* ---- sending ------------------------------------------------------------------------------------------------------ */

/* The rest of a long request body, as far as the socket takes it. */
void up_send_rest(Upstream *u)
{
    Conn *c = &u->conn;
    while (u->n_rest > 0 && !c->write_paused && c->fd >= 0) {
        struct iovec piece = u->rest[0];
        if (piece.iov_len > 65536)
            piece.iov_len = 65536;
        size_t sent = piece.iov_len;
        if (conn_send(c, &piece, 1) < 0)
            return;
        u->rest[0].iov_base = (char *)u->rest[0].iov_base + sent;
        u->rest[0].iov_len -= sent;
        if (u->rest[0].iov_len == 0) {
            u->n_rest--;
            memmove(u->rest, u->rest + 1, (size_t)u->n_rest * sizeof u->rest[0]);
        }
    }
}

/* ---- receiving ---------------------------------------------------------------------------------------------------- */

static void answer_complete(Upstream *u, Stream *s)
{
    const char *outcome = stream_outcome(s);
    u->reusable = u->keep_alive && !u->surprise && u->n_rest == 0 && !u->conn.write_paused && u->conn.fd >= 0 &&
                  !u->conn.core->draining;
    up_release(s);
    stream_ended(s, outcome);
}

/* Body bytes. `data` has room around it. */
static void up_body(Upstream *u, Stream *s, char *data, size_t len)
{
    Py_INCREF(s);
    bool end = false;
    size_t off = 0, n = len;
    if (u->framing == HTTP1_LENGTH) {
        n = len < u->left ? len : (size_t)u->left;
        u->left -= n;
        end = u->left == 0;
        u->surprise |= n < len;
    } else if (u->framing == HTTP1_CHUNKED) {
        size_t consumed;
        enum chunk_result result = chunk_decode(&u->chunk, data, len, &off, &n, &consumed);
        if (result == CHUNK_BAD) {
            u->surprise = true;
            if (u->chunk.over)
                stream_trip(s, chunk_limit(&u->chunk));
            if (n)
                (void)stream_relay(s, data + off, n, false);
            stream_failed(s, "malformed");
            Py_DECREF(s);
            return;
        }
        end = result == CHUNK_END;
        u->surprise |= end && consumed < len;
    } else if (u->framing == HTTP1_NO_BODY) {
        n = 0;
        end = true;
        u->surprise |= len > 0;
    }
    (void)stream_relay(s, data + off, n, end);
    if (u->stream == s) { /* else sending failed, and the exchange is over */
        if (end)
            answer_complete(u, s);
        else if (stream_blocked(s))
            conn_pause_reading(&u->conn);
    }
    Py_DECREF(s);
}

/* Bytes of an answer; `bytes` has HEADROOM before and TAILROOM behind it. */
static void up_answer(Upstream *u, Stream *s, char *bytes, size_t len)
{
    Core *core = u->conn.core;
    bool kept = false;
    while (!u->head_done) {
        if (!kept && u->partial.len) {
            if (!buffer_append(&u->partial, bytes, len, HEADROOM)) {
                stream_failed(s, "reset");
                return;
            }
            kept = true;
            bytes = u->partial.bytes + u->partial.off;
            len = u->partial.len;
        }
        http1_head *head = &core->head;
        enum http1_result result = http1_parse_response(head, bytes, len, u->seen, s->head_method, &core->limits.head);
        u->seen = 0;
        if (result == HTTP1_PARTIAL) {
            u->seen = len;
            if (kept) { /* what informational heads used up is gone */
                u->partial.off = (size_t)(bytes - u->partial.bytes);
                u->partial.len = len;
            } else if (len && !buffer_append(&u->partial, bytes, len, HEADROOM)) {
                stream_failed(s, "reset");
            }
            return;
        }
        if (result == HTTP1_ERROR || head->status == 101) {
            if (head->over)
                stream_trip(s, head_limit(head));
            stream_failed(s, "malformed");
            return;
        }
        size_t used = head->head_len;
        if (head->status < 200) {
            if (++u->informational > INFORMATIONAL_MAX) {
                stream_failed(s, "malformed");
                return;
            }
            bytes += used;
            len -= used;
            if (kept) {
                u->partial.off += used;
                u->partial.len -= used;
            }
            if (len == 0) {
                buffer_free(&u->partial);
                return;
            }
            continue;
        }
        u->head_done = true;
        u->framing = head->framing;
        u->left = head->content_length;
        u->keep_alive = head->keep_alive && head->framing != HTTP1_TO_CLOSE;
        chunk_init(&u->chunk, &core->limits.chunk);
        stream_answer(s, bytes, head);
        if (u->stream != s || s->phase != PHASE_HOLD) {
            if (u->stream == s)
                up_release(s); /* the walk went another way, perhaps in a task: this answer is not wanted */
            buffer_free(&u->partial);
            return;
        }
        bytes += used;
        len -= used;
    }
    bool ended = u->framing == HTTP1_NO_BODY || (u->framing == HTTP1_LENGTH && u->left == 0);
    if (len || s->head_out || ended)
        up_body(u, s, bytes, len);
    if (kept)
        buffer_free(&u->partial);
    if (u->stream == s)
        up_deadline(u, s, s->t_last, s->plan->idle_ns);
}

static void up_input(Upstream *u, char *bytes, size_t len)
{
    Stream *s = u->stream;
    if (s == NULL) { /* nobody asked: an answer to nothing */
        up_close(u, true);
        return;
    }
    if (u->head_done) {
        up_body(u, s, bytes, len);
        return;
    }
    Py_INCREF(s); /* it may settle, and this connection may carry another one, before we return */
    up_answer(u, s, bytes, len);
    Py_DECREF(s);
}

/* The server closed: the end of an answer that has no other, or a failure. */
static void up_ended(Upstream *u, const char *failure)
{
    Stream *s = u->stream;
    Py_INCREF(u);
    Py_XINCREF(s);
    if (s == NULL) {
        up_down(u);
    } else if (u->head_done && u->framing == HTTP1_TO_CLOSE && strcmp(failure, "closed") == 0) {
        up_down(u);
        char room[HEADROOM + TAILROOM];
        (void)stream_relay(s, room + HEADROOM, 0, true);
        if (u->stream == s)
            answer_complete(u, s);
    } else {
        bool answered = u->head_done || u->partial.len > 0;
        up_down(u);
        stream_failed(s, answered ? (u->head_done ? "truncated" : "reset") : "closed");
    }
    Py_XDECREF(s);
    Py_DECREF(u);
}

static void up_decrypt(Upstream *u, const char *bytes, size_t len)
{
    Conn *c = &u->conn;
    Core *core = c->core;
    tls_input(c->tls, bytes, len);
    while (c->tls != NULL && c->fd >= 0) {
        int got = tls_read(c->tls, core->up_bytes, UP_READ);
        (void)conn_flush(c);
        if (u->state == UP_HANDSHAKE && tls_established(c->tls)) {
            u->state = UP_READY;
            core->n_idle++;
            tell_ready(u, "");
        }
        if (got > 0) {
            bool drained = tls_drained(c->tls);
            up_input(u, core->up_bytes, (size_t)got);
            if (drained)
                return;
        } else if (got == TLS_WANT) {
            return;
        } else {
            if (u->state == UP_HANDSHAKE) {
                const char *why = tls_error(c->tls);
                u->state = UP_CLOSED;
                tell_ready(u, why[0] ? why : "the TLS handshake failed");
                conn_close(c);
            } else {
                up_ended(u, got == TLS_CLOSED ? "closed" : "reset");
                conn_close(c);
            }
            return;
        }
    }
}

/* ---- coming and going --------------------------------------------------------------------------------------------- */

PyObject *up_open(Core *core, int fd, int endpoint, PyObject *tls, PyObject *server_name, PyObject *ready)
{
    Upstream *u = upstream_new(core, endpoint, tls, server_name, ready);
    if (u == NULL || !conn_open(&u->conn, fd)) {
        Py_XDECREF(u);
        return NULL;
    }
    page_add(core->page, PAGE_CELL_UPSTREAM_OPENED, 1);
    u->idle_since_ns = asc_now();
    if (u->tls_context == NULL) {
        u->state = UP_READY;
        core->n_idle++;
        tell_ready(u, "");
        return (PyObject *)u;
    }
    u->state = UP_HANDSHAKE;
    const char *name = PyUnicode_AsUTF8(u->server_name);
    if (name != NULL)
        u->conn.tls = tls_new_client(asc_tls_context(u->tls_context), &core->output, name);
    else
        PyErr_Clear();
    if (u->conn.tls == NULL) {
        tell_ready(u, "out of memory, or a server name that TLS cannot verify");
        conn_abort(&u->conn);
        return (PyObject *)u;
    }
    int result = tls_handshake(u->conn.tls);
    (void)conn_flush(&u->conn);
    if (result == TLS_FAILED) {
        tell_ready(u, tls_error(u->conn.tls));
        conn_abort(&u->conn);
    }
    return (PyObject *)u;
}

void up_lost(Upstream *u)
{
    tell_ready(u, "the server closed the connection");
    if (u->state != UP_CLOSED || u->stream != NULL)
        up_ended(u, u->conn.broken ? "reset" : "closed");
    buffer_free(&u->partial);
}

void up_read(Upstream *u, char *bytes, size_t len)
{
    Py_INCREF(u); /* its pool may close and forget it */
    if (u->conn.tls != NULL)
        up_decrypt(u, bytes, len);
    else
        up_input(u, bytes, len);
    Py_DECREF(u);
}

void up_end(Upstream *u)
{
    /* With TLS, an end without close_notify is an attacker's to make: a body that only ends with it is cut short. */
    tell_ready(u, "the server closed the connection");
    up_ended(u, u->conn.tls != NULL ? "reset" : "closed");
    conn_close(&u->conn);
}

void up_drained(Upstream *u)
{
    u->conn.write_paused = false;
    up_send_rest(u);
}

/* ---- what Python sees --------------------------------------------------------------------------------------------- */

static PyObject *up_usable(Upstream *u, PyObject *const *args, Py_ssize_t n)
{
    if (n != 2) {
        PyErr_SetString(PyExc_TypeError, "usable(now_ns, idle_ms)");
        return NULL;
    }
    unsigned long long now = PyLong_AsUnsignedLongLong(args[0]), idle = PyLong_AsUnsignedLongLong(args[1]);
    if (PyErr_Occurred())
        return NULL;
    return PyBool_FromLong(u->state == UP_READY && u->stream == NULL && u->conn.fd >= 0 && !u->conn.write_paused &&
                           now < u->idle_since_ns + idle * MS);
}

static PyObject *up_close_method(Upstream *u, PyObject *unused)
{
    (void)unused;
    if (u->stream != NULL) {
        PyErr_SetString(PyExc_RuntimeError, "an exchange uses this connection: abort the exchange");
        return NULL;
    }
    up_close(u, u->state == UP_HANDSHAKE);
    Py_RETURN_NONE;
}

static PyObject *up_get_ready(Upstream *u, void *unused)
{
    (void)unused;
    return PyBool_FromLong(u->state == UP_READY && u->stream == NULL && u->conn.fd >= 0);
}

static PyObject *up_get_reusable(Upstream *u, void *unused)
{
    (void)unused;
    return PyBool_FromLong(u->reusable && u->state == UP_READY && u->stream == NULL && u->conn.fd >= 0);
}

#include <structmember.h>

static PyMemberDef up_members[] = {
    {"endpoint", T_INT, offsetof(Upstream, endpoint), READONLY, NULL},
    {"served", T_UINT, offsetof(Upstream, served), READONLY, NULL},
    {"idle_since_ns", T_ULONGLONG, offsetof(Upstream, idle_since_ns), READONLY, NULL},
    {"pool", T_OBJECT, offsetof(Upstream, pool), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef up_getset[] = {
    {"ready", (getter)up_get_ready, NULL, NULL, NULL},
    {"reusable", (getter)up_get_reusable, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMethodDef up_methods[] = {
    {"usable", (PyCFunction)(void (*)(void))up_usable, METH_FASTCALL, NULL},
    {"close", (PyCFunction)up_close_method, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

PyTypeObject Upstream_Type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "ascproxy._native.Upstream",
    .tp_basicsize = sizeof(Upstream),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_doc = "A connection to an endpoint.",
    .tp_dealloc = (destructor)up_dealloc,
    .tp_methods = up_methods,
    .tp_members = up_members,
    .tp_getset = up_getset,
};
