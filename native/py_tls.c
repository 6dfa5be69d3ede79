/* TlsContext: an OpenSSL context made from files by tls_context.c. */
#include "py_tls.h"

#include <string.h>

#include "py_certificate.h"
#include "tls_context.h"

typedef struct {
    PyObject_HEAD
    SSL_CTX *context;
    bool server;
} ContextObject;

static PyTypeObject ContextType;
static PyObject *tls_error; /* the exception class, made once */

/* Protocol names as they stand on the wire, in a new bytes object. */
static PyObject *alpn_wire(PyObject *names)
{
    if (!PyTuple_Check(names))
        return PyErr_Format(PyExc_TypeError, "alpn is a tuple of bytes");
    PyObject *wire = PyBytes_FromStringAndSize(NULL, 0);
    for (Py_ssize_t i = 0; wire != NULL && i < PyTuple_GET_SIZE(names); i++) {
        PyObject *name = PyTuple_GET_ITEM(names, i);
        if (!PyBytes_Check(name) || PyBytes_GET_SIZE(name) < 1 || PyBytes_GET_SIZE(name) > 255) {
            PyErr_SetString(PyExc_ValueError, "an ALPN name has 1 to 255 bytes");
            Py_CLEAR(wire);
            break;
        }
        char len = (char)PyBytes_GET_SIZE(name);
        PyBytes_ConcatAndDel(&wire, PyBytes_FromStringAndSize(&len, 1));
        if (wire != NULL)
            PyBytes_Concat(&wire, name);
    }
    if (wire != NULL && PyBytes_GET_SIZE(wire) > 65535) { /* RFC 7301 3.1 */
        PyErr_SetString(PyExc_ValueError, "the ALPN names have more than 65535 bytes together");
        Py_CLEAR(wire);
    }
    return wire;
}

static PyObject *make(PyTypeObject *type, tls_files *files, PyObject *alpn, bool server)
{
    PyObject *wire = alpn != NULL ? alpn_wire(alpn) : PyBytes_FromString("\x08http/1.1");
    if (wire == NULL)
        return NULL;
    files->alpn = (const unsigned char *)PyBytes_AS_STRING(wire);
    files->alpn_len = (unsigned)PyBytes_GET_SIZE(wire);
    tls_problem problem = {""};
    SSL_CTX *context = server ? tls_context_server(files, &problem) : tls_context_client(files, &problem);
    Py_DECREF(wire);
    if (context == NULL) {
        /* A path may hold any bytes, and a sentence that was cut may end inside a character. */
        PyObject *sentence = PyUnicode_DecodeUTF8(problem.sentence, (Py_ssize_t)strlen(problem.sentence), "replace");
        if (sentence != NULL)
            PyErr_SetObject(tls_error, sentence);
        Py_XDECREF(sentence);
        return NULL;
    }
    ContextObject *self = (ContextObject *)type->tp_alloc(type, 0);
    if (self == NULL) {
        SSL_CTX_free(context);
        return NULL;
    }
    self->context = context;
    self->server = server;
    return (PyObject *)self;
}

/* Further pairs of paths behind the first; the texts stay the tuple's. False with an exception. */
static bool more_pairs(PyObject *more, tls_pair *pairs, size_t *n)
{
    if (more != NULL && !PyTuple_Check(more)) {
        PyErr_SetString(PyExc_TypeError, "more is a tuple of pairs: certificate and key");
        return false;
    }
    for (Py_ssize_t i = 0; more != NULL && i < PyTuple_GET_SIZE(more); i++) {
        if (*n == TLS_IDENTITIES_MAX) {
            PyErr_Format(PyExc_ValueError, "at most %d certificates", TLS_IDENTITIES_MAX);
            return false;
        }
        PyObject *pair = PyTuple_GET_ITEM(more, i);
        if (!PyTuple_Check(pair)) {
            PyErr_SetString(PyExc_TypeError, "more is a tuple of pairs: certificate and key");
            return false;
        }
        if (!PyArg_ParseTuple(pair, "ss", &pairs[*n].certificate, &pairs[*n].key))
            return false;
        ++*n;
    }
    return true;
}

static PyObject *make_server(PyObject *Py_UNUSED(none), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"certificate", "key", "more", "client_ca", "client_crl", "client_required", "client_depth",
                            "alpn", "minimum", "ticket_keys", NULL};
    PyObject *alpn = NULL, *more = NULL;
    const char *minimum = "1.2";
    int required = 1;
    tls_pair pairs[TLS_IDENTITIES_MAX] = {{NULL, NULL}};
    tls_files files = {.pairs = pairs, .n_pairs = 1};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$ssOzzpiOsz:server", names, &pairs[0].certificate, &pairs[0].key, &more,
                                     &files.ca, &files.crl, &required, &files.client_depth, &alpn, &minimum,
                                     &files.tickets))
        return NULL;
    if (pairs[0].certificate == NULL || pairs[0].key == NULL)
        return PyErr_Format(PyExc_TypeError, "server() needs certificate and key");
    if (strcmp(minimum, "1.2") != 0 && strcmp(minimum, "1.3") != 0)
        return PyErr_Format(PyExc_ValueError, "minimum is \"1.2\" or \"1.3\"");
    if (files.client_depth < 0 || files.client_depth > 100)
        return PyErr_Format(PyExc_ValueError, "client_depth is 0 to 100");
    if (files.crl != NULL && files.ca == NULL)
        return PyErr_Format(PyExc_ValueError, "client_crl needs client_ca");
    if (!more_pairs(more, pairs, &files.n_pairs))
        return NULL;
    files.client_required = required;
    files.tls13_only = strcmp(minimum, "1.3") == 0;
    return make(&ContextType, &files, alpn, true);
}

static PyObject *make_client(PyObject *Py_UNUSED(none), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"ca", "certificate", "key", "alpn", NULL};
    PyObject *alpn = NULL;
    tls_pair pair = {NULL, NULL};
    tls_files files = {.pairs = &pair};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$zzzO:client", names, &files.ca, &pair.certificate, &pair.key, &alpn))
        return NULL;
    if ((pair.certificate == NULL) != (pair.key == NULL))
        return PyErr_Format(PyExc_TypeError, "client() needs both certificate and key, or neither");
    files.n_pairs = pair.certificate != NULL;
    return make(&ContextType, &files, alpn, false);
}

static void context_dealloc(ContextObject *self)
{
    SSL_CTX_free(self->context);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *set_ticket_keys(ContextObject *self, PyObject *keys)
{
    unsigned char copied[TLS_TICKET_KEYS_MAX][TLS_TICKET_KEY];
    if (!self->server)
        return PyErr_Format(PyExc_ValueError, "only a server context has ticket keys");
    if (tls_context_tickets_from_file(self->context))
        return PyErr_Format(PyExc_ValueError, "its ticket keys come from a file");
    if (!PyTuple_Check(keys))
        return PyErr_Format(PyExc_TypeError, "ticket keys are a tuple of bytes");
    Py_ssize_t n = PyTuple_GET_SIZE(keys);
    if (n > TLS_TICKET_KEYS_MAX)
        return PyErr_Format(PyExc_ValueError, "at most %d ticket keys", TLS_TICKET_KEYS_MAX);
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *key = PyTuple_GET_ITEM(keys, i);
        if (!PyBytes_Check(key) || PyBytes_GET_SIZE(key) != TLS_TICKET_KEY) {
            explicit_bzero(copied, sizeof copied);
            return PyErr_Format(PyExc_ValueError, "a ticket key is %d bytes", TLS_TICKET_KEY);
        }
        memcpy(copied[i], PyBytes_AS_STRING(key), TLS_TICKET_KEY);
    }
    bool done = tls_context_tickets(self->context, (const unsigned char(*)[TLS_TICKET_KEY])copied, (size_t)n);
    explicit_bzero(copied, sizeof copied);
    if (!done)
        return PyErr_Format(PyExc_RuntimeError, "ticket keys cannot be set");
    Py_RETURN_NONE;
}

/* -- facts --------------------------------------------------------------------------------------------------------- */

static PyObject *certificate_info(ContextObject *self, void *Py_UNUSED(closure))
{
    X509 *certificate = tls_context_certificate(self->context);
    if (certificate == NULL)
        Py_RETURN_NONE;
    return asc_certificate_info(certificate);
}

static PyObject *file_dates(ContextObject *self, void *Py_UNUSED(closure))
{
    static const char *const kinds[] = {"server", "client_ca", "client_crl"};
    size_t n;
    const tls_file_date *dates = tls_context_dates(self->context, &n);
    PyObject *all = PyTuple_New((Py_ssize_t)n);
    for (size_t i = 0; all != NULL && i < n; i++) {
        PyObject *path = PyUnicode_DecodeFSDefault(dates[i].path);
        PyObject *one = path != NULL ? Py_BuildValue("(sNLL)", kinds[dates[i].kind], path, (long long)dates[i].since,
                                                       (long long)dates[i].until) : NULL;
        if (one == NULL)
            Py_CLEAR(all);
        else
            PyTuple_SET_ITEM(all, (Py_ssize_t)i, one);
    }
    return all;
}

static PyObject *tickets_from_file(ContextObject *self, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(self->server && tls_context_tickets_from_file(self->context));
}

/* -- the type ------------------------------------------------------------------------------------------------------ */

static PyMethodDef context_methods[] = {
    {"server", (PyCFunction)(void (*)(void))make_server, METH_VARARGS | METH_KEYWORDS | METH_STATIC,
     "A server's context from PEM files. Raises TlsError with a sentence that names the file."},
    {"client", (PyCFunction)(void (*)(void))make_client, METH_VARARGS | METH_KEYWORDS | METH_STATIC,
     "A client's context: ca is a PEM file, None the system's store. Raises TlsError."},
    {"set_ticket_keys", (PyCFunction)set_ticket_keys, METH_O,
     "Replace the ticket keys of a server, 80 bytes each; the first encrypts, all decrypt, none: no tickets."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef context_attributes[] = {
    {"certificate_info", (getter)certificate_info, NULL,
     "subject, names, not_before_unix, not_after_unix, fingerprint_sha256 of the own certificate; None without one.",
     NULL},
    {"ticket_keys_from_file", (getter)tickets_from_file, NULL, "Whether its ticket keys come from a file.", NULL},
    {"file_dates", (getter)file_dates, NULL,
     "(kind, path, since_unix, until_unix) of every file of a server: kind is server, client_ca or client_crl, until the earliest end "
     "of what is in it.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyTypeObject ContextType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "ascproxy._native.TlsContext",
    .tp_doc = "An OpenSSL context, never changed once made but for its ticket keys.",
    .tp_basicsize = sizeof(ContextObject),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_dealloc = (destructor)context_dealloc,
    .tp_methods = context_methods,
    .tp_getset = context_attributes,
};

SSL_CTX *asc_tls_context(PyObject *object)
{
    return Py_IS_TYPE(object, &ContextType) ? ((ContextObject *)object)->context : NULL;
}

bool asc_tls_is_server(PyObject *object)
{
    return Py_IS_TYPE(object, &ContextType) && ((ContextObject *)object)->server;
}

bool asc_tls_same_trust(PyObject *one, PyObject *other)
{
    if (one == Py_None || other == Py_None)
        return one == other;
    return tls_context_same_trust(asc_tls_context(one), asc_tls_context(other));
}

int asc_add_tls_types(PyObject *module)
{
    if (PyType_Ready(&ContextType) != 0)
        return -1;
    if (tls_error == NULL) {
        tls_error = PyErr_NewExceptionWithDoc("ascproxy._native.TlsError",
                                              "Certificates, keys or CA files that cannot be used: a sentence that "
                                              "names the file and says what to do.", NULL, NULL);
        if (tls_error == NULL)
            return -1;
    }
    if (!asc_add_certificate_types(module))
        return -1;
    if (PyModule_AddObjectRef(module, "TlsError", tls_error) != 0)
        return -1;
    return PyModule_AddObjectRef(module, "TlsContext", (PyObject *)&ContextType);
}
