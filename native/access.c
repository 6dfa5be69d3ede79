/* The access line of one exchange: one JSON object, built without Python, kept until the worker takes the lines of a turn. */
#include "py_core.h"

static void put_python(asc_writer *w, PyObject *bytes)
{
    if (bytes != NULL && PyBytes_Check(bytes) && PyBytes_GET_SIZE(bytes)) {
        put_literal(w, ",");
        put(w, PyBytes_AS_STRING(bytes), (size_t)PyBytes_GET_SIZE(bytes));
    }
}

static void put_span(asc_writer *w, const Stream *s, asc_span span, size_t most)
{
    put_json(w, s->head + span.off, span.len < most ? span.len : most);
}

static void put_micros(asc_writer *w, uint64_t from, uint64_t to)
{
    put_u64(w, to > from ? (to - from) / 1000 : 0);
}

#define TEXT(w, text) put((w), (text), strlen(text))

void access_line(Stream *s, uint64_t now)
{
    static const char *const finishes[] = {"", "stop", "length", "tool", "filter", "abort", "error", "other"};
    Core *core = s->core;
    const char *stamp;
    unsigned millis;
    core_date(core, &stamp, &millis);
    asc_writer w = {.at = core->log + core->log_len, .end = core->log + LOG_MAX};
    put_literal(&w, "{\"time\":\"");
    TEXT(&w, stamp);
    char fraction[6] = {'.', (char)('0' + millis / 100 % 10), (char)('0' + millis / 10 % 10), (char)('0' + millis % 10), 'Z', 0};
    TEXT(&w, fraction);
    put_literal(&w, "\",\"kind\":\"access\",\"request_id\":\"");
    put(&w, s->request_id, s->request_id_len);
    put_literal(&w, "\",\"peer\":\"");
    if (s->down != NULL)
        TEXT(&w, s->down->peer);
    put_literal(&w, "\"");
    if (s->down != NULL && stream_client(s) != s->down->peer) {
        put_literal(&w, ",\"client\":\"");
        TEXT(&w, stream_client(s));
        put_literal(&w, "\"");
    }
    if (s->parsed) {
        put_literal(&w, ",\"method\":\"");
        put_span(&w, s, s->method, 32);
        put_literal(&w, "\",\"path\":\"");
        put_span(&w, s, s->path, 256);
        put_literal(&w, "\",\"http\":\"");
        TEXT(&w, s->h2.id ? "2" : s->minor ? "1.1" : "1.0");
        put_literal(&w, "\"");
    }
    if (s->down != NULL)
        put_python(&w, s->down->client_line);
    put_literal(&w, ",\"status\":");
    put_u64(&w, s->status);
    put_literal(&w, ",\"outcome\":\"");
    TEXT(&w, s->outcome);
    put_literal(&w, "\"");
    if (s->code != NULL && PyUnicode_Check(s->code) && PyUnicode_GetLength(s->code) > 0) {
        const char *code = PyUnicode_AsUTF8(s->code);
        if (code == NULL)
            PyErr_Clear();
        put_literal(&w, ",\"code\":\"");
        if (code != NULL)
            put_json(&w, code, strlen(code));
        put_literal(&w, "\"");
    }
    if (s->limit != LIMIT_NONE) {
        put_literal(&w, ",\"limit\":\"");
        TEXT(&w, limit_name((enum asc_limit)s->limit));
        put_literal(&w, "\"");
    }
    put_python(&w, s->log);
    if (s->plan != NULL)
        put_python(&w, s->plan->log);
    if (s->json_done && s->json_error == JSON_OK && s->json.has_model) {
        put_literal(&w, ",\"model\":\"");
        put_json(&w, s->json.model, s->json.model_len);
        put_literal(&w, "\"");
    }
    if (s->attempts) {
        put_literal(&w, ",\"attempts\":");
        put_u64(&w, s->attempts);
        put_literal(&w, ",\"upstream_status\":");
        put_u64(&w, s->upstream_status);
    }
    put_literal(&w, ",\"stream\":");
    if (s->json_done && s->json.stream == 1)
        put_literal(&w, "true");
    else
        put_literal(&w, "false");
    put_literal(&w, ",\"bytes_in\":");
    put_u64(&w, s->bytes_in);
    put_literal(&w, ",\"bytes_out\":");
    put_u64(&w, s->bytes_out);
    if (s->usage_in >= 0 || s->usage_out >= 0) {
        put_literal(&w, ",\"tokens_in\":");
        put_i64(&w, s->usage_in);
        put_literal(&w, ",\"tokens_out\":");
        put_i64(&w, s->usage_out);
        put_literal(&w, ",\"usage_source\":\"");
        TEXT(&w, usage_source(s));
        put_literal(&w, "\"");
    }
    if (s->finish != FINISH_NONE && s->finish <= FINISH_OTHER) {
        put_literal(&w, ",\"finish\":\"");
        TEXT(&w, finishes[s->finish]);
        put_literal(&w, "\"");
    }
    if (s->t_forward) {
        put_literal(&w, ",\"gateway_us\":");
        put_micros(&w, s->t_start, s->t_forward);
    }
    if (s->t_first) {
        put_literal(&w, ",\"first_byte_us\":");
        put_micros(&w, s->t_start, s->t_first);
    }
    put_literal(&w, ",\"duration_us\":");
    put_micros(&w, s->t_start, now);
    put_literal(&w, "}\n");
    if (w.full)
        page_add(core->page, PAGE_CELL_LOG_DROPPED, 1); /* a whole line or none */
    else
        core->log_len = (size_t)(w.at - core->log);
}
