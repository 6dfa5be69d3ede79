/* The immutable values of a revision that the core reads: Names, Plan, Listener. Built by Python when a revision is applied. */
#include "py_core.h"

#include "py_secret.h"
#include "py_tls.h"

#include <stddef.h>
#include <structmember.h>

/* ---- Names -------------------------------------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    asc_names *set;
} Names;

const asc_names *names_of(PyObject *names)
{
    return ((Names *)names)->set;
}

static PyObject *names_new_object(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keys[] = {"names", NULL};
    PyObject *names;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!", keys, &PyTuple_Type, &names))
        return NULL;
    Names *self = (Names *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->set = names_new();
    if (self->set == NULL) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(names); i++) {
        Py_ssize_t len;
        PyObject *item = PyTuple_GET_ITEM(names, i);
        const char *text = PyUnicode_Check(item) ? PyUnicode_AsUTF8AndSize(item, &len) : NULL;
        if (text == NULL || !names_add(self->set, text, (size_t)len)) {
            if (!PyErr_Occurred())
                PyErr_Format(PyExc_ValueError, "not a lower-case header name or pattern with one '*': %R", item);
            Py_DECREF(self);
            return NULL;
        }
    }
    return (PyObject *)self;
}

static void names_dealloc(Names *self)
{
    names_free(self->set);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static int names_contains(PyObject *self, PyObject *name)
{
    Py_ssize_t len;
    const char *text = PyUnicode_Check(name) ? PyUnicode_AsUTF8AndSize(name, &len) : NULL;
    if (text == NULL)
        return PyErr_Occurred() ? -1 : 0;
    return names_has(names_of(self), text, (size_t)len);
}

static PySequenceMethods names_sequence = {.sq_contains = names_contains};

PyTypeObject Names_Type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "ascproxy._native.Names",
    .tp_basicsize = sizeof(Names),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_doc = "A set of header names and patterns.",
    .tp_new = names_new_object,
    .tp_dealloc = (destructor)names_dealloc,
    .tp_as_sequence = &names_sequence,
};

/* ---- limits ------------------------------------------------------------------------------------------------------- */

enum unit { NANOSECONDS, PLAIN, U32 };

static const struct {
    const char *name;
    size_t at;
    enum unit unit;
} LIMITS[] = {
    {"tls_handshake_ms", offsetof(asc_limits, tls_handshake), NANOSECONDS},
    {"header_timeout_ms", offsetof(asc_limits, header_timeout), NANOSECONDS},
    {"idle_timeout_ms", offsetof(asc_limits, idle_timeout), NANOSECONDS},
    {"connection_age_ms", offsetof(asc_limits, connection_age), NANOSECONDS},
    {"connection_requests", offsetof(asc_limits, connection_requests), PLAIN},
    {"body_idle_ms", offsetof(asc_limits, body_idle), NANOSECONDS},
    {"body_min_rate", offsetof(asc_limits, body_min_rate), PLAIN},
    {"body_total_ms", offsetof(asc_limits, body_total), NANOSECONDS},
    {"write_stall_ms", offsetof(asc_limits, write_stall), NANOSECONDS},
    {"max_request_line", offsetof(asc_limits, head.max_line), U32},
    {"max_field", offsetof(asc_limits, head.max_field), U32},
    {"max_head", offsetof(asc_limits, head.max_head), U32},
    {"max_fields", offsetof(asc_limits, head.max_fields), U32},
    {"max_body", offsetof(asc_limits, max_body), PLAIN},
    {"max_bodies", offsetof(asc_limits, max_bodies), PLAIN},
    {"json_depth", offsetof(asc_limits, json.max_depth), U32},
    {"json_keys", offsetof(asc_limits, json.max_keys), U32},
    {"json_digits", offsetof(asc_limits, json.max_digits), U32},
    {"h2_streams", offsetof(asc_limits, h2.streams), U32},
    {"h2_stream_window", offsetof(asc_limits, h2.stream_window), U32},
    {"h2_connection_window", offsetof(asc_limits, h2.connection_window), U32},
    {"h2_frame", offsetof(asc_limits, h2.frame), U32},
    {"h2_table", offsetof(asc_limits, h2.table), U32},
    {"h2_resets", offsetof(asc_limits, h2.resets), U32},
    {"h2_resets_rate", offsetof(asc_limits, h2.resets_rate), U32},
    {"h2_continuations", offsetof(asc_limits, h2.continuations), U32},
    {"h2_settings", offsetof(asc_limits, h2.settings), U32},
    {"h2_settings_entries", offsetof(asc_limits, h2.settings_entries), U32},
    {"h2_pings", offsetof(asc_limits, h2.pings), U32},
    {"h2_priorities", offsetof(asc_limits, h2.priorities), U32},
    {"h2_empty_data", offsetof(asc_limits, h2.empty_data), U32},
    {"h2_glitches", offsetof(asc_limits, h2.glitches), U32},
    {"h2_glitches_rate", offsetof(asc_limits, h2.glitches_rate), U32},
    {"h2_queued", offsetof(asc_limits, h2.queued), U32},
    {"max_connections", offsetof(asc_limits, max_connections), PLAIN},
    {"max_connections_per_ip", offsetof(asc_limits, max_connections_per_ip), PLAIN},
    {"max_unauthenticated_per_ip", offsetof(asc_limits, max_unauthenticated_per_ip), PLAIN},
    {"max_chunk_extension", offsetof(asc_limits, chunk.max_extension), U32},
    {"max_chunk_extensions", offsetof(asc_limits, chunk.max_extensions), U32},
    {"max_trailers", offsetof(asc_limits, chunk.max_trailers), U32},
};

bool limits_from(asc_limits *limits, PyObject *dict)
{
    *limits = (asc_limits){0};
    for (size_t i = 0; i < sizeof LIMITS / sizeof LIMITS[0]; i++) {
        PyObject *value = PyDict_GetItemString(dict, LIMITS[i].name);
        unsigned long long number = value ? PyLong_AsUnsignedLongLong(value) : 0;
        if (value == NULL || PyErr_Occurred() || number > (1ull << 40) ||
            (LIMITS[i].unit == U32 && number > UINT32_MAX / 4)) {
            PyErr_Format(PyExc_ValueError, "limit %s: %s", LIMITS[i].name, value ? "not a number in range" : "missing");
            return false;
        }
        char *at = (char *)limits + LIMITS[i].at;
        if (LIMITS[i].unit == U32)
            *(uint32_t *)(void *)at = (uint32_t)number;
        else
            *(uint64_t *)(void *)at = LIMITS[i].unit == NANOSECONDS ? number * MS : number;
    }
    limits->h2.max_head = limits->head.max_head;
    limits->h2.max_fields = limits->head.max_fields;
    limits->h2.max_trailers = limits->chunk.max_trailers;
    /* Scratch buffers are sized for these; a configuration above them is a mistake that must not be silent. */
    if (limits->head.max_head > HEADS_MAX - 24576 || limits->head.max_fields > HTTP1_MAX_FIELDS) {
        PyErr_SetString(PyExc_ValueError, "limit max_head is at most 40960 bytes, max_fields at most 128");
        return false;
    }
    return true;
}

/* ---- Listener ----------------------------------------------------------------------------------------------------- */

static PyObject *listener_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keys[] = {"name", "tls", "limits", "proxy_protocol", "http2", NULL};
    PyObject *name = NULL, *tls = NULL, *limits = NULL;
    int proxy_protocol = 0, http2 = 1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$UOO!pp", keys, &name, &tls, &PyDict_Type, &limits, &proxy_protocol, &http2))
        return NULL;
    if (name == NULL || tls == NULL || limits == NULL) {
        PyErr_SetString(PyExc_TypeError, "Listener needs name, tls and limits");
        return NULL;
    }
    if (tls != Py_None && (asc_tls_context(tls) == NULL || !asc_tls_is_server(tls))) {
        PyErr_SetString(PyExc_TypeError, "tls is a server's TlsContext or None");
        return NULL;
    }
    Listener *self = (Listener *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->name = Py_NewRef(name);
    self->tls = Py_NewRef(tls);
    self->proxy_protocol = proxy_protocol;
    self->http2 = http2;
    if (!limits_from(&self->limits, limits)) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static void listener_dealloc(Listener *self)
{
    Py_XDECREF(self->name);
    Py_XDECREF(self->tls);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *listener_get_name(Listener *self, void *unused)
{
    (void)unused;
    return Py_NewRef(self->name);
}

static PyObject *listener_get_tls(Listener *self, void *unused)
{
    (void)unused;
    return Py_NewRef(self->tls);
}

static int listener_set_tls(Listener *self, PyObject *value, void *unused)
{
    (void)unused;
    /* A listener does not change between plaintext and TLS: that is another listener. */
    if (value == NULL || self->tls == Py_None || value == Py_None || asc_tls_context(value) == NULL || !asc_tls_is_server(value)) {
        PyErr_SetString(PyExc_TypeError, "tls is replaced by another TlsContext only");
        return -1;
    }
    if (!asc_tls_same_trust(self->tls, value))
        self->trust++;
    Py_SETREF(self->tls, Py_NewRef(value));
    return 0;
}

static PyObject *listener_take_refused(Listener *self, PyObject *unused)
{
    (void)unused;
    if (self->refused == 0)
        Py_RETURN_NONE;
    PyObject *found = Py_BuildValue("(Kss)", (unsigned long long)self->refused, self->refused_why, self->refused_peer);
    if (found != NULL)
        self->refused = 0;
    return found;
}

static PyMethodDef listener_methods[] = {
    {"take_refused", (PyCFunction)listener_take_refused, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef listener_getset[] = {
    {"name", (getter)listener_get_name, NULL, NULL, NULL},
    {"tls", (getter)listener_get_tls, (setter)listener_set_tls, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef listener_members[] = {
    {"http2", T_BOOL, offsetof(Listener, http2), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

PyTypeObject Listener_Type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "ascproxy._native.Listener",
    .tp_basicsize = sizeof(Listener),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_doc = "A listening address: its name, TLS context and limits.",
    .tp_methods = listener_methods,
    .tp_new = listener_new,
    .tp_dealloc = (destructor)listener_dealloc,
    .tp_members = listener_members,
    .tp_getset = listener_getset,
};

/* ---- Plan --------------------------------------------------------------------------------------------------------- */

static PyObject *json_string(PyObject *text)
{
    Py_ssize_t len;
    const char *bytes = PyUnicode_AsUTF8AndSize(text, &len);
    if (bytes == NULL)
        return NULL;
    if (len > JSON_MODEL_MAX) {
        PyErr_SetString(PyExc_ValueError, "model is longer than 256 bytes");
        return NULL;
    }
    char escaped[2 + 6 * JSON_MODEL_MAX];
    size_t at = 0;
    escaped[at++] = '"';
    for (Py_ssize_t i = 0; i < len; i++) {
        unsigned char c = (unsigned char)bytes[i];
        if (c == '"' || c == '\\') {
            escaped[at++] = '\\';
            escaped[at++] = (char)c;
        } else if (c < 0x20) {
            at += (size_t)snprintf(escaped + at, 7, "\\u%04x", c);
        } else {
            escaped[at++] = (char)c; /* UTF-8 passes as it is */
        }
    }
    escaped[at++] = '"';
    return PyBytes_FromStringAndSize(escaped, (Py_ssize_t)at);
}

/* A head must be whole field lines: one CR or LF too many would let a configuration split requests. */
static bool whole_lines(const char *bytes, Py_ssize_t len)
{
    if (len < 2 || bytes[len - 2] != '\r' || bytes[len - 1] != '\n')
        return false;
    for (Py_ssize_t i = 0; i < len; i++) {
        if (bytes[i] == '\0' || (bytes[i] == '\n' && (i == 0 || bytes[i - 1] != '\r')))
            return false;
        if (bytes[i] == '\r' && (i + 1 == len || bytes[i + 1] != '\n' || (i >= 2 && bytes[i - 1] == '\n')))
            return false;
    }
    return true;
}

/* The events that end a stream, by outcome. Each is a whole event: what it is sent between must stay one, too. */
static bool take_endings(Plan *plan, PyObject *endings)
{
    PyObject *name, *event;
    Py_ssize_t at = 0;
    while (PyDict_Next(endings, &at, &name, &event)) {
        const char *text = PyUnicode_Check(name) ? PyUnicode_AsUTF8(name) : NULL;
        int ending = 0;
        while (text != NULL && ending < N_ENDINGS && strcmp(text, ending_outcome(ending)) != 0)
            ending++;
        if (text == NULL || ending == N_ENDINGS || !PyBytes_Check(event) || PyBytes_GET_SIZE(event) < 2 ||
            PyBytes_GET_SIZE(event) > 4096 ||
            memcmp(PyBytes_AS_STRING(event) + PyBytes_GET_SIZE(event) - 2, "\n\n", 2) != 0) {
            if (!PyErr_Occurred())
                PyErr_SetString(PyExc_ValueError, "endings are whole events of at most 4 KiB by outcome");
            return false;
        }
        Py_XSETREF(plan->endings[ending], Py_NewRef(event));
    }
    return true;
}

static PyObject *plan_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keys[] = {"endpoint", "head", "request_headers", "response_headers", "secret", "secret_prefix", "model",
                           "scan", "first_byte_ms", "idle_ms", "total_ms", "block", "log", "ask", "strip", "endings", NULL};
    int endpoint = -1, scan = JSON_NONE, strip = 0;
    PyObject *ask = Py_None, *endings = NULL;
    PyObject *head = NULL, *request_headers = NULL, *response_headers = NULL, *secret = Py_None, *secret_prefix = NULL, *model = Py_None, *log = NULL;
    unsigned long long first_byte = 300000, idle = 120000, total = 3600000;
    unsigned int block = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$iSO!O!OSOiKKKISOpO!", keys, &endpoint, &head, &Names_Type, &request_headers,
                                     &Names_Type, &response_headers, &secret, &secret_prefix, &model, &scan, &first_byte,
                                     &idle, &total, &block, &log, &ask, &strip, &PyDict_Type, &endings))
        return NULL;
    const char *bytes;
    size_t len;
    if (endpoint < 0 || head == NULL || request_headers == NULL || response_headers == NULL) {
        PyErr_SetString(PyExc_TypeError, "Plan needs endpoint, head, request_headers and response_headers");
        return NULL;
    }
    if (!whole_lines(PyBytes_AS_STRING(head), PyBytes_GET_SIZE(head)) || PyBytes_GET_SIZE(head) > 16384) {
        PyErr_SetString(PyExc_ValueError, "head is at most 16 KiB of lines that each end with CRLF, without the empty line");
        return NULL;
    }
    if (secret != Py_None && !asc_secret_bytes(secret, &bytes, &len)) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "secret is a Secret or None");
        return NULL;
    }
    if (scan < JSON_NONE || scan > JSON_TGI || (secret_prefix && PyBytes_GET_SIZE(secret_prefix) > 256)) {
        PyErr_SetString(PyExc_ValueError, "scan is one of SCAN_*; secret_prefix is at most 256 bytes");
        return NULL;
    }
    if (ask != Py_None && !(PyBytes_Check(ask) && PyBytes_GET_SIZE(ask) > 0 && PyBytes_GET_SIZE(ask) <= 256)) {
        PyErr_SetString(PyExc_ValueError, "ask is None or 1 to 256 bytes of JSON members");
        return NULL;
    }
    PyObject *model_json = NULL;
    if (model != Py_None) {
        model_json = PyUnicode_Check(model) ? json_string(model) : NULL;
        if (model_json == NULL) {
            if (!PyErr_Occurred())
                PyErr_SetString(PyExc_TypeError, "model is a str or None");
            return NULL;
        }
    }
    Plan *self = (Plan *)type->tp_alloc(type, 0);
    if (self == NULL) {
        Py_XDECREF(model_json);
        return NULL;
    }
    self->endpoint = endpoint;
    self->head = Py_NewRef(head);
    self->request_headers = Py_NewRef(request_headers);
    self->response_headers = Py_NewRef(response_headers);
    self->secret = secret == Py_None ? NULL : Py_NewRef(secret);
    self->secret_prefix = secret_prefix ? Py_NewRef(secret_prefix) : PyBytes_FromStringAndSize("", 0);
    self->model = model_json;
    self->log = log ? Py_NewRef(log) : PyBytes_FromStringAndSize("", 0);
    self->scan = (uint8_t)scan;
    self->first_byte_ns = first_byte * MS;
    self->idle_ns = idle * MS;
    self->total_ns = total * MS;
    self->block = block;
    self->strip = strip;
    if (ask != Py_None)
        self->ask = PyBytes_FromFormat("\"stream_options\":{%s},", PyBytes_AS_STRING(ask));
    if (self->secret_prefix == NULL || self->log == NULL || (ask != Py_None && self->ask == NULL) ||
        (endings != NULL && !take_endings(self, endings))) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static void plan_dealloc(Plan *self)
{
    Py_XDECREF(self->head);
    Py_XDECREF(self->request_headers);
    Py_XDECREF(self->response_headers);
    Py_XDECREF(self->secret);
    Py_XDECREF(self->secret_prefix);
    Py_XDECREF(self->model);
    Py_XDECREF(self->log);
    Py_XDECREF(self->ask);
    for (int i = 0; i < N_ENDINGS; i++)
        Py_XDECREF(self->endings[i]);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *plan_get_endpoint(Plan *self, void *unused)
{
    (void)unused;
    return PyLong_FromLong(self->endpoint);
}

static PyGetSetDef plan_getset[] = {
    {"endpoint", (getter)plan_get_endpoint, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyTypeObject Plan_Type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "ascproxy._native.Plan",
    .tp_basicsize = sizeof(Plan),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_doc = "How to ask one endpoint for one operation.",
    .tp_new = plan_new,
    .tp_dealloc = (destructor)plan_dealloc,
    .tp_getset = plan_getset,
};
