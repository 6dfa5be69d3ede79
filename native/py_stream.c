/* One exchange: a request, the walk's decision, and the answer on its way back.
 *
 *   BODY -> DECIDING -> WAIT -> RELAY -> FLUSH -> DONE        (a failure before the answer goes back to DECIDING)
 *             +---------- respond --------^
 *
 * The walk is called at the arrows, never per chunk. `respond` and `forward` may be called while the walk is on the
 * stack or later from its task; settling waits until the walk has returned, so that on_settle is always the last call.
 */
#include "py_core.h"

#include "py_secret.h"

#include <openssl/crypto.h>
#include <strings.h>

/* ---- the request -------------------------------------------------------------------------------------------------- */

static const char *at(const Stream *s, asc_span span)
{
    return s->head + span.off;
}

static asc_span field_value(const Stream *s, enum http1_name name)
{
    asc_span none = {0, 0};
    return s->first[name] ? s->fields[s->first[name] - 1].value : none;
}

/* Authorization: Bearer, or x-api-key (SEMANTICS 5). Two that differ are refused by the walk, one way or the other. */
static void find_credential(Stream *s)
{
    for (uint32_t i = 0; i < s->n_fields; i++) {
        const http1_field *f = &s->fields[i];
        asc_span value = f->value;
        if (f->id == HTTP1_AUTHORIZATION) {
            if (value.len < 7 || strncasecmp(at(s, value), "Bearer ", 7) != 0) {
                s->two_credentials |= s->credential.len != 0;
                continue;
            }
            value.off += 7;
            value.len -= 7;
            while (value.len && *at(s, value) == ' ') {
                value.off++;
                value.len--;
            }
        } else if (f->id != HTTP1_X_API_KEY) {
            continue;
        }
        if (value.len == 0)
            continue;
        if (s->credential.len == 0)
            s->credential = value;
        else if (s->credential.len != value.len || memcmp(at(s, s->credential), at(s, value), value.len) != 0)
            s->two_credentials = true;
    }
    if (s->first[HTTP1_AUTHORIZATION]) /* repeated Authorization fields are two credentials even when equal */
        for (uint32_t i = s->first[HTTP1_AUTHORIZATION]; i < s->n_fields; i++)
            s->two_credentials |= s->fields[i].id == HTTP1_AUTHORIZATION;
}

static void name_request(Stream *s)
{
    asc_span given = field_value(s, HTTP1_X_REQUEST_ID);
    if (given.len >= 1 && given.len <= sizeof s->request_id) {
        const char *bytes = at(s, given);
        uint32_t i = 0;
        while (i < given.len && (Py_ISALNUM(Py_CHARMASK(bytes[i])) || strchr("._-", bytes[i]) != NULL) && bytes[i])
            i++;
        if (i == given.len) {
            memcpy(s->request_id, bytes, given.len);
            s->request_id_len = (uint8_t)given.len;
            return;
        }
    }
    static const char hex[] = "0123456789abcdef";
    for (unsigned word = 0; word < 2; word++) {
        uint64_t random = core_random(s->core);
        for (unsigned i = 0; i < 16; i++)
            s->request_id[word * 16 + i] = hex[(random >> (60 - 4 * i)) & 15];
    }
    s->request_id_len = 32;
}

/* An exchange on `d` from a parsed head, whose bytes and fields are copied. Without a head: only to be refused. */
Stream *stream_new(Downstream *d, const char *bytes, const http1_head *head)
{
    Core *core = d->conn.core;
    Stream *s = core_take_stream(core);
    if (s == NULL)
        return NULL;
    memset((char *)s + sizeof(PyObject), 0, offsetof(Stream, watch) - sizeof(PyObject));
    memset((char *)s + offsetof(Stream, reject), 0, sizeof *s - offsetof(Stream, reject));
    s->core = (Core *)Py_NewRef(core);
    s->listener = (Listener *)Py_NewRef(d->listener);
    s->usage_in = s->usage_out = -1;
    s->t_start = asc_now();
    s->phase = PHASE_DECIDING;
    s->body_limit = d->listener->limits.max_body;
    s->outcome = "";
    s->reject = s->failure = "";
    if (head != NULL) {
        size_t table = head->n_fields * sizeof(http1_field);
        s->fields = malloc(table + head->head_len);
        if (s->fields == NULL) {
            Py_DECREF(s);
            PyErr_NoMemory();
            return NULL;
        }
        s->head = (char *)s->fields + table;
        memcpy(s->fields, head->fields, table);
        memcpy(s->head, bytes, head->head_len);
        memcpy(s->first, head->first, sizeof s->first);
        s->n_fields = head->n_fields;
        s->head_len = head->head_len;
        s->method = head->method;
        s->path = head->path;
        s->query = head->query;
        s->minor = head->minor;
        s->framing = head->framing;
        s->content_length = s->body_left = head->content_length;
        s->parsed = true;
        s->head_method = head->method.len == 4 && memcmp(s->head + head->method.off, "HEAD", 4) == 0;
        s->expect_continue = head->expect_continue && head->minor == 1;
        s->bytes_in = head->head_len;
        find_credential(s);
        s->phase = PHASE_BODY;
        chunk_init(&s->chunk);
        /* an HTTP/1.0 client gets one answer a connection: nothing is saved by keeping those alive */
        d->last = d->last || !head->keep_alive || head->minor == 0;
    } else {
        d->last = true;
        s->minor = 1;
    }
    name_request(s);
    s->body_started_ns = s->body_rate_ns = s->body_last_ns = s->t_start;
    d->requests++;
    if (core->draining || d->requests >= d->listener->limits.connection_requests || s->t_start - d->opened_ns > d->age_ns)
        d->last = true;
    s->down = d;
    d->stream = s; /* owned by the connection until settled */
    core->n_in_flight++;
    return s;
}

static void drop_body(Stream *s)
{
    Core *core = s->core;
    if (s->body != NULL) {
        core->body_bytes -= s->body_cap;
        if (s->body_cap == SPARE_BODY && core->n_spare_bodies < KEPT)
            core->spare_bodies[core->n_spare_bodies++] = s->body;
        else
            free(s->body);
        s->body = NULL;
        s->body_cap = 0;
    }
    if (s->scan != NULL) {
        core_put_scan(core, s->scan);
        s->scan = NULL;
    }
}

static void stream_dealloc(Stream *s)
{
    drop_body(s);
    if (s->up != NULL && s->up->stream == s)
        s->up->stream = NULL;
    Py_XDECREF(s->up);
    Py_XDECREF(s->plan);
    Py_XDECREF(s->principal);
    Py_XDECREF(s->context);
    Py_XDECREF(s->log);
    Py_XDECREF(s->code);
    Py_XDECREF(s->task);
    Py_XDECREF(s->listener);
    free(s->fields);
    Core *core = s->core;
    core_put_stream(core, s);
    Py_DECREF(core);
}

/* Room for `more` bytes of body: the smallest block that fits for a short one, doubled later, so that a caller pays for a
 * long body with bytes sent and not with a header. */
static bool body_room(Stream *s, size_t more)
{
    size_t need = s->body_len + more;
    if (need <= s->body_cap)
        return true;
    size_t cap = need <= SPARE_BODY ? SPARE_BODY : need;
    if (s->body_cap)
        cap = need > s->body_cap * 2 ? need : s->body_cap * 2;
    if (s->framing == HTTP1_LENGTH && s->content_length >= need && s->content_length < cap && cap > SPARE_BODY)
        cap = (size_t)s->content_length;
    if (s->core->body_bytes + (cap - s->body_cap) > s->core->limits.max_bodies)
        return false;
    bool spare = s->body == NULL && cap == SPARE_BODY && s->core->n_spare_bodies;
    char *grown = spare ? s->core->spare_bodies[--s->core->n_spare_bodies] : realloc(s->body, cap);
    if (grown == NULL)
        return false;
    s->core->body_bytes += cap - s->body_cap;
    s->body = grown;
    s->body_cap = cap;
    return true;
}

static bool keep_body(Stream *s, const char *bytes, size_t len)
{
    if (len > s->body_limit || s->body_len > s->body_limit - len) {
        stream_reject(s, "body_too_large");
        return false;
    }
    if (!body_room(s, len)) {
        stream_reject(s, "overloaded");
        return false;
    }
    memcpy(s->body + s->body_len, bytes, len);
    s->body_len += len;
    if (s->scan == NULL) {
        s->scan = core_take_scan(s->core);
        if (s->scan == NULL) {
            stream_reject(s, "overloaded");
            return false;
        }
        json_request_start(s->scan, &s->listener->limits.json, core_random(s->core));
    }
    if (s->json_error == JSON_OK)
        s->json_error = json_request_feed(s->scan, bytes, len);
    return true;
}

static void scan_ended(Stream *s)
{
    if (s->scan == NULL)
        return;
    if (s->json_error == JSON_OK)
        s->json_error = json_request_end(s->scan);
    if (s->json_error == JSON_OK)
        s->json = *json_request_fields(s->scan);
    s->json_done = true;
    core_put_scan(s->core, s->scan);
    s->scan = NULL;
}

/* Collect request body from bytes[0..len). False: the request was refused. */
bool stream_take_body(Stream *s, char *bytes, size_t len, size_t *used, bool *complete)
{
    *used = 0;
    *complete = false;
    if (s->framing == HTTP1_LENGTH) {
        size_t take = len < s->body_left ? len : (size_t)s->body_left;
        if (take && !keep_body(s, bytes, take))
            return false;
        s->body_left -= take;
        *used = take;
        *complete = s->body_left == 0;
    } else if (s->framing == HTTP1_CHUNKED) {
        size_t off, data, consumed;
        enum chunk_result result = chunk_decode(&s->chunk, bytes, len, &off, &data, &consumed);
        if (result == CHUNK_BAD) {
            stream_reject(s, "invalid_request");
            return false;
        }
        if (data && !keep_body(s, bytes + off, data))
            return false;
        *used = consumed;
        *complete = result == CHUNK_END;
    } else {
        *complete = true;
    }
    s->bytes_in += *used;
    return true;
}

/* The request is complete: the walk decides. */
void stream_request(Stream *s)
{
    scan_ended(s);
    s->phase = PHASE_DECIDING;
    s->down->linger = false; /* all that it announced has come */
    stream_walk(s, s->core->on_request);
}

/* ---- the walk ----------------------------------------------------------------------------------------------------- */

static void settle(Stream *s);

static void internal_error(Stream *s)
{
    if (s->phase == PHASE_DONE)
        return;
    if (s->phase > PHASE_DECIDING || s->reject[0] != '\0') { /* too late for an answer, or refusing failed as well */
        stream_gone(s, "internal_error");
        return;
    }
    stream_reject(s, "internal_error");
}

void stream_walk(Stream *s, PyObject *method)
{
    Py_INCREF(s);
    s->core->calls++;
    s->in_walk++;
    PyObject *done = PyObject_CallOneArg(method, (PyObject *)s);
    s->in_walk--;
    bool raised = done == NULL;
    if (raised)
        PyErr_WriteUnraisable(method);
    Py_XDECREF(done);
    bool undecided = s->phase == PHASE_DECIDING && s->task == NULL && method != s->core->on_settle;
    if ((raised && !s->finished && s->phase <= PHASE_DECIDING && method != s->core->on_settle) || undecided)
        internal_error(s);
    else if (s->finished && s->in_walk == 0 && s->phase == PHASE_FLUSH)
        stream_flushed(s);
    Py_DECREF(s);
}

/* The core cannot serve this request: the walk finds the words. */
void stream_reject(Stream *s, const char *code)
{
    s->reject = code;
    if (s->down != NULL)
        s->down->last = true;
    if (s->phase == PHASE_BODY)
        s->phase = PHASE_DECIDING;
    stream_walk(s, s->core->on_reject);
}

/* ---- forwarding --------------------------------------------------------------------------------------------------- */

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
        if (!names_has(allowed, at(s, f->name), f->name.len))
            continue;
        put(w, at(s, f->name), f->name.len);
        put_literal(w, ": ");
        put(w, at(s, f->value), f->value.len);
        put_literal(w, "\r\n");
    }
    put_literal(w, "x-request-id: ");
    put(w, s->request_id, s->request_id_len);
    put_literal(w, "\r\n");
}

static PyObject *stream_forward(Stream *s, PyObject *const *args, Py_ssize_t n)
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

/* The upstream let us down (its connection is closed or closing). Before the answer began the walk may choose another;
 * after it the client must see that the answer is not whole. */
void stream_failed(Stream *s, const char *failure)
{
    Py_INCREF(s);
    if (s->up != NULL) {
        s->up->reusable = false;
        up_release(s);
    }
    if (s->phase == PHASE_WAIT) {
        s->failure = failure;
        s->phase = PHASE_DECIDING;
        Py_CLEAR(s->task); /* of an earlier attempt */
        stream_walk(s, s->core->on_response);
    } else if (s->phase == PHASE_RELAY) {
        bool timeout = strcmp(failure, "timeout") == 0;
        /* chunked without its last chunk is a visible end; one that ends with the connection needs a reset */
        down_cut(s->down, s->to_close_out);
        stream_gone(s, timeout ? "upstream_timeout" : "truncated");
    }
    Py_DECREF(s);
}

/* ---- the answer --------------------------------------------------------------------------------------------------- */

static const char *reason_phrase(unsigned status)
{
    switch (status) {
    case 200: return "OK";
    case 201: return "Created";
    case 202: return "Accepted";
    case 204: return "No Content";
    case 304: return "Not Modified";
    case 400: return "Bad Request";
    case 401: return "Unauthorized";
    case 403: return "Forbidden";
    case 404: return "Not Found";
    case 405: return "Method Not Allowed";
    case 408: return "Request Timeout";
    case 409: return "Conflict";
    case 413: return "Content Too Large";
    case 414: return "URI Too Long";
    case 415: return "Unsupported Media Type";
    case 422: return "Unprocessable Content";
    case 424: return "Failed Dependency";
    case 429: return "Too Many Requests";
    case 431: return "Request Header Fields Too Large";
    case 500: return "Internal Server Error";
    case 501: return "Not Implemented";
    case 502: return "Bad Gateway";
    case 503: return "Service Unavailable";
    case 504: return "Gateway Timeout";
    case 505: return "HTTP Version Not Supported";
    default: return ""; /* RFC 9112 4: the phrase may be empty, and the upstream's is not ours to pass on */
    }
}

static void status_line(Stream *s, asc_writer *w, unsigned status)
{
    const char *reason = reason_phrase(status);
    put_literal(w, "HTTP/1.1 ");
    put_u64(w, status);
    put_literal(w, " ");
    put(w, reason, strlen(reason));
    put_literal(w, "\r\ndate: ");
    const char *date = core_date(s->core, NULL, NULL);
    put(w, date, strlen(date));
    put_literal(w, "\r\nx-request-id: ");
    put(w, s->request_id, s->request_id_len);
    put_literal(w, "\r\n");
}

static bool starts_with(const char *bytes, size_t len, const char *prefix)
{
    size_t n = strlen(prefix);
    return len >= n && strncasecmp(bytes, prefix, n) == 0;
}

static int64_t number_of(const char *bytes, size_t len)
{
    int64_t n = 0;
    if (len == 0 || len > 15)
        return -1;
    for (size_t i = 0; i < len; i++) {
        if (!Py_ISDIGIT(Py_CHARMASK(bytes[i])))
            return -1;
        n = n * 10 + (bytes[i] - '0');
    }
    return n;
}

static void start_watch(Stream *s, const char *bytes, const http1_head *head)
{
    asc_span type = http1_value(head, HTTP1_CONTENT_TYPE);
    s->scanner = SCANNER_NONE;
    if (s->plan->scan == JSON_NONE)
        return;
    if (starts_with(bytes + type.off, type.len, "text/event-stream")) {
        sse_init(&s->watch.sse, s->plan->scan);
        s->scanner = SCANNER_SSE;
    } else if (starts_with(bytes + type.off, type.len, "application/json")) {
        json_answer_start(&s->watch.json, s->plan->scan);
        s->scanner = SCANNER_JSON;
    }
    if (s->plan->scan == JSON_TGI) { /* TGI counts in header fields */
        for (uint32_t i = 0; i < head->n_fields; i++) {
            const http1_field *f = &head->fields[i];
            const char *name = bytes + f->name.off, *value = bytes + f->value.off;
            if (http1_name_is(name, f->name.len, "x-prompt-tokens", 15))
                s->usage_in = number_of(value, f->value.len);
            else if (http1_name_is(name, f->name.len, "x-generated-tokens", 18))
                s->usage_out = number_of(value, f->value.len);
        }
    }
}

/* Write the head of the upstream's answer into core->heads; its length, or 0 when it does not fit. */
static size_t answer_head(Stream *s, const char *bytes, const http1_head *head)
{
    Core *core = s->core;
    const asc_names *allowed = names_of(s->plan->response_headers);
    asc_writer w = {.at = core->heads, .end = core->heads + HEADS_MAX};
    status_line(s, &w, head->status);
    for (uint32_t i = 0; i < head->n_fields; i++) {
        const http1_field *f = &head->fields[i];
        switch (f->id) {
        case HTTP1_CONTENT_LENGTH: case HTTP1_TRANSFER_ENCODING: case HTTP1_CONNECTION: case HTTP1_UPGRADE:
        case HTTP1_DATE: case HTTP1_X_REQUEST_ID: case HTTP1_AUTHORIZATION: case HTTP1_X_API_KEY: case HTTP1_API_KEY:
            continue;
        default:
            break;
        }
        if (!names_has(allowed, bytes + f->name.off, f->name.len))
            continue;
        put(&w, bytes + f->name.off, f->name.len);
        put_literal(&w, ": ");
        put(&w, bytes + f->value.off, f->value.len);
        put_literal(&w, "\r\n");
    }
    s->chunked_out = s->to_close_out = false;
    if (head->framing == HTTP1_LENGTH || (head->framing == HTTP1_NO_BODY && s->head_method &&
                                          head->count[HTTP1_CONTENT_LENGTH])) {
        put_literal(&w, "content-length: ");
        put_u64(&w, head->content_length);
        put_literal(&w, "\r\n");
    } else if (head->framing != HTTP1_NO_BODY) {
        if (s->minor == 1) {
            s->chunked_out = true;
            put_literal(&w, "transfer-encoding: chunked\r\n");
        } else {
            s->to_close_out = true;
            s->down->last = true;
        }
    }
    if (s->down->last)
        put_literal(&w, "connection: close\r\n");
    put_literal(&w, "\r\n");
    return w.full ? 0 : (size_t)(w.at - core->heads);
}

/* The upstream's answer begins (bytes hold its head). Some the walk must judge first; the caller looks at the phase to
 * see whether the body is to be relayed (RELAY) or not. */
void stream_answer(Stream *s, const char *bytes, http1_head *head)
{
    s->upstream_status = head->status;
    s->held_head = head;
    s->held_bytes = bytes;
    if (head->status == 401 || head->status == 403 || head->status == 429 || head->status >= 500) {
        s->phase = PHASE_DECIDING;
        s->held = true;
        s->failure = "";
        Py_CLEAR(s->task);
        stream_walk(s, s->core->on_response);
        s->held = false;
    } else {
        s->phase = PHASE_RELAY;
    }
    s->held_head = NULL;
    s->held_bytes = NULL;
    if (s->phase == PHASE_RELAY) {
        s->status = head->status;
        s->t_first = s->t_last = asc_now();
        start_watch(s, bytes, head);
        s->head_out = answer_head(s, bytes, head);
        if (s->head_out == 0) { /* cannot be: both heads are bounded below HEADS_MAX */
            down_cut(s->down, true);
            stream_gone(s, "upstream_failed");
        }
    }
}

static void watch(Stream *s, const char *data, size_t len, uint64_t now)
{
    Plan *plan = s->plan;
    if (s->scanner == SCANNER_SSE) {
        sse_scanner *sse = &s->watch.sse;
        bool had_content = sse->content;
        unsigned events = sse_feed(sse, data, len);
        if (!had_content && sse->content)
            meter_latency(s->core->page, plan->block, METER_FIRST_TOKEN, now - s->t_start);
        else if (events && had_content)
            meter_latency(s->core->page, plan->block, METER_BETWEEN_TOKENS, now - s->t_last);
        if (sse->progress)
            s->t_last = now;
    } else {
        if (s->scanner == SCANNER_JSON)
            (void)json_answer_feed(&s->watch.json, data, len);
        s->t_last = now;
    }
}

/* Pass data on to the client, behind the head that stream_answer has just left in core->heads, if it did. `data` has
 * HEADROOM before and TAILROOM behind it, both free to be written. With `end`, the answer is complete. */
int stream_relay(Stream *s, char *data, size_t len, bool end)
{
    struct iovec iov[2];
    int k = 0;
    if (len)
        watch(s, data, len, asc_now());
    if (s->head_out) {
        iov[k].iov_base = s->core->heads;
        iov[k++].iov_len = s->head_out;
    }
    s->bytes_out += s->head_out + len;
    s->head_out = 0;
    char *from = data;
    if (s->chunked_out) {
        if (len) {
            from = chunk_size_before(data, len);
            memcpy(data + len, "\r\n", 2);
            len += 2;
        }
        if (end) {
            memcpy(data + len, "0\r\n\r\n", 5);
            len += 5;
        }
        len += (size_t)(data - from);
    }
    if (len) {
        iov[k].iov_base = from;
        iov[k++].iov_len = len;
    }
    if (k == 0)
        return 0;
    s->committed = true;
    return conn_send(&s->down->conn, iov, k);
}

/* All of the answer is written: settle now, or when the client has taken it. */
void stream_ended(Stream *s, const char *outcome)
{
    s->outcome = outcome;
    s->phase = PHASE_FLUSH;
    s->finished = true;
    if (s->in_walk == 0)
        stream_flushed(s);
}

void stream_flushed(Stream *s)
{
    if (s->phase == PHASE_FLUSH && (s->down == NULL || !s->down->conn.write_paused || s->down->conn.fd < 0))
        settle(s);
}

/* The client is not there any more, or is given up: nobody waits for the upstream (SEMANTICS 4). */
void stream_gone(Stream *s, const char *outcome)
{
    if (s->phase == PHASE_DONE)
        return;
    Py_INCREF(s);
    bool flushing = s->phase == PHASE_FLUSH;
    if (s->down != NULL)
        s->down->last = true;
    if (!flushing || strcmp(outcome, "client_gone") != 0)
        s->outcome = outcome;
    if (!s->committed)
        s->status = 499;
    s->done = true;
    if (s->up != NULL && !flushing) {
        s->up->reusable = false;
        up_release(s);
    }
    if (s->task != NULL) {
        PyObject *cancelled = PyObject_CallMethod(s->task, "cancel", NULL);
        if (cancelled == NULL)
            PyErr_WriteUnraisable(s->task);
        Py_XDECREF(cancelled);
    }
    s->phase = PHASE_FLUSH;
    s->finished = true;
    if (s->in_walk == 0)
        settle(s);
    Py_DECREF(s);
}

static void read_watch(Stream *s)
{
    if (s->scanner == SCANNER_SSE) {
        if (s->watch.sse.usage_in >= 0)
            s->usage_in = s->watch.sse.usage_in;
        if (s->watch.sse.usage_out >= 0)
            s->usage_out = s->watch.sse.usage_out;
        s->finish = s->watch.sse.finish;
    } else if (s->scanner == SCANNER_JSON) {
        const json_facts *facts = json_answer_facts(&s->watch.json);
        if (facts->usage_in >= 0)
            s->usage_in = facts->usage_in;
        if (facts->usage_out >= 0)
            s->usage_out = facts->usage_out;
        s->finish = facts->finish;
    }
}

static void settle(Stream *s)
{
    if (s->phase == PHASE_DONE)
        return;
    Core *core = s->core;
    Downstream *d = s->down;
    uint64_t now = asc_now();
    s->phase = PHASE_DONE;
    s->done = true;
    read_watch(s);
    drop_body(s);
    if (s->plan != NULL) {
        uint32_t block = s->plan->block;
        meter_status(core->page, block, s->status);
        meter_latency(core->page, block, METER_REQUEST, now - s->t_start);
        if (s->usage_in > 0 && block)
            page_add(core->page, block + METER_TOKENS_IN, (uint64_t)s->usage_in);
        if (s->usage_out > 0 && block)
            page_add(core->page, block + METER_TOKENS_OUT, (uint64_t)s->usage_out);
    }
    if (core->access_log)
        access_line(s, now);
    stream_walk(s, core->on_settle);
    Py_CLEAR(s->task);
    Py_CLEAR(s->context);
    up_release(s);
    Py_CLEAR(s->up);
    s->down = NULL;
    core->n_in_flight--;
    if (d != NULL && d->stream == s) {
        d->stream = NULL;
        if (d->conn.transport != NULL)
            down_settled(d);
        Py_DECREF(s); /* the connection's reference */
    }
}

/* ---- what Python sees --------------------------------------------------------------------------------------------- */

static PyObject *stream_respond(Stream *s, PyObject *args, PyObject *kwargs)
{
    static char *keys[] = {"status", "headers", "body", "code", "close", "block", NULL};
    unsigned int status, block = 0;
    PyObject *headers, *body, *code = NULL;
    int close = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "ISS|$UpI", keys, &status, &headers, &body, &code, &close, &block))
        return NULL;
    if (s->done || s->finished || s->committed || (s->phase != PHASE_DECIDING && s->phase != PHASE_BODY)) {
        PyErr_SetString(PyExc_RuntimeError, "the exchange has an answer already");
        return NULL;
    }
    if (status < 200 || status > 999 || PyBytes_GET_SIZE(headers) > 16384) {
        PyErr_SetString(PyExc_ValueError, "status is 200 to 999, headers are at most 16 KiB");
        return NULL;
    }
    Core *core = s->core;
    Downstream *d = s->down;
    if (s->up != NULL) {
        s->up->reusable = false;
        up_release(s);
    }
    if (close || s->phase == PHASE_BODY || s->reject[0] != '\0')
        d->last = true;
    asc_writer w = {.at = core->heads, .end = core->heads + HEADS_MAX};
    status_line(s, &w, status);
    put(&w, PyBytes_AS_STRING(headers), (size_t)PyBytes_GET_SIZE(headers));
    if (status != 204 && status != 304) {
        put_literal(&w, "content-length: ");
        put_u64(&w, (uint64_t)PyBytes_GET_SIZE(body));
        put_literal(&w, "\r\n");
    }
    if (d->last)
        put_literal(&w, "connection: close\r\n");
    put_literal(&w, "\r\n");
    struct iovec iov[2] = {{.iov_base = core->heads, .iov_len = (size_t)(w.at - core->heads)},
                           {.iov_base = PyBytes_AS_STRING(body), .iov_len = (size_t)PyBytes_GET_SIZE(body)}};
    bool no_body = s->head_method || status == 204 || status == 304 || iov[1].iov_len == 0;
    s->status = (uint16_t)status;
    s->local = s->committed = true;
    if (code != NULL)
        Py_XSETREF(s->code, Py_NewRef(code));
    s->bytes_out += iov[0].iov_len + (no_body ? 0 : iov[1].iov_len);
    if (block)
        meter_status(core->page, block, status);
    /* the answer is whole before it is sent: whatever sending does to the connection, it finds an ended exchange */
    s->outcome = status < 400 ? "complete" : "refused";
    s->phase = PHASE_FLUSH;
    s->finished = true;
    (void)conn_send(&d->conn, iov, no_body ? 1 : 2);
    Py_INCREF(s);
    if (s->in_walk == 0)
        stream_flushed(s);
    Py_DECREF(s);
    Py_RETURN_NONE;
}

static PyObject *stream_relay_held(Stream *s, PyObject *unused)
{
    (void)unused;
    if (!s->held || s->phase != PHASE_DECIDING) {
        PyErr_SetString(PyExc_RuntimeError, "there is no answer of an upstream to pass on");
        return NULL;
    }
    s->phase = PHASE_RELAY;
    Py_RETURN_NONE;
}

static PyObject *stream_abort(Stream *s, PyObject *outcome)
{
    static const char *const known[] = {"draining", "upstream_failed", "upstream_timeout", "upstream_aborted", "truncated"};
    const char *text = PyUnicode_Check(outcome) ? PyUnicode_AsUTF8(outcome) : NULL;
    const char *found = NULL;
    for (size_t i = 0; text != NULL && i < sizeof known / sizeof known[0]; i++)
        if (strcmp(known[i], text) == 0)
            found = known[i];
    if (found == NULL) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_ValueError, "not an outcome of an aborted exchange");
        return NULL;
    }
    Downstream *d = s->down;
    if (!s->done && d != NULL) {
        down_cut(d, true);
        stream_gone(s, found);
    }
    Py_RETURN_NONE;
}

static PyObject *span_bytes(const Stream *s, asc_span span)
{
    return PyBytes_FromStringAndSize(s->head + span.off, span.len);
}

static PyObject *find_field(const char *bytes, const http1_field *fields, uint32_t n, PyObject *name)
{
    Py_ssize_t len;
    const char *text = PyUnicode_Check(name) ? PyUnicode_AsUTF8AndSize(name, &len) : NULL;
    if (text == NULL) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "a header name is a str");
        return NULL;
    }
    for (uint32_t i = 0; i < n; i++)
        if (http1_name_is(bytes + fields[i].name.off, fields[i].name.len, text, (size_t)len))
            return PyBytes_FromStringAndSize(bytes + fields[i].value.off, fields[i].value.len);
    Py_RETURN_NONE;
}

static PyObject *stream_header(Stream *s, PyObject *name)
{
    return find_field(s->head, s->fields, s->n_fields, name);
}

static PyObject *stream_upstream_header(Stream *s, PyObject *name)
{
    if (s->held_head == NULL)
        Py_RETURN_NONE;
    return find_field(s->held_bytes, s->held_head->fields, s->held_head->n_fields, name);
}

static PyObject *stream_body_copy(Stream *s, PyObject *unused)
{
    (void)unused;
    return PyBytes_FromStringAndSize(s->body, (Py_ssize_t)s->body_len);
}

enum fact {
    F_METHOD, F_PATH, F_QUERY, F_LISTENER, F_PEER, F_REQUEST_ID, F_CREDENTIAL, F_DIGEST, F_TWO, F_CERTIFICATE, F_LENGTH,
    F_BODY_LEN, F_SCAN_ERROR, F_SCAN_CODE, F_MODEL, F_STREAM, F_MAX_TOKENS, F_REJECT, F_FAILURE, F_UP_STATUS, F_REUSED,
    F_ATTEMPTS, F_STATUS, F_COMMITTED, F_OUTCOME, F_USAGE_IN, F_USAGE_OUT, F_FINISH, F_BYTES_IN, F_BYTES_OUT, F_UPSTREAM,
    F_DONE, F_CODE, F_HAS_BODY,
};

static PyObject *digest_of(Stream *s)
{
    unsigned char digest[32];
    if (s->credential.len == 0)
        Py_RETURN_NONE;
    EVP_MD_CTX *context = s->core->digest;
    if (EVP_DigestInit_ex(context, s->core->sha256, NULL) != 1 ||
        EVP_DigestUpdate(context, at(s, s->credential), s->credential.len) != 1 ||
        EVP_DigestFinal_ex(context, digest, NULL) != 1) {
        PyErr_SetString(PyExc_RuntimeError, "SHA-256 failed");
        return NULL;
    }
    return PyBytes_FromStringAndSize((char *)digest, sizeof digest);
}

static PyObject *certificate_of(Stream *s)
{
    size_t len;
    unsigned char *der = s->down && s->down->conn.tls ? tls_peer_certificate(s->down->conn.tls, &len) : NULL;
    if (der == NULL)
        Py_RETURN_NONE;
    PyObject *bytes = PyBytes_FromStringAndSize((char *)der, (Py_ssize_t)len);
    free(der);
    return bytes;
}

static const char *scan_code(enum json_error error)
{
    switch (error) {
    case JSON_OK:
        return "";
    case JSON_DUPLICATE:
        return "duplicate_field";
    case JSON_FIELD:
    case JSON_DEPTH:
    case JSON_KEYS:
    case JSON_NUMBER:
        return "invalid_request";
    default:
        return "invalid_json";
    }
}

static PyObject *stream_get(Stream *s, void *which)
{
    static const char *const finishes[] = {"", "stop", "length", "tool", "filter", "abort", "error", "other"};
    bool scanned = s->json_done && s->json_error == JSON_OK;
    switch ((enum fact)(intptr_t)which) {
    case F_METHOD: return s->parsed ? core_text(s->core, at(s, s->method), s->method.len) : Py_NewRef(Py_None);
    case F_PATH: return s->parsed ? core_text(s->core, at(s, s->path), s->path.len) : Py_NewRef(Py_None);
    case F_QUERY: return s->parsed ? span_bytes(s, s->query) : PyBytes_FromStringAndSize("", 0);
    case F_LISTENER: return Py_NewRef(s->listener);
    case F_PEER: return PyUnicode_FromString(s->down ? s->down->peer : "");
    case F_REQUEST_ID: return PyBytes_FromStringAndSize(s->request_id, s->request_id_len);
    case F_CREDENTIAL: return s->credential.len ? span_bytes(s, s->credential) : Py_NewRef(Py_None);
    case F_DIGEST: return digest_of(s);
    case F_TWO: return PyBool_FromLong(s->two_credentials);
    case F_CERTIFICATE: return certificate_of(s);
    case F_LENGTH:
        if (s->framing == HTTP1_CHUNKED)
            return PyLong_FromLong(-1);
        return PyLong_FromUnsignedLongLong(s->framing == HTTP1_LENGTH ? s->content_length : 0);
    case F_BODY_LEN: return PyLong_FromSize_t(s->body_len);
    case F_SCAN_ERROR: return PyUnicode_FromString(s->json_error == JSON_OK ? "" : json_error_sentence(s->json_error));
    case F_SCAN_CODE: return PyUnicode_FromString(scan_code(s->json_error));
    case F_MODEL:
        if (!scanned || !s->json.has_model)
            Py_RETURN_NONE;
        return core_text(s->core, s->json.model, s->json.model_len);
    case F_STREAM: return PyBool_FromLong(scanned && s->json.stream == 1);
    case F_MAX_TOKENS: return PyLong_FromLongLong(scanned ? s->json.max_tokens : -1);
    case F_REJECT: return PyUnicode_FromString(s->reject);
    case F_FAILURE: return PyUnicode_FromString(s->failure);
    case F_UP_STATUS: return PyLong_FromLong(s->upstream_status);
    case F_REUSED: return PyBool_FromLong(s->reused);
    case F_ATTEMPTS: return PyLong_FromLong(s->attempts);
    case F_STATUS: return PyLong_FromLong(s->status);
    case F_COMMITTED: return PyBool_FromLong(s->committed);
    case F_OUTCOME: return PyUnicode_FromString(s->outcome);
    case F_USAGE_IN: return PyLong_FromLongLong(s->usage_in);
    case F_USAGE_OUT: return PyLong_FromLongLong(s->usage_out);
    case F_FINISH: return PyUnicode_FromString(finishes[s->finish <= FINISH_OTHER ? s->finish : FINISH_OTHER]);
    case F_BYTES_IN: return PyLong_FromUnsignedLongLong(s->bytes_in);
    case F_BYTES_OUT: return PyLong_FromUnsignedLongLong(s->bytes_out);
    case F_UPSTREAM: return Py_NewRef(s->up ? (PyObject *)s->up : Py_None);
    case F_DONE: return PyBool_FromLong(s->done);
    case F_CODE: return s->code ? Py_NewRef(s->code) : PyUnicode_FromString("");
    case F_HAS_BODY: return PyBool_FromLong(s->framing != HTTP1_NO_BODY);
    }
    Py_UNREACHABLE();
}

static PyObject *stream_get_limit(Stream *s, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLongLong(s->body_limit);
}

static int stream_set_limit(Stream *s, PyObject *value, void *unused)
{
    (void)unused;
    unsigned long long limit = value ? PyLong_AsUnsignedLongLong(value) : (unsigned long long)-1;
    if (value == NULL || (limit == (unsigned long long)-1 && PyErr_Occurred())) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "body_limit is a number of bytes");
        return -1;
    }
    s->body_limit = limit;
    return 0;
}

#define FACT(name, which) {name, (getter)stream_get, NULL, NULL, (void *)(intptr_t)(which)}
static PyGetSetDef stream_getset[] = {
    FACT("method", F_METHOD), FACT("path", F_PATH), FACT("query", F_QUERY), FACT("listener", F_LISTENER),
    FACT("peer", F_PEER), FACT("request_id", F_REQUEST_ID), FACT("credential", F_CREDENTIAL),
    FACT("credential_digest", F_DIGEST), FACT("two_credentials", F_TWO), FACT("client_certificate", F_CERTIFICATE),
    FACT("content_length", F_LENGTH), FACT("body_len", F_BODY_LEN), FACT("scan_error", F_SCAN_ERROR),
    FACT("scan_code", F_SCAN_CODE), FACT("model", F_MODEL), FACT("stream", F_STREAM), FACT("max_tokens", F_MAX_TOKENS),
    FACT("reject", F_REJECT), FACT("failure", F_FAILURE), FACT("upstream_status", F_UP_STATUS), FACT("reused", F_REUSED),
    FACT("attempts", F_ATTEMPTS), FACT("status", F_STATUS), FACT("committed", F_COMMITTED), FACT("outcome", F_OUTCOME),
    FACT("usage_in", F_USAGE_IN), FACT("usage_out", F_USAGE_OUT), FACT("finish", F_FINISH), FACT("bytes_in", F_BYTES_IN),
    FACT("bytes_out", F_BYTES_OUT), FACT("upstream", F_UPSTREAM), FACT("done", F_DONE), FACT("code", F_CODE),
    FACT("has_body", F_HAS_BODY),
    {"body_limit", (getter)stream_get_limit, (setter)stream_set_limit, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

#include <structmember.h>

static PyMemberDef stream_members[] = {
    {"principal", T_OBJECT, offsetof(Stream, principal), 0, NULL},
    {"context", T_OBJECT, offsetof(Stream, context), 0, NULL},
    {"log", T_OBJECT, offsetof(Stream, log), 0, NULL},
    {"task", T_OBJECT, offsetof(Stream, task), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyMethodDef stream_methods[] = {
    {"forward", (PyCFunction)(void (*)(void))stream_forward, METH_FASTCALL, NULL},
    {"respond", (PyCFunction)(void (*)(void))stream_respond, METH_VARARGS | METH_KEYWORDS, NULL},
    {"relay", (PyCFunction)stream_relay_held, METH_NOARGS, NULL},
    {"abort", (PyCFunction)stream_abort, METH_O, NULL},
    {"header", (PyCFunction)stream_header, METH_O, NULL},
    {"upstream_header", (PyCFunction)stream_upstream_header, METH_O, NULL},
    {"body", (PyCFunction)stream_body_copy, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

PyTypeObject Stream_Type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "ascproxy._native.Stream",
    .tp_basicsize = sizeof(Stream),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_doc = "One exchange.",
    .tp_dealloc = (destructor)stream_dealloc,
    .tp_methods = stream_methods,
    .tp_members = stream_members,
    .tp_getset = stream_getset,
};
