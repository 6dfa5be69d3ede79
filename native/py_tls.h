/* TlsContext and TlsError of the module: OpenSSL contexts (tls_context.h) as immutable objects. */
#ifndef ASC_PY_TLS_H
#define ASC_PY_TLS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <openssl/ssl.h>
#include <stdbool.h>

/* Add TlsContext and TlsError to the module. 0, or -1 with an exception set. */
int asc_add_tls_types(PyObject *module);

/* The context of a TlsContext, borrowed (connections made from it hold it themselves); NULL, without an exception, for
 * any other object. */
SSL_CTX *asc_tls_context(PyObject *object);

/* Whether the object is a TlsContext made by TlsContext.server: only that may stand behind a listener. */
bool asc_tls_is_server(PyObject *object);

/* Whether two objects, TlsContext of servers or None, let in the same clients. */
bool asc_tls_same_trust(PyObject *one, PyObject *other);

#endif
