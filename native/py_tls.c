/* TlsContext: an OpenSSL context made from files by tls_context.c. */
#include "py_tls.h"

#include <arpa/inet.h>
#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/x509v3.h>
#include <string.h>

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

static PyObject *make_server(PyObject *Py_UNUSED(none), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"certificate", "key", "client_ca", "client_required", "alpn", "minimum", NULL};
    PyObject *alpn = NULL;
    const char *minimum = "1.2";
    int required = 1;
    tls_files files = {0};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$sszpOs:server", names, &files.certificate, &files.key, &files.ca,
                                     &required, &alpn, &minimum))
        return NULL;
    if (files.certificate == NULL || files.key == NULL)
        return PyErr_Format(PyExc_TypeError, "server() needs certificate and key");
    if (strcmp(minimum, "1.2") != 0 && strcmp(minimum, "1.3") != 0)
        return PyErr_Format(PyExc_ValueError, "minimum is \"1.2\" or \"1.3\"");
    files.client_required = required;
    files.tls13_only = strcmp(minimum, "1.3") == 0;
    return make(&ContextType, &files, alpn, true);
}

static PyObject *make_client(PyObject *Py_UNUSED(none), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"ca", "certificate", "key", "alpn", NULL};
    PyObject *alpn = NULL;
    tls_files files = {0};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$zzzO:client", names, &files.ca, &files.certificate, &files.key,
                                     &alpn))
        return NULL;
    if ((files.certificate == NULL) != (files.key == NULL))
        return PyErr_Format(PyExc_TypeError, "client() needs both certificate and key, or neither");
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

/* -- certificate_info ---------------------------------------------------------------------------------------------- */

static PyObject *subject_text(X509 *certificate)
{
    BIO *bio = BIO_new(BIO_s_mem());
    if (bio == NULL)
        return PyErr_NoMemory();
    X509_NAME_print_ex(bio, X509_get_subject_name(certificate), 0, XN_FLAG_RFC2253 & ~ASN1_STRFLGS_ESC_MSB);
    char *text;
    long len = BIO_get_mem_data(bio, &text);
    PyObject *subject = PyUnicode_DecodeUTF8(text, len, "replace");
    BIO_free(bio);
    ERR_clear_error();
    return subject;
}

static int append_name(PyObject *names, const GENERAL_NAME *general)
{
    PyObject *name = NULL;
    if (general->type == GEN_DNS) {
        const ASN1_IA5STRING *dns = general->d.dNSName;
        name = PyUnicode_DecodeASCII((const char *)ASN1_STRING_get0_data(dns), ASN1_STRING_length(dns), "replace");
    } else if (general->type == GEN_IPADD) {
        const ASN1_OCTET_STRING *address = general->d.iPAddress;
        char text[INET6_ADDRSTRLEN];
        int family = ASN1_STRING_length(address) == 4 ? AF_INET : AF_INET6;
        if (ASN1_STRING_length(address) != 4 && ASN1_STRING_length(address) != 16)
            return 0;
        if (inet_ntop(family, ASN1_STRING_get0_data(address), text, sizeof text) == NULL)
            return 0;
        name = PyUnicode_FromString(text);
    } else {
        return 0;
    }
    int result = name != NULL ? PyList_Append(names, name) : -1;
    Py_XDECREF(name);
    return result;
}

/* DNS names and IP addresses of the subjectAltName, as a tuple. */
static PyObject *alternative_names(X509 *certificate)
{
    PyObject *names = PyList_New(0);
    GENERAL_NAMES *all = X509_get_ext_d2i(certificate, NID_subject_alt_name, NULL, NULL);
    for (int i = 0; names != NULL && all != NULL && i < sk_GENERAL_NAME_num(all); i++)
        if (append_name(names, sk_GENERAL_NAME_value(all, i)) < 0)
            Py_CLEAR(names);
    GENERAL_NAMES_free(all);
    ERR_clear_error();
    PyObject *tuple = names != NULL ? PyList_AsTuple(names) : NULL;
    Py_XDECREF(names);
    return tuple;
}

static PyObject *certificate_info(ContextObject *self, void *Py_UNUSED(closure))
{
    X509 *certificate = SSL_CTX_get0_certificate(self->context);
    if (certificate == NULL)
        Py_RETURN_NONE;
    tls_certificate_facts facts;
    if (!tls_certificate_read(certificate, &facts))
        return PyErr_Format(tls_error, "the certificate's dates cannot be decoded");
    char hex[2 * sizeof facts.sha256 + 1];
    for (size_t i = 0; i < sizeof facts.sha256; i++)
        snprintf(hex + 2 * i, 3, "%02x", facts.sha256[i]);
    PyObject *subject = subject_text(certificate);
    PyObject *names = subject != NULL ? alternative_names(certificate) : NULL;
    if (names == NULL) {
        Py_XDECREF(subject);
        return NULL;
    }
    return Py_BuildValue("{s:N,s:N,s:L,s:L,s:s}", "subject", subject, "names", names, "not_before_unix",
                         (long long)facts.not_before, "not_after_unix", (long long)facts.not_after,
                         "fingerprint_sha256", hex);
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
    if (PyModule_AddObjectRef(module, "TlsError", tls_error) != 0)
        return -1;
    return PyModule_AddObjectRef(module, "TlsContext", (PyObject *)&ContextType);
}
