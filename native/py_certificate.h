/* What Python sees of a certificate: the facts of our own, the identity of a client's. */
#ifndef ASC_PY_CERTIFICATE_H
#define ASC_PY_CERTIFICATE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <openssl/x509.h>
#include <stdbool.h>

/* Add ClientCertificate to the module. False with an exception set. */
bool asc_add_certificate_types(PyObject *module);

/* subject, names, not_before_unix, not_after_unix, fingerprint_sha256 of a certificate, as a dict. */
PyObject *asc_certificate_info(X509 *certificate);

/* A client's certificate as a ClientCertificate, and as the member of the access line that tells of it (bytes, without an
 * outer comma). False with an exception set. */
bool asc_client_certificate(X509 *certificate, PyObject **identity, PyObject **line);

#endif
