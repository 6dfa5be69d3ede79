/* Certificates as Python objects. */
#include "py_certificate.h"

#include <arpa/inet.h>
#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/x509v3.h>

#include "tls_files.h"
#include "writer.h"

/* Of a client's names, in the access line: the rest is in the certificate that the fingerprint names. */
enum { LINE_NAMES = 4, LINE_TEXT = 256, LINE_MAX_LEN = 8192 };

static PyTypeObject *client_type; /* made once with the module */

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

static PyObject *text_of(const char *prefix, const ASN1_STRING *string)
{
    PyObject *text = PyUnicode_DecodeUTF8((const char *)ASN1_STRING_get0_data(string), ASN1_STRING_length(string), "replace");
    PyObject *named = text != NULL ? PyUnicode_FromFormat("%s%U", prefix, text) : NULL;
    Py_XDECREF(text);
    return named;
}

static PyObject *address_of(const char *prefix, const ASN1_OCTET_STRING *address)
{
    char text[INET6_ADDRSTRLEN];
    int len = ASN1_STRING_length(address);
    if ((len != 4 && len != 16) ||
        inet_ntop(len == 4 ? AF_INET : AF_INET6, ASN1_STRING_get0_data(address), text, sizeof text) == NULL)
        return Py_NewRef(Py_None);
    return PyUnicode_FromFormat("%s%s", prefix, text);
}

/* A name of a certificate; None for a kind that nobody here asks for. Kinds are told apart where they could be mixed up. */
static PyObject *name_of(const GENERAL_NAME *general, bool kinds)
{
    switch (general->type) {
    case GEN_DNS:
        return text_of(kinds ? "DNS:" : "", general->d.dNSName);
    case GEN_IPADD:
        return address_of(kinds ? "IP:" : "", general->d.iPAddress);
    case GEN_EMAIL:
        return kinds ? text_of("email:", general->d.rfc822Name) : Py_NewRef(Py_None);
    case GEN_URI:
        return kinds ? text_of("URI:", general->d.uniformResourceIdentifier) : Py_NewRef(Py_None);
    default:
        return Py_NewRef(Py_None);
    }
}

/* Names of the subjectAltName, as a tuple: DNS names and IP addresses; with `kinds` also URIs and addresses of mail, and
 * each behind its kind. */
static PyObject *alternative_names(X509 *certificate, bool kinds)
{
    PyObject *names = PyList_New(0);
    GENERAL_NAMES *all = X509_get_ext_d2i(certificate, NID_subject_alt_name, NULL, NULL);
    for (int i = 0; names != NULL && all != NULL && i < sk_GENERAL_NAME_num(all); i++) {
        PyObject *name = name_of(sk_GENERAL_NAME_value(all, i), kinds);
        if (name == NULL || (name != Py_None && PyList_Append(names, name) < 0))
            Py_CLEAR(names);
        Py_XDECREF(name);
    }
    GENERAL_NAMES_free(all);
    ERR_clear_error();
    PyObject *tuple = names != NULL ? PyList_AsTuple(names) : NULL;
    Py_XDECREF(names);
    return tuple;
}

static bool facts_of(X509 *certificate, tls_certificate_facts *facts, char hex[65])
{
    if (!tls_certificate_read(certificate, facts)) {
        PyErr_SetString(PyExc_ValueError, "the certificate's dates cannot be decoded");
        return false;
    }
    for (size_t i = 0; i < sizeof facts->sha256; i++)
        snprintf(hex + 2 * i, 3, "%02x", facts->sha256[i]);
    return true;
}

PyObject *asc_certificate_info(X509 *certificate)
{
    tls_certificate_facts facts;
    char hex[65];
    if (!facts_of(certificate, &facts, hex))
        return NULL;
    PyObject *subject = subject_text(certificate);
    PyObject *names = subject != NULL ? alternative_names(certificate, false) : NULL;
    if (names == NULL) {
        Py_XDECREF(subject);
        return NULL;
    }
    return Py_BuildValue("{s:N,s:N,s:L,s:L,s:s}", "subject", subject, "names", names, "not_before_unix",
                         (long long)facts.not_before, "not_after_unix", (long long)facts.not_after,
                         "fingerprint_sha256", hex);
}

static bool put_text(asc_writer *w, PyObject *text)
{
    Py_ssize_t len;
    const char *utf8 = PyUnicode_AsUTF8AndSize(text, &len);
    if (utf8 == NULL)
        return false;
    put_literal(w, "\"");
    put_json(w, utf8, len < LINE_TEXT ? (size_t)len : LINE_TEXT);
    put_literal(w, "\"");
    return true;
}

static PyObject *line_of(PyObject *subject, PyObject *names, const char *hex)
{
    char text[LINE_MAX_LEN]; /* six bytes a byte at most: (1 + LINE_NAMES) * LINE_TEXT * 6 and some */
    asc_writer w = {.at = text, .end = text + sizeof text};
    put_literal(&w, "\"client_cert\":{\"subject\":");
    if (!put_text(&w, subject))
        return NULL;
    put_literal(&w, ",\"names\":[");
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(names) && i < LINE_NAMES; i++) {
        if (i > 0)
            put_literal(&w, ",");
        if (!put_text(&w, PyTuple_GET_ITEM(names, i)))
            return NULL;
    }
    put_literal(&w, "],\"sha256\":\"");
    put(&w, hex, 64);
    put_literal(&w, "\"}");
    return PyBytes_FromStringAndSize(text, w.at - text);
}

bool asc_client_certificate(X509 *certificate, PyObject **identity, PyObject **line)
{
    tls_certificate_facts facts;
    char hex[65];
    *identity = *line = NULL;
    if (!facts_of(certificate, &facts, hex))
        return false;
    PyObject *parts[] = {subject_text(certificate), alternative_names(certificate, true), PyUnicode_FromString(hex),
                         PyLong_FromLongLong(facts.not_after)};
    const Py_ssize_t n = sizeof parts / sizeof parts[0];
    PyObject *made = PyStructSequence_New(client_type);
    bool fine = made != NULL;
    for (Py_ssize_t i = 0; i < n; i++)
        fine = fine && parts[i] != NULL;
    PyObject *text = fine ? line_of(parts[0], parts[1], hex) : NULL;
    for (Py_ssize_t i = 0; i < n; i++)
        if (text != NULL)
            PyStructSequence_SET_ITEM(made, i, parts[i]);
        else
            Py_XDECREF(parts[i]);
    if (text == NULL) {
        Py_XDECREF(made);
        return false;
    }
    *identity = made;
    *line = text;
    return true;
}

bool asc_add_certificate_types(PyObject *module)
{
    static PyStructSequence_Field fields[] = {
        {"subject", "RFC 2253 text"},
        {"names", "of the subjectAltName: DNS:, IP:, URI: and email: before each"},
        {"fingerprint_sha256", "of the DER, hexadecimal"},
        {"not_after_unix", "seconds since 1970"},
        {NULL, NULL},
    };
    static PyStructSequence_Desc desc = {"ascproxy._native.ClientCertificate", "Who a client is by its certificate.", fields,
                                         4};
    if (client_type == NULL)
        client_type = PyStructSequence_NewType(&desc);
    return client_type != NULL && PyModule_AddObjectRef(module, "ClientCertificate", (PyObject *)client_type) == 0;
}
