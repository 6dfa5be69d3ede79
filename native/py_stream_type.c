/* Stream as Python sees it: facts of an exchange, and the actions of the walk. */
#include "py_core.h"

#include <structmember.h>

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
        stream_break(s, true);
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
    F_DONE, F_CODE, F_ASKS, F_USAGE_SOURCE, F_SCAN_LIMIT,
};

static PyObject *digest_of(Stream *s)
{
    unsigned char digest[32];
    if (s->credential.len == 0)
        Py_RETURN_NONE;
    EVP_MD_CTX *context = s->core->digest;
    if (EVP_DigestInit_ex(context, s->core->sha256, NULL) != 1 ||
        EVP_DigestUpdate(context, stream_at(s, s->credential), s->credential.len) != 1 ||
        EVP_DigestFinal_ex(context, digest, NULL) != 1) {
        PyErr_SetString(PyExc_RuntimeError, "SHA-256 failed");
        return NULL;
    }
    return core_text(s->core, (char *)digest, sizeof digest);
}

/* Who asks for what, as one key. None when there is something to look into first: no credential, or two; no body, or
 * one that is not what it should be; no model in it. */
static PyObject *asks_of(Stream *s)
{
    if (!s->parsed || s->two_credentials || s->credential.len == 0 || !s->json_done || s->json_error != JSON_OK ||
        !s->json.has_model)
        Py_RETURN_NONE;
    Core *core = s->core;
    PyObject *parts[] = {
        Py_NewRef(s->listener),
        core_text(core, stream_at(s, s->method), s->method.len),
        core_text(core, stream_at(s, s->path), s->path.len),
        core_text(core, stream_at(s, s->query), s->query.len),
        digest_of(s),
        core_text(core, s->json.model, s->json.model_len),
    };
    const Py_ssize_t n = sizeof parts / sizeof parts[0];
    PyObject *asks = PyTuple_New(n);
    for (Py_ssize_t i = 0; i < n; i++) {
        if (parts[i] == NULL)
            Py_CLEAR(asks);
        if (asks != NULL)
            PyTuple_SET_ITEM(asks, i, parts[i]);
        else
            Py_XDECREF(parts[i]);
    }
    return asks;
}

static PyObject *certificate_of(Stream *s)
{
    return Py_NewRef(s->down != NULL && s->down->client_cert != NULL ? s->down->client_cert : Py_None);
}

static enum asc_limit scan_limit(enum json_error error)
{
    return error == JSON_DEPTH ? LIMIT_JSON_DEPTH : error == JSON_KEYS ? LIMIT_JSON_KEYS : error == JSON_NUMBER ? LIMIT_JSON_DIGITS : LIMIT_NONE;
}

/* The walk met a limit that only it knows. */
static PyObject *stream_trip_named(Stream *s, PyObject *name)
{
    Py_ssize_t len;
    const char *text = PyUnicode_Check(name) ? PyUnicode_AsUTF8AndSize(name, &len) : NULL;
    enum asc_limit limit = text == NULL ? LIMIT_NONE : limit_named(text, (size_t)len);
    if (limit == LIMIT_NONE) {
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_ValueError, "not a limit: %R", name);
        return NULL;
    }
    stream_trip(s, limit);
    Py_RETURN_NONE;
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
    case F_METHOD: return s->parsed ? core_text(s->core, stream_at(s, s->method), s->method.len) : Py_NewRef(Py_None);
    case F_PATH: return s->parsed ? core_text(s->core, stream_at(s, s->path), s->path.len) : Py_NewRef(Py_None);
    case F_QUERY: return s->parsed ? span_bytes(s, s->query) : PyBytes_FromStringAndSize("", 0);
    case F_LISTENER: return Py_NewRef(s->listener);
    case F_PEER: return PyUnicode_FromString(s->down ? stream_client(s) : "");
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
    case F_SCAN_LIMIT: return PyUnicode_FromString(limit_name(scan_limit(s->json_error)));
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
    case F_ASKS: return asks_of(s);
    case F_USAGE_SOURCE: return PyUnicode_FromString(usage_source(s));
    case F_CODE: return s->code ? Py_NewRef(s->code) : PyUnicode_FromString("");
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
    FACT("credential_digest", F_DIGEST), FACT("two_credentials", F_TWO), FACT("client_cert", F_CERTIFICATE),
    FACT("content_length", F_LENGTH), FACT("body_len", F_BODY_LEN), FACT("scan_error", F_SCAN_ERROR),
    FACT("scan_code", F_SCAN_CODE), FACT("model", F_MODEL), FACT("stream", F_STREAM), FACT("max_tokens", F_MAX_TOKENS),
    FACT("reject", F_REJECT), FACT("failure", F_FAILURE), FACT("upstream_status", F_UP_STATUS), FACT("reused", F_REUSED),
    FACT("attempts", F_ATTEMPTS), FACT("status", F_STATUS), FACT("committed", F_COMMITTED), FACT("outcome", F_OUTCOME),
    FACT("usage_in", F_USAGE_IN), FACT("usage_out", F_USAGE_OUT), FACT("finish", F_FINISH), FACT("bytes_in", F_BYTES_IN),
    FACT("bytes_out", F_BYTES_OUT), FACT("upstream", F_UPSTREAM), FACT("done", F_DONE), FACT("code", F_CODE),
    FACT("asks", F_ASKS), FACT("usage_source", F_USAGE_SOURCE), FACT("scan_limit", F_SCAN_LIMIT),
    {"body_limit", (getter)stream_get_limit, (setter)stream_set_limit, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef stream_members[] = {
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
    {"trip", (PyCFunction)stream_trip_named, METH_O, NULL},
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

