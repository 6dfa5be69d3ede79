/* The request of an exchange: its head, kept in one block, and its body as it is collected and scanned. */
#include "py_core.h"

#include <strings.h>

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
            if (value.len < 7 || strncasecmp(stream_at(s, value), "Bearer ", 7) != 0) {
                s->two_credentials |= s->credential.len != 0;
                continue;
            }
            value.off += 7;
            value.len -= 7;
            while (value.len && *stream_at(s, value) == ' ') {
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
        else if (s->credential.len != value.len || memcmp(stream_at(s, s->credential), stream_at(s, value), value.len) != 0)
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
        const char *bytes = stream_at(s, given);
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
        chunk_init(&s->chunk, &d->listener->limits.chunk);
    } else {
        s->minor = 1;
    }
    name_request(s);
    s->down = d;
    if (d->trusted && head != NULL)
        stream_find_client(s);
    s->body_started_ns = s->body_rate_ns = s->body_last_ns = s->t_start;
    d->requests++;
    core->n_in_flight++;
    if (d->frames != NULL)
        return s; /* py_h2.c keeps it */
    d->stream = s; /* owned by the connection until settled */
    /* an HTTP/1.0 client gets one answer a connection: nothing is saved by keeping those alive */
    d->last = d->last || head == NULL || !head->keep_alive || head->minor == 0;
    if (!d->last) {
        enum asc_limit over = down_last(d, s->t_start);
        d->last = core->draining || over != LIMIT_NONE;
        if (over != LIMIT_NONE)
            core_trip(core, over);
    }
    return s;
}

void stream_drop_body(Stream *s)
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

void stream_dealloc(Stream *s)
{
    stream_drop_body(s);
    if (s->up != NULL && s->up->stream == s)
        s->up->stream = NULL;
    Py_XDECREF(s->up);
    Py_XDECREF(s->plan);
    events_drop(s);
    buffer_free(&s->h2.queued);
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

/* False: the request was refused. */
bool stream_keep_body(Stream *s, const char *bytes, size_t len)
{
    if (len > s->body_limit || s->body_len > s->body_limit - len) {
        stream_trip(s, LIMIT_MAX_BODY);
        stream_reject(s, "body_too_large");
        return false;
    }
    if (!body_room(s, len)) {
        stream_trip(s, LIMIT_MAX_BODIES);
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
        if (take && !stream_keep_body(s, bytes, take))
            return false;
        s->body_left -= take;
        *used = take;
        *complete = s->body_left == 0;
    } else if (s->framing == HTTP1_CHUNKED) {
        size_t off, data, consumed;
        enum chunk_result result = chunk_decode(&s->chunk, bytes, len, &off, &data, &consumed);
        if (result == CHUNK_BAD) {
            if (s->chunk.over)
                stream_trip(s, chunk_limit(&s->chunk));
            stream_reject(s, "invalid_request");
            return false;
        }
        if (data && !stream_keep_body(s, bytes + off, data))
            return false;
        *used = consumed;
        *complete = result == CHUNK_END;
    } else {
        *complete = true;
    }
    s->bytes_in += *used;
    return true;
}

/* The head is here and the body will take time: may this caller send it at all? False: refused, or decided otherwise. */
bool stream_admit_body(Stream *s)
{
    Py_INCREF(s);
    stream_walk(s, s->core->on_head);
    bool comes = s->phase == PHASE_BODY;
    if (comes && ((s->framing == HTTP1_LENGTH && s->content_length > s->body_limit) || s->body_len > s->body_limit)) {
        stream_trip(s, LIMIT_MAX_BODY);
        stream_reject(s, "body_too_large");
        comes = false;
    }
    Py_DECREF(s);
    return comes;
}

uint64_t stream_body_deadline(const Stream *s)
{
    const asc_limits *limits = &s->listener->limits;
    uint64_t at = s->body_last_ns + limits->body_idle;
    if (s->body_started_ns + limits->body_total < at)
        at = s->body_started_ns + limits->body_total;
    if (limits->body_min_rate && s->body_rate_ns + 10000 * MS < at)
        at = s->body_rate_ns + 10000 * MS;
    return at;
}

enum asc_limit stream_body_due(Stream *s, uint64_t now)
{
    const asc_limits *limits = &s->listener->limits;
    enum asc_limit over = LIMIT_NONE;
    if (now >= s->body_last_ns + limits->body_idle)
        over = LIMIT_BODY_IDLE;
    else if (now >= s->body_started_ns + limits->body_total)
        over = LIMIT_BODY_TOTAL;
    if (limits->body_min_rate && now >= s->body_rate_ns + 10000 * MS) {
        if (over == LIMIT_NONE && s->bytes_in - s->body_rate_mark < limits->body_min_rate * 10)
            over = LIMIT_BODY_MIN_RATE;
        s->body_rate_mark = s->bytes_in;
        s->body_rate_ns = now;
    }
    return over;
}

/* The request is complete: the walk decides. */
void stream_request(Stream *s)
{
    scan_ended(s);
    s->phase = PHASE_DECIDING;
    s->down->linger = false; /* all that it announced has come */
    stream_walk(s, s->core->on_request);
}

