/* An exchange leaves for its upstream: the head that is sent, the credential, and the two members of its body that are
 * rewritten in place, model and stream_options. */
#include "py_core.h"

#include "py_secret.h"

#include <openssl/crypto.h>

static void request_fields(Stream *s, asc_writer *w, const asc_names *allowed)
{
    for (uint32_t i = 0; i < s->n_fields; i++) {
        const http1_field *f = &s->fields[i];
        switch (f->id) {
        case HTTP1_HOST: case HTTP1_CONTENT_LENGTH: case HTTP1_TRANSFER_ENCODING: case HTTP1_CONNECTION:
        case HTTP1_EXPECT: case HTTP1_UPGRADE: case HTTP1_AUTHORIZATION: case HTTP1_X_API_KEY: case HTTP1_API_KEY:
        case HTTP1_X_REQUEST_ID: case HTTP1_X_ASCPROXY_MODEL:
            continue; /* never passed, whatever a configuration allows */
        default:
            break;
        }
        if (!names_has(allowed, stream_at(s, f->name), f->name.len))
            continue;
        put(w, stream_at(s, f->name), f->name.len);
        put_literal(w, ": ");
        put(w, stream_at(s, f->value), f->value.len);
        put_literal(w, "\r\n");
    }
    put_literal(w, "x-request-id: ");
    put(w, s->request_id, s->request_id_len);
    put_literal(w, "\r\n");
}

/* A piece of the body that is replaced on the way; nothing is copied but the pieces. */
typedef struct {
    size_t off, len;
    struct iovec with[2];
} edit;

static struct iovec part(const char *bytes, size_t len)
{
    return (struct iovec){(char *)bytes, len};
}

/* Ask for the usage of a stream whose caller did not (SEMANTICS 4). plan->ask is "stream_options":{MEMBERS}, */
static bool ask_usage(const Stream *s, const Plan *plan, edit *e)
{
    static const char member[] = "\"stream_options\":", only[] = "\"include_usage\":true";
    const json_fields *json = &s->json;
    if (plan->ask == NULL || json->stream != 1 || json->include_usage == 1)
        return false;
    const char *ask = PyBytes_AS_STRING(plan->ask);
    size_t len = (size_t)PyBytes_GET_SIZE(plan->ask);
    const char *object = ask + sizeof member - 1;
    size_t object_len = len - sizeof member; /* without the comma */
    const size_t off = (size_t)json->options_off;
    *e = (edit){0};
    if (json->options_raw_len == 0) { /* there is a member, stream, so that the comma is right */
        e->off = (size_t)json->open_off;
        e->with[0] = part(ask, len);
    } else if (json->include_raw_len) {
        e->off = (size_t)json->include_off;
        e->len = (size_t)json->include_raw_len;
        e->with[0] = part("true", 4);
    } else if (s->body[off] == '{') {
        size_t at = off + 1;
        while (at < s->body_len && (s->body[at] == ' ' || s->body[at] == '\t' || s->body[at] == '\r' || s->body[at] == '\n'))
            at++;
        e->off = off + 1;
        e->with[0] = json->continuous_usage < 0 ? part(object + 1, object_len - 2) : part(only, sizeof only - 1);
        e->with[1] = part(",", at < s->body_len && s->body[at] == '}' ? 0 : 1);
    } else { /* null */
        e->off = off;
        e->len = (size_t)json->options_raw_len;
        e->with[0] = part(object, object_len);
    }
    return true;
}

/* What is replaced in the body, in its order. */
static int body_edits(const Stream *s, const Plan *plan, edit edits[2])
{
    int n = 0;
    if (!s->json_done || s->json_error != JSON_OK)
        return 0;
    if (plan->model != NULL && s->json.has_model)
        edits[n++] = (edit){(size_t)s->json.model_off, (size_t)s->json.model_raw_len,
                            {part(PyBytes_AS_STRING(plan->model), (size_t)PyBytes_GET_SIZE(plan->model)), part("", 0)}};
    n += ask_usage(s, plan, &edits[n]);
    if (n == 2 && edits[1].off < edits[0].off) {
        edit first = edits[1];
        edits[1] = edits[0];
        edits[0] = first;
    }
    return n;
}

PyObject *stream_forward(Stream *s, PyObject *const *args, Py_ssize_t n)
{
    if (n != 2 || !Py_IS_TYPE(args[0], &Upstream_Type) || !Py_IS_TYPE(args[1], &Plan_Type)) {
        PyErr_SetString(PyExc_TypeError, "forward(upstream, plan)");
        return NULL;
    }
    Upstream *u = (Upstream *)args[0];
    Plan *plan = (Plan *)args[1];
    if (s->done || s->phase != PHASE_DECIDING || s->finished) {
        PyErr_SetString(PyExc_RuntimeError, "the exchange does not wait for a decision");
        return NULL;
    }
    if (u->state != UP_READY || u->stream != NULL || u->conn.fd < 0) {
        PyErr_SetString(PyExc_RuntimeError, "the upstream connection is not ready");
        return NULL;
    }
    Core *core = s->core;
    uint64_t now = asc_now();
    up_release(s);
    s->up = (Upstream *)Py_NewRef(u);
    Py_XSETREF(s->plan, (Plan *)Py_NewRef(plan));
    s->reused = u->served > 0;
    s->attempts++;
    stream_vouch(s);
    s->failure = "";
    s->upstream_status = 0;
    s->scanner = SCANNER_NONE;
    events_drop(s);
    s->phase = PHASE_WAIT;
    s->t_forward = now;
    u->stream = s;
    u->served++;
    u->reusable = u->head_done = u->surprise = false;
    u->informational = 0;
    core->n_busy++;
    core->n_idle--;
    if (s->attempts == 1)
        meter_gateway(core->page, plan->block, now - s->t_start);

    /* head: the plan's lines, the client's that may pass, framing, and the credential last */
    asc_writer w = {.at = core->heads, .end = core->heads + HEADS_MAX};
    request_fields(s, &w, names_of(plan->request_headers));
    edit edits[2];
    int n_edits = body_edits(s, plan, edits);
    size_t body_len = s->body_len;
    for (int i = 0; i < n_edits; i++)
        body_len = body_len - edits[i].len + edits[i].with[0].iov_len + edits[i].with[1].iov_len;
    if (s->framing != HTTP1_NO_BODY) {
        put_literal(&w, "content-length: ");
        put_u64(&w, body_len);
        put_literal(&w, "\r\n");
    }
    const char *secret = NULL;
    size_t secret_len = 0;
    if (plan->secret != NULL && asc_secret_bytes(plan->secret, &secret, &secret_len))
        put(&w, PyBytes_AS_STRING(plan->secret_prefix), (size_t)PyBytes_GET_SIZE(plan->secret_prefix));
    if (w.full) { /* heads are bounded by limits that fit: this cannot be reached with a valid configuration */
        stream_failed(s, "malformed");
        Py_RETURN_NONE;
    }
    struct iovec iov[11];
    int k = 0;
#define PART(base, bytes) (iov[k].iov_base = (char *)(base), iov[k].iov_len = (bytes), k += iov[k].iov_len != 0)
    PART(PyBytes_AS_STRING(plan->head), (size_t)PyBytes_GET_SIZE(plan->head));
    PART(core->heads, (size_t)(w.at - core->heads));
    PART(secret, secret_len);
    if (secret_len)
        PART("\r\n\r\n", 4);
    else
        PART("\r\n", 2);
    int head_parts = k;
    size_t at = 0;
    for (int i = 0; i < n_edits; i++) {
        const edit *e = &edits[i];
        PART(s->body + at, e->off - at);
        PART(e->with[0].iov_base, e->with[0].iov_len);
        PART(e->with[1].iov_base, e->with[1].iov_len);
        at = e->off + e->len;
    }
    PART(s->body + at, s->body_len - at);
#undef PART
    u->n_rest = 0;
    if (s->body_len <= UP_READ) {
        (void)conn_send(&u->conn, iov, k);
    } else { /* a long body goes piece by piece: what the socket does not take now waits in the stream, not in a copy */
        (void)conn_send(&u->conn, iov, head_parts);
        u->n_rest = k - head_parts;
        memcpy(u->rest, iov + head_parts, (size_t)u->n_rest * sizeof iov[0]);
        up_send_rest(u);
    }
    if (secret_len && u->conn.tls != NULL)
        OPENSSL_cleanse(core->transmit, UP_READ); /* joined there on its way into the record */
    up_deadline(u, s, now, plan->first_byte_ns);
    Py_RETURN_NONE;
}

