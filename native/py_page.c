/* Page: a metric page (page.h) over a Python buffer, normally an mmap. The buffer is held for the life of the object,
 * so that the mapping cannot be closed under it. */
#include "py_page.h"

typedef struct {
    PyObject_HEAD
    asc_page page;
    Py_buffer buffer; /* buffer.obj == NULL: never opened */
} PageObject;

static PyTypeObject PageType;

static const struct {
    const char *name;
    unsigned cell;
} header_cells[] = {
    {"magic", PAGE_CELL_MAGIC},
    {"layout", PAGE_CELL_LAYOUT},
    {"directory_used", PAGE_CELL_DIRECTORY_USED},
    {"cells_used", PAGE_CELL_CELLS_USED},
    {"series_lost", PAGE_CELL_SERIES_LOST},
    {"slot", PAGE_CELL_SLOT},
    {"incarnation", PAGE_CELL_INCARNATION},
    {"pid", PAGE_CELL_PID},
    {"state", PAGE_CELL_STATE},
    {"restarts", PAGE_CELL_RESTARTS},
    {"heartbeat_ns", PAGE_CELL_HEARTBEAT_NS},
    {"revision", PAGE_CELL_REVISION},
    {"revision_failed", PAGE_CELL_REVISION_FAILED},
    {"in_flight", PAGE_CELL_IN_FLIGHT},
    {"connections", PAGE_CELL_CONNECTIONS},
    {"accepted", PAGE_CELL_ACCEPTED},
    {"upstream_busy", PAGE_CELL_UPSTREAM_BUSY},
    {"upstream_idle", PAGE_CELL_UPSTREAM_IDLE},
    {"upstream_opened", PAGE_CELL_UPSTREAM_OPENED},
    {"body_bytes", PAGE_CELL_BODY_BYTES},
    {"log_dropped", PAGE_CELL_LOG_DROPPED},
    {"paused", PAGE_CELL_PAUSED},
    {"tls_failed", PAGE_CELL_TLS_FAILED},
    {"listening", PAGE_CELL_LISTENING},
    {"memory", PAGE_CELL_MEMORY},
};

static PyObject *page_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"buffer", NULL};
    PyObject *source;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O:Page", names, &source))
        return NULL;
    PageObject *self = (PageObject *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    if (PyObject_GetBuffer(source, &self->buffer, PyBUF_SIMPLE) != 0) {
        self->buffer.obj = NULL;
        Py_DECREF(self);
        return NULL;
    }
    /* Preparing writes: a read-only buffer must hold a page already. */
    if (self->buffer.readonly &&
        (self->buffer.len < 8 || (uintptr_t)self->buffer.buf % 8 != 0 || *(const uint64_t *)self->buffer.buf == 0)) {
        PyErr_SetString(PyExc_ValueError, "not a metric page: the buffer is read-only and holds no page");
        Py_DECREF(self);
        return NULL;
    }
    if (!page_open(&self->page, self->buffer.buf, (size_t)self->buffer.len)) {
        PyErr_Format(PyExc_ValueError, "not a metric page of layout %u, or smaller than 64 KiB", PAGE_LAYOUT);
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static void page_dealloc(PageObject *self)
{
    if (self->buffer.obj != NULL)
        PyBuffer_Release(&self->buffer);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static bool writable(const PageObject *self)
{
    if (!self->buffer.readonly)
        return true;
    PyErr_SetString(PyExc_ValueError, "the page is mapped read-only");
    return false;
}

static PyObject *py_series(PageObject *self, PyObject *args)
{
    const char *key;
    Py_ssize_t key_len;
    unsigned int cells;
    if (!PyArg_ParseTuple(args, "y#I:series", &key, &key_len, &cells) || !writable(self))
        return NULL;
    return PyLong_FromUnsignedLong(page_series(&self->page, key, (size_t)key_len, cells));
}

/* Read (cell, value); a negative value is taken modulo 2^64, so that a gauge can be lowered by adding. */
static bool cell_and_value(PageObject *self, PyObject *args, uint32_t *cell, uint64_t *value)
{
    unsigned int at;
    PyObject *number;
    if (!PyArg_ParseTuple(args, "IO!", &at, &PyLong_Type, &number) || !writable(self))
        return false;
    *cell = at;
    *value = PyLong_AsUnsignedLongLongMask(number);
    return !PyErr_Occurred();
}

static PyObject *py_add(PageObject *self, PyObject *args)
{
    uint32_t cell;
    uint64_t n;
    if (!cell_and_value(self, args, &cell, &n))
        return NULL;
    page_add(&self->page, cell, n);
    Py_RETURN_NONE;
}

static PyObject *py_store(PageObject *self, PyObject *args)
{
    uint32_t cell;
    uint64_t value;
    if (!cell_and_value(self, args, &cell, &value))
        return NULL;
    page_store(&self->page, cell, value);
    Py_RETURN_NONE;
}

static PyObject *py_load(PageObject *self, PyObject *arg)
{
    unsigned long cell = PyLong_AsUnsignedLong(arg);
    if (cell == (unsigned long)-1 && PyErr_Occurred())
        return NULL;
    return PyLong_FromUnsignedLongLong(cell <= UINT32_MAX ? page_load(&self->page, (uint32_t)cell) : 0);
}

static PyObject *py_records(PageObject *self, PyObject *Py_UNUSED(ignored))
{
    PyObject *records = PyList_New(0);
    if (records == NULL)
        return NULL;
    size_t at = 0, key_len;
    const char *key;
    uint32_t first, cells;
    while (page_next(&self->page, &at, &key, &key_len, &first, &cells)) {
        PyObject *record = Py_BuildValue("(y#II)", key, (Py_ssize_t)key_len, first, cells);
        if (record == NULL || PyList_Append(records, record) != 0) {
            Py_XDECREF(record);
            Py_DECREF(records);
            return NULL;
        }
        Py_DECREF(record);
    }
    return records;
}

static PyMethodDef page_methods[] = {
    {"series", (PyCFunction)py_series, METH_VARARGS, "First cell of the series with that key, appended if new; 0: no room."},
    {"add", (PyCFunction)py_add, METH_VARARGS, "Add n to a cell; cell 0 and cells out of range are ignored."},
    {"store", (PyCFunction)py_store, METH_VARARGS, "Set a cell; cell 0 and cells out of range are ignored."},
    {"load", (PyCFunction)py_load, METH_O, "The value of a cell; 0 out of range."},
    {"records", (PyCFunction)py_records, METH_NOARGS, "(key, first cell, cells) of every series."},
    {NULL, NULL, 0, NULL},
};

static PyTypeObject PageType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "ascproxy._native.Page",
    .tp_doc = "A slot's metric page over a buffer; layout in native/page.h.",
    .tp_basicsize = sizeof(PageObject),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = page_new,
    .tp_dealloc = (destructor)page_dealloc,
    .tp_methods = page_methods,
};

asc_page *asc_page_of(PyObject *object)
{
    if (!Py_IS_TYPE(object, &PageType)) {
        PyErr_Format(PyExc_TypeError, "expected a Page, got %.100s", Py_TYPE(object)->tp_name);
        return NULL;
    }
    return writable((PageObject *)object) ? &((PageObject *)object)->page : NULL;
}

static PyObject *header_names(void)
{
    PyObject *names = PyDict_New();
    for (size_t i = 0; names != NULL && i < sizeof header_cells / sizeof header_cells[0]; i++) {
        PyObject *cell = PyLong_FromUnsignedLong(header_cells[i].cell);
        if (cell == NULL || PyDict_SetItemString(names, header_cells[i].name, cell) != 0)
            Py_CLEAR(names);
        Py_XDECREF(cell);
    }
    return names;
}

int asc_add_page_types(PyObject *module)
{
    if (PyType_Ready(&PageType) != 0)
        return -1;
    PyObject *names = header_names();
    if (names == NULL)
        return -1;
    int failed = PyDict_SetItemString(PageType.tp_dict, "CELLS", names);
    Py_DECREF(names);
    if (failed)
        return -1;
    PyType_Modified(&PageType);
    return PyModule_AddObjectRef(module, "Page", (PyObject *)&PageType);
}
