/* SecretArena, Secret and SecretError of the module: handles to values (secret.h) that Python cannot read. */
#ifndef ASC_PY_SECRET_H
#define ASC_PY_SECRET_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>
#include <stddef.h>

/* Add the types to the module. 0, or -1 with an exception set. */
int asc_add_secret_types(PyObject *module);

/* The value of a Secret, valid while the object lives. False, without an exception, for any other object, and in a
 * child that was forked after the secret was made. */
bool asc_secret_bytes(PyObject *secret, const char **bytes, size_t *len);

#endif
