/* An exchange leaves for its upstream: the head that is sent, the model that replaces the caller's, the credential. */
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
    const char *model = NULL;
    size_t model_len = 0, raw_off = 0, raw_len = 0;
    if (plan->model != NULL && s->json_done && s->json_error == JSON_OK && s->json.has_model) {
        model = PyBytes_AS_STRING(plan->model);
        model_len = (size_t)PyBytes_GET_SIZE(plan->model);
        raw_off = (size_t)s->json.model_off;
        raw_len = (size_t)s->json.model_raw_len;
    }
    if (s->framing != HTTP1_NO_BODY) {
        put_literal(&w, "content-length: ");
        put_u64(&w, s->body_len - raw_len + model_len);
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
    struct iovec iov[7];
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
    if (model != NULL) {
        PART(s->body, raw_off);
        PART(model, model_len);
        PART(s->body + raw_off + raw_len, s->body_len - raw_off - raw_len);
    } else {
        PART(s->body, s->body_len);
    }
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

