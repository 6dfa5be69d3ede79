/* SecretArena and Secret: values that Python holds and cannot read. */
#include "py_secret.h"

#include <string.h>

#include "secret.h"

typedef struct {
    PyObject_HEAD
    secret_arena *arena;
} ArenaObject;

typedef struct {
    PyObject_HEAD
    ArenaObject *home;
    char *bytes;
    size_t len;
} SecretObject;

static PyTypeObject ArenaType, SecretType;
static PyObject *secret_error; /* the exception class, made once */

static PyObject *raise_problem(const secret_problem *problem)
{
    PyObject *sentence = PyUnicode_DecodeUTF8(problem->sentence, (Py_ssize_t)strlen(problem->sentence), "replace");
    if (sentence != NULL)
        PyErr_SetObject(secret_error, sentence);
    Py_XDECREF(sentence);
    return NULL;
}

/* -- Secret -------------------------------------------------------------------------------------------------------- */

static PyObject *wrap(ArenaObject *home, char *bytes, size_t len)
{
    SecretObject *secret = PyObject_New(SecretObject, &SecretType);
    if (secret == NULL) {
        secret_free(home->arena, bytes);
        return NULL;
    }
    Py_INCREF(home);
    secret->home = home;
    secret->bytes = bytes;
    secret->len = len;
    return (PyObject *)secret;
}

static void secret_dealloc(SecretObject *self)
{
    secret_free(self->home->arena, self->bytes);
    Py_DECREF(self->home);
    PyObject_Free(self);
}

static PyObject *secret_repr(PyObject *Py_UNUSED(self))
{
    return PyUnicode_FromString("<Secret>");
}

static PyObject *secret_reduce(PyObject *Py_UNUSED(self), PyObject *Py_UNUSED(protocol))
{
    return PyErr_Format(PyExc_TypeError, "a Secret cannot be copied or pickled");
}

static PyMethodDef secret_methods[] = {
    {"__reduce_ex__", secret_reduce, METH_O, NULL},
    {"__reduce__", secret_reduce, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyTypeObject SecretType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "ascproxy._native.Secret",
    .tp_doc = "A value in the arena. Python cannot read it; it is wiped when the last reference goes.",
    .tp_basicsize = sizeof(SecretObject),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_dealloc = (destructor)secret_dealloc,
    .tp_repr = secret_repr,
    .tp_methods = secret_methods,
};

bool asc_secret_bytes(PyObject *secret, const char **bytes, size_t *len)
{
    if (!Py_IS_TYPE(secret, &SecretType))
        return false;
    const SecretObject *self = (SecretObject *)secret;
    if (!secret_arena_alive(self->home->arena))
        return false;
    *bytes = self->bytes;
    *len = self->len;
    return true;
}

/* -- SecretArena --------------------------------------------------------------------------------------------------- */

static PyObject *arena_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"size", NULL};
    Py_ssize_t size = 65536;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|n:SecretArena", names, &size))
        return NULL;
    if (size <= 0)
        return PyErr_Format(PyExc_ValueError, "the size of an arena is a positive number of bytes");
    ArenaObject *self = (ArenaObject *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->arena = secret_arena_new((size_t)size);
    if (self->arena == NULL) {
        PyErr_SetFromErrno(PyExc_OSError);
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static void arena_dealloc(ArenaObject *self)
{
    secret_arena_free(self->arena);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *arena_load(ArenaObject *self, PyObject *path)
{
    PyObject *encoded;
    if (!PyUnicode_FSConverter(path, &encoded)) /* refuses embedded NUL */
        return NULL;
    secret_problem problem = {""};
    size_t len = 0;
    char *bytes = secret_load(self->arena, PyBytes_AS_STRING(encoded), &len, &problem);
    Py_DECREF(encoded);
    return bytes != NULL ? wrap(self, bytes, len) : raise_problem(&problem);
}

static PyObject *arena_put(ArenaObject *self, PyObject *value)
{
    if (!PyByteArray_Check(value))
        return PyErr_Format(PyExc_TypeError, "put() takes a bytearray, which it wipes");
    size_t len = (size_t)PyByteArray_GET_SIZE(value);
    secret_problem problem = {""};
    char *bytes = secret_put(self->arena, PyByteArray_AS_STRING(value), len, &problem);
    explicit_bzero(PyByteArray_AS_STRING(value), len); /* a refused value too */
    return bytes != NULL ? wrap(self, bytes, len) : raise_problem(&problem);
}

static PyObject *arena_locked(ArenaObject *self, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(secret_arena_locked(self->arena));
}

static PyObject *arena_used(ArenaObject *self, void *Py_UNUSED(closure))
{
    return PyLong_FromSize_t(secret_arena_used(self->arena));
}

static PyMethodDef arena_methods[] = {
    {"load", (PyCFunction)arena_load, METH_O,
     "Read a file of 1 to 16384 visible ASCII characters, a last line end aside. Raises SecretError."},
    {"put", (PyCFunction)arena_put, METH_O, "Move the value of a bytearray here and wipe it. Raises SecretError."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef arena_attributes[] = {
    {"locked", (getter)arena_locked, NULL, "Whether the memory cannot be swapped out (RLIMIT_MEMLOCK).", NULL},
    {"used", (getter)arena_used, NULL, "Bytes in use, rounded up to 16 for each value.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyTypeObject ArenaType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "ascproxy._native.SecretArena",
    .tp_doc = "Locked, undumpable memory for credentials. Make it after fork: a child sees zeroes.",
    .tp_basicsize = sizeof(ArenaObject),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = arena_new,
    .tp_dealloc = (destructor)arena_dealloc,
    .tp_methods = arena_methods,
    .tp_getset = arena_attributes,
};

int asc_add_secret_types(PyObject *module)
{
    if (PyType_Ready(&SecretType) != 0 || PyType_Ready(&ArenaType) != 0)
        return -1;
    if (secret_error == NULL) {
        secret_error = PyErr_NewExceptionWithDoc("ascproxy._native.SecretError",
                                                 "A credential that cannot be used: a sentence that names the file "
                                                 "and says what to do, never the value.", NULL, NULL);
        if (secret_error == NULL)
            return -1;
    }
    if (PyModule_AddObjectRef(module, "SecretError", secret_error) != 0 ||
        PyModule_AddObjectRef(module, "Secret", (PyObject *)&SecretType) != 0)
        return -1;
    return PyModule_AddObjectRef(module, "SecretArena", (PyObject *)&ArenaType);
}
