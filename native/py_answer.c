/* The answer of an exchange: the upstream's, passed on as it comes and watched for what it says, or our own. */
#include "py_core.h"

#include <strings.h>

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

/* What every head begins with. For HTTP/2 the status goes its own way (py_h2.c), the lines are the same. */
static void status_line(Stream *s, asc_writer *w, unsigned status)
{
    if (!s->h2.id) {
        const char *reason = reason_phrase(status);
        put_literal(w, "HTTP/1.1 ");
        put_u64(w, status);
        put_literal(w, " ");
        put(w, reason, strlen(reason));
        put_literal(w, "\r\n");
    }
    put_literal(w, "date: ");
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
    if (head->status == 200 && starts_with(bytes + type.off, type.len, "text/event-stream")) {
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
    bool events = s->scanner == SCANNER_SSE; /* their length may change on the way */
    if ((head->framing == HTTP1_LENGTH && !events) || (head->framing == HTTP1_NO_BODY && s->head_method &&
                                          head->count[HTTP1_CONTENT_LENGTH])) {
        put_literal(&w, "content-length: ");
        put_u64(&w, head->content_length);
        put_literal(&w, "\r\n");
    } else if (head->framing != HTTP1_NO_BODY && !s->h2.id) {
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
    unsigned status = head->status; /* 424: TGI whose shard has died */
    if (status == 401 || status == 403 || status == 424 || status == 429 || status >= 500) {
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
    if (s->phase == PHASE_RELAY) { /* begun, but not with the client yet */
        s->phase = PHASE_HOLD;
        s->status = head->status;
        s->t_first = s->t_last = asc_now();
        start_watch(s, bytes, head);
        s->head_out = answer_head(s, bytes, head);
        if (s->head_out == 0) { /* cannot be: both heads are bounded below HEADS_MAX */
            stream_break(s, true);
            stream_gone(s, "upstream_failed");
        } else if (s->scanner == SCANNER_SSE) {
            events_start(s);
        }
    }
}

/* Pass data on to the client, behind the head that stream_answer has just left in core->heads, if it did. `data` has
 * HEADROOM before and TAILROOM behind it, both free to be written. With `end`, the answer is complete. */
int stream_relay(Stream *s, char *data, size_t len, bool end)
{
    if (s->scanner == SCANNER_SSE)
        return events_relay(s, data, len, end);
    if (s->phase == PHASE_HOLD) {
        if (len == 0 && !end) {
            if (!events_hold(s, NULL, 0))
                stream_failed(s, "reset");
            return 0;
        }
        s->phase = PHASE_RELAY;
        asc_buffer early = events_release(s);
        buffer_free(&early);
    }
    if (len) {
        if (s->scanner == SCANNER_JSON)
            (void)json_answer_feed(&s->watch.json, data, len);
        s->t_last = asc_now();
    }
    return stream_send(s, data, len, end);
}

/* As stream_relay, for bytes that have been looked at. */
int stream_send(Stream *s, char *data, size_t len, bool end)
{
    if (s->h2.id)
        return frames_write(s, &(struct iovec){data, len}, 1, end);
    struct iovec iov[2];
    int k = 0;
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

/* As stream_send, for bytes that lie in at most 6 places, without room around them. */
int stream_send_parts(Stream *s, const struct iovec *parts, int n, bool end)
{
    if (s->h2.id)
        return frames_write(s, parts, n, end);
    struct iovec iov[10];
    char size_line[HEADROOM];
    int k = 0;
    size_t len = 0;
    for (int i = 0; i < n; i++)
        len += parts[i].iov_len;
    if (s->head_out)
        iov[k++] = (struct iovec){s->core->heads, s->head_out};
    s->bytes_out += s->head_out + len;
    s->head_out = 0;
    if (len && s->chunked_out) {
        char *from = chunk_size_before(size_line + sizeof size_line, len);
        iov[k++] = (struct iovec){from, (size_t)(size_line + sizeof size_line - from)};
    }
    for (int i = 0; i < n; i++)
        if (parts[i].iov_len)
            iov[k++] = parts[i];
    if (s->chunked_out) {
        const char *tail = len && end ? "\r\n0\r\n\r\n" : len ? "\r\n" : end ? "0\r\n\r\n" : "";
        if (tail[0])
            iov[k++] = (struct iovec){(char *)tail, strlen(tail)};
    }
    if (k == 0)
        return 0;
    s->committed = true;
    return conn_send(&s->down->conn, iov, k);
}

/* How an answer that came to its end is to be called. */
const char *stream_outcome(const Stream *s)
{
    if (s->scanner == SCANNER_SSE)
        return events_outcome(s);
    bool aborted = s->scanner == SCANNER_JSON && json_answer_facts(&s->watch.json)->finish == FINISH_ABORT;
    return aborted ? "upstream_aborted" : "complete";
}

const char *usage_source(const Stream *s)
{
    static const char *const names[] = {"none", "reported", "partial", "counted"};
    return names[s->usage_source & 3];
}

/* What the answer said of itself, for the log and the meter. */
void stream_read_watch(Stream *s)
{
    if (s->usage_in >= 0 || s->usage_out >= 0)
        s->usage_source = USAGE_REPORTED; /* in header fields */
    if (s->scanner == SCANNER_SSE) {
        events_usage(s);
        s->finish = s->watch.sse.finish;
    } else if (s->scanner == SCANNER_JSON) {
        const json_facts *facts = json_answer_facts(&s->watch.json);
        if (facts->usage_in >= 0)
            s->usage_in = facts->usage_in;
        if (facts->usage_out >= 0)
            s->usage_out = facts->usage_out;
        if (facts->usage_in >= 0 || facts->usage_out >= 0)
            s->usage_source = USAGE_REPORTED;
        s->finish = facts->finish;
    }
}


PyObject *stream_respond(Stream *s, PyObject *args, PyObject *kwargs)
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
        stream_last(s);
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
    if (status < 400)
        stream_vouch(s);
    if (code != NULL)
        Py_XSETREF(s->code, Py_NewRef(code));
    if (!s->h2.id)
        s->bytes_out += iov[0].iov_len + (no_body ? 0 : iov[1].iov_len);
    if (block)
        meter_status(core->page, block, status);
    /* the answer is whole before it is sent: whatever sending does to the connection, it finds an ended exchange */
    s->outcome = status < 400 ? "complete" : "refused";
    s->phase = PHASE_FLUSH;
    s->finished = true;
    Py_INCREF(s);
    if (s->h2.id) {
        s->head_out = iov[0].iov_len;
        (void)frames_write(s, iov + 1, no_body ? 0 : 1, true);
    } else {
        (void)conn_send(&d->conn, iov, no_body ? 1 : 2);
    }
    if (s->in_walk == 0)
        stream_flushed(s);
    Py_DECREF(s);
    Py_RETURN_NONE;
}

