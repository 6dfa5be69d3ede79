/* Binds the parsers alone, so that tests in Python can feed them anything, split anywhere.
 *
 * Every piece is copied into a block of exactly its size before it is parsed: a read beyond it is seen by the address
 * sanitizer, and the in-place chunk decoder never writes into an immutable object.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdlib.h>
#include <string.h>

#include "chunk.h"
#include "http1.h"
#include "jsonscan.h"
#include "sse.h"

#define FLAG(x) ((x) ? Py_True : Py_False)

/* Visit each piece of a sequence of bytes-like objects as an exact, writable copy. */
struct pieces {
    PyObject *sequence;
    Py_ssize_t at;
    char *copy;
    size_t len;
};

static bool pieces_open(struct pieces *pieces, PyObject *object)
{
    *pieces = (struct pieces){.sequence = PySequence_Fast(object, "pieces must be a sequence of bytes")};
    return pieces->sequence != NULL;
}

/* 1 with the next piece, 0 at the end, -1 with an exception. */
static int pieces_next(struct pieces *pieces)
{
    free(pieces->copy);
    pieces->copy = NULL;
    if (pieces->at >= PySequence_Fast_GET_SIZE(pieces->sequence))
        return 0;
    Py_buffer view;
    if (PyObject_GetBuffer(PySequence_Fast_GET_ITEM(pieces->sequence, pieces->at++), &view, PyBUF_SIMPLE) < 0)
        return -1;
    pieces->len = (size_t)view.len;
    pieces->copy = malloc(pieces->len ? pieces->len : 1);
    if (pieces->copy)
        memcpy(pieces->copy, view.buf, pieces->len);
    else
        PyErr_NoMemory();
    PyBuffer_Release(&view);
    return pieces->copy ? 1 : -1;
}

static void pieces_close(struct pieces *pieces)
{
    free(pieces->copy);
    Py_CLEAR(pieces->sequence);
}

/* ---- heads ------------------------------------------------------------------------------------------------------- */

static PyObject *head_dict(const http1_head *head, const char *buf)
{
    PyObject *fields = PyList_New(0);
    for (uint32_t i = 0; fields && i < head->n_fields; i++) {
        const http1_field *field = &head->fields[i];
        PyObject *item = Py_BuildValue("(y#y#i)", buf + field->name.off, (Py_ssize_t)field->name.len,
                                       buf + field->value.off, (Py_ssize_t)field->value.len, (int)field->id);
        if (!item || PyList_Append(fields, item) < 0)
            Py_CLEAR(fields);
        Py_XDECREF(item);
    }
    if (!fields)
        return NULL;
#define SPAN(x) buf + head->x.off, (Py_ssize_t)head->x.len
    return Py_BuildValue("{s:y#,s:y#,s:y#,s:y#,s:i,s:i,s:i,s:O,s:O,s:O,s:K,s:I,s:N}", "method", SPAN(method), "target",
                         SPAN(target), "path", SPAN(path), "query", SPAN(query), "status", (int)head->status, "minor",
                         (int)head->minor, "framing", (int)head->framing, "keep_alive", FLAG(head->keep_alive),
                         "expect_continue", FLAG(head->expect_continue), "upgrade", FLAG(head->upgrade), "content_length",
                         (unsigned long long)head->content_length, "head_len", head->head_len, "fields", fields);
#undef SPAN
}

static PyObject *head_result(const http1_head *head, const char *buf, enum http1_result result)
{
    if (result == HTTP1_PARTIAL)
        Py_RETURN_NONE;
    if (result == HTTP1_ERROR)
        return Py_BuildValue("(is)", (int)head->reject, head->why);
    return head_dict(head, buf);
}

static PyObject *parse_head(PyObject *args, PyObject *kwargs, bool request)
{
    static char *names[] = {"data", "seen", "head_request", "max_line", "max_field", "max_head", "max_fields", NULL};
    http1_limits limits = {8192, 16384, 32768, 100};
    Py_buffer view;
    Py_ssize_t seen = 0;
    int head_request = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "y*|npIIII", names, &view, &seen, &head_request, &limits.max_line,
                                     &limits.max_field, &limits.max_head, &limits.max_fields))
        return NULL;
    PyObject *answer = NULL;
    char *copy = malloc(view.len ? (size_t)view.len : 1);
    if (!copy) {
        PyErr_NoMemory();
    } else if (seen < 0 || seen > view.len) {
        PyErr_SetString(PyExc_ValueError, "seen must be within data");
    } else {
        memcpy(copy, view.buf, (size_t)view.len);
        http1_head head;
        enum http1_result result =
            request ? http1_parse_request(&head, copy, (size_t)view.len, (size_t)seen, &limits)
                    : http1_parse_response(&head, copy, (size_t)view.len, (size_t)seen, head_request != 0, &limits);
        answer = head_result(&head, copy, result);
    }
    free(copy);
    PyBuffer_Release(&view);
    return answer;
}

static PyObject *parse_request(PyObject *module, PyObject *args, PyObject *kwargs)
{
    (void)module;
    return parse_head(args, kwargs, true);
}

static PyObject *parse_response(PyObject *module, PyObject *args, PyObject *kwargs)
{
    (void)module;
    return parse_head(args, kwargs, false);
}

/* ---- chunks ------------------------------------------------------------------------------------------------------ */

static PyObject *py_chunk_decode(PyObject *module, PyObject *object)
{
    (void)module;
    struct pieces pieces;
    PyObject *payload = PyByteArray_FromStringAndSize(NULL, 0);
    if (!payload || !pieces_open(&pieces, object)) {
        Py_XDECREF(payload);
        return NULL;
    }
    chunk_decoder decoder;
    chunk_init(&decoder, &(chunk_limits)CHUNK_LIMITS);
    size_t used = 0;
    int result = CHUNK_MORE, next = 0;
    while (result == CHUNK_MORE && (next = pieces_next(&pieces)) > 0) {
        size_t off, len, consumed;
        result = chunk_decode(&decoder, pieces.copy, pieces.len, &off, &len, &consumed);
        used += consumed;
        Py_ssize_t before = PyByteArray_GET_SIZE(payload);
        if (PyByteArray_Resize(payload, before + (Py_ssize_t)len) < 0) {
            next = -1;
            break;
        }
        memcpy(PyByteArray_AS_STRING(payload) + before, pieces.copy + off, len);
    }
    pieces_close(&pieces);
    if (next < 0) {
        Py_DECREF(payload);
        return NULL;
    }
    return Py_BuildValue("(iNnK)", result, payload, (Py_ssize_t)used, (unsigned long long)decoder.total);
}

static PyObject *py_chunk_size(PyObject *module, PyObject *number)
{
    (void)module;
    unsigned long long n = PyLong_AsUnsignedLongLong(number);
    if (PyErr_Occurred())
        return NULL;
    char line[18];
    char *from = chunk_size_before(line + sizeof line, n);
    return PyBytes_FromStringAndSize(from, line + sizeof line - from);
}

/* ---- JSON -------------------------------------------------------------------------------------------------------- */

static PyObject *py_json_request(PyObject *module, PyObject *args, PyObject *kwargs)
{
    (void)module;
    static char *names[] = {"pieces", "seed", "max_depth", "max_keys", "max_digits", NULL};
    json_limits limits = {64, 10000, 64};
    PyObject *object, *answer = NULL;
    unsigned long long seed = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|KIII", names, &object, &seed, &limits.max_depth, &limits.max_keys,
                                     &limits.max_digits))
        return NULL;
    struct pieces pieces;
    if (!pieces_open(&pieces, object))
        return NULL;
    json_request *scan = json_request_new();
    if (!scan) {
        pieces_close(&pieces);
        return PyErr_NoMemory();
    }
    json_request_start(scan, &limits, seed);
    int next;
    while ((next = pieces_next(&pieces)) > 0)
        json_request_feed(scan, pieces.copy, pieces.len);
    pieces_close(&pieces);
    if (next == 0) {
        int error = (int)json_request_end(scan);
        const json_fields *f = json_request_fields(scan);
        answer = Py_BuildValue("(iK{s:y#,s:O,s:K,s:K,s:i,s:L,s:L,s:K,s:K,s:i,s:i,s:K,s:O})", error,
                               (unsigned long long)json_request_offset(scan), "model", f->model, (Py_ssize_t)f->model_len,
                               "has_model", FLAG(f->has_model), "model_off", (unsigned long long)f->model_off,
                               "model_raw_len", (unsigned long long)f->model_raw_len, "stream", (int)f->stream,
                               "max_tokens", (long long)f->max_tokens, "n", (long long)f->n, "options_off",
                               (unsigned long long)f->options_off, "options_raw_len",
                               (unsigned long long)f->options_raw_len, "include_usage", (int)f->include_usage,
                               "continuous_usage", (int)f->continuous_usage, "open_off", (unsigned long long)f->open_off,
                               "empty", FLAG(f->empty));
    }
    json_request_free(scan);
    return answer;
}

static PyObject *facts_dict(const json_facts *f)
{
    return Py_BuildValue("{s:L,s:L,s:i,s:O,s:O,s:O,s:O,s:y#,s:K,s:K}", "usage_in", (long long)f->usage_in, "usage_out",
                         (long long)f->usage_out, "finish", (int)f->finish, "has_error", FLAG(f->has_error),
                         "has_content", FLAG(f->has_content), "final_text", FLAG(f->final_text), "choices_empty",
                         FLAG(f->choices_empty), "type", f->type, (Py_ssize_t)f->type_len, "usage_off",
                         (unsigned long long)f->usage_off, "usage_raw_len", (unsigned long long)f->usage_raw_len);
}

static PyObject *py_json_answer(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *object;
    int dialect;
    struct pieces pieces;
    if (!PyArg_ParseTuple(args, "Oi", &object, &dialect) || !pieces_open(&pieces, object))
        return NULL;
    json_answer scan;
    json_answer_start(&scan, (enum json_dialect)dialect);
    bool fine = true;
    int next;
    while ((next = pieces_next(&pieces)) > 0)
        fine = json_answer_feed(&scan, pieces.copy, pieces.len);
    pieces_close(&pieces);
    return next < 0 ? NULL : Py_BuildValue("(ON)", FLAG(fine), facts_dict(json_answer_facts(&scan)));
}

/* ---- events ------------------------------------------------------------------------------------------------------ */

static PyObject *stream_dict(const sse_scanner *s)
{
    return Py_BuildValue("{s:K,s:K,s:K,s:L,s:L,s:i,s:O,s:O,s:O,s:O,s:O}", "events", (unsigned long long)s->events,
                         "bytes", (unsigned long long)s->bytes, "boundary", (unsigned long long)s->boundary, "usage_in",
                         (long long)s->usage_in, "usage_out", (long long)s->usage_out, "finish", (int)s->finish,
                         "terminated", FLAG(s->terminated), "error", FLAG(s->error), "content", FLAG(s->content),
                         "progress", FLAG(s->progress), "at_boundary", FLAG(sse_at_boundary(s)));
}

static PyObject *py_sse(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *object;
    int dialect;
    struct pieces pieces;
    if (!PyArg_ParseTuple(args, "Oi", &object, &dialect) || !pieces_open(&pieces, object))
        return NULL;
    sse_scanner scanner;
    sse_init(&scanner, (enum json_dialect)dialect);
    unsigned long long ended = 0;
    int next;
    while ((next = pieces_next(&pieces)) > 0)
        ended += sse_feed(&scanner, pieces.copy, pieces.len);
    pieces_close(&pieces);
    return next < 0 ? NULL : Py_BuildValue("(KN)", ended, stream_dict(&scanner));
}

/* Append (end, usage span or None, facts) of the event that has just ended. */
static bool append_event(PyObject *events, const sse_scanner *scanner)
{
    uint64_t off, len;
    PyObject *span;
    if (sse_usage(scanner, &off, &len))
        span = Py_BuildValue("(KK)", (unsigned long long)off, (unsigned long long)len);
    else
        span = Py_NewRef(Py_None);
    PyObject *item = Py_BuildValue("(KNN)", (unsigned long long)scanner->bytes, span,
                                   facts_dict(json_answer_facts(&scanner->json)));
    bool fine = item && PyList_Append(events, item) == 0;
    Py_XDECREF(item);
    return fine;
}

static PyObject *py_sse_events(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *object, *events = PyList_New(0);
    int dialect;
    struct pieces pieces;
    if (!events || !PyArg_ParseTuple(args, "Oi", &object, &dialect) || !pieces_open(&pieces, object)) {
        Py_XDECREF(events);
        return NULL;
    }
    sse_scanner scanner;
    sse_init(&scanner, (enum json_dialect)dialect);
    int next;
    while ((next = pieces_next(&pieces)) > 0) {
        for (size_t at = 0, consumed; at < pieces.len; at += consumed) {
            if (sse_next(&scanner, pieces.copy + at, pieces.len - at, &consumed) && !append_event(events, &scanner)) {
                next = -1;
                break;
            }
        }
        if (next < 0)
            break;
    }
    pieces_close(&pieces);
    if (next < 0)
        Py_CLEAR(events);
    return events;
}

/* ---- module ------------------------------------------------------------------------------------------------------ */

#define KEYWORDS (METH_VARARGS | METH_KEYWORDS)
#define WITH_KEYWORDS(f) (PyCFunction)(void (*)(void))(f)

static PyMethodDef methods[] = {
    {"parse_request", WITH_KEYWORDS(parse_request), KEYWORDS, "Parse a request head."},
    {"parse_response", WITH_KEYWORDS(parse_response), KEYWORDS, "Parse a response head."},
    {"chunk_decode", py_chunk_decode, METH_O, "Decode a chunked body: (result, payload, bytes used, total)."},
    {"chunk_size", py_chunk_size, METH_O, "The size line of a chunk."},
    {"json_request", WITH_KEYWORDS(py_json_request), KEYWORDS, "Scan a request: (error, offset, fields)."},
    {"json_answer", py_json_answer, METH_VARARGS, "Scan an answer: (is JSON so far, facts)."},
    {"sse", py_sse, METH_VARARGS, "Watch a stream: (events ended, state)."},
    {"sse_events", py_sse_events, METH_VARARGS, "Watch a stream: [(end, usage span or None, facts)]."},
    {NULL, NULL, 0, NULL},
};

static int add_constants(PyObject *module)
{
    static const struct {
        const char *name;
        int value;
    } constants[] = {
        {"NO_BODY", HTTP1_NO_BODY}, {"LENGTH", HTTP1_LENGTH}, {"CHUNKED", HTTP1_CHUNKED}, {"TO_CLOSE", HTTP1_TO_CLOSE},
        {"BAD_REQUEST", HTTP1_BAD_REQUEST}, {"LINE_TOO_LONG", HTTP1_LINE_TOO_LONG},
        {"FIELDS_TOO_LARGE", HTTP1_FIELDS_TOO_LARGE}, {"BAD_VERSION", HTTP1_BAD_VERSION},
        {"UNSUPPORTED_TE", HTTP1_UNSUPPORTED_TE},
        {"CHUNK_MORE", CHUNK_MORE}, {"CHUNK_END", CHUNK_END}, {"CHUNK_BAD", CHUNK_BAD},
        {"JSON_OK", JSON_OK}, {"JSON_SYNTAX", JSON_SYNTAX}, {"JSON_NOT_OBJECT", JSON_NOT_OBJECT},
        {"JSON_TRUNCATED", JSON_TRUNCATED}, {"JSON_TRAILING", JSON_TRAILING}, {"JSON_DUPLICATE", JSON_DUPLICATE},
        {"JSON_DEPTH", JSON_DEPTH}, {"JSON_KEYS", JSON_KEYS}, {"JSON_NUMBER", JSON_NUMBER}, {"JSON_FIELD", JSON_FIELD},
        {"NONE", JSON_NONE}, {"OPENAI", JSON_OPENAI}, {"MESSAGES", JSON_MESSAGES}, {"RESPONSES", JSON_RESPONSES},
        {"TGI", JSON_TGI},
        {"FINISH_NONE", FINISH_NONE}, {"FINISH_STOP", FINISH_STOP}, {"FINISH_LENGTH", FINISH_LENGTH},
        {"FINISH_TOOL", FINISH_TOOL}, {"FINISH_FILTER", FINISH_FILTER}, {"FINISH_ABORT", FINISH_ABORT},
        {"FINISH_ERROR", FINISH_ERROR}, {"FINISH_OTHER", FINISH_OTHER},
    };
    for (size_t i = 0; i < sizeof constants / sizeof *constants; i++)
        if (PyModule_AddIntConstant(module, constants[i].name, constants[i].value) < 0)
            return -1;
    return 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, add_constants}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "ascproxy._parsers",
    .m_doc = "The native parsers, for tests.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__parsers(void)
{
    return PyModuleDef_Init(&definition);
}
