/* The module ascproxy._native: its types and constants. The contract is ascproxy/_native.pyi. */
#include "py_core.h"

#include "py_page.h"
#include "py_secret.h"
#include "py_tls.h"

static int add_constants(PyObject *module)
{
    static const struct {
        const char *name;
        int value;
    } scans[] = {{"SCAN_NONE", JSON_NONE}, {"SCAN_OPENAI", JSON_OPENAI}, {"SCAN_MESSAGES", JSON_MESSAGES},
                 {"SCAN_RESPONSES", JSON_RESPONSES}, {"SCAN_TGI", JSON_TGI}, {"METER_CELLS", METER_CELLS},
                 {"METER_N_BUCKETS", METER_N_BUCKETS}};
    for (size_t i = 0; i < sizeof scans / sizeof scans[0]; i++)
        if (PyModule_AddIntConstant(module, scans[i].name, scans[i].value) < 0)
            return -1;
    static const uint32_t statuses[] = METER_STATUSES, gateway[] = METER_BOUNDS_GATEWAY, latency[] = METER_BOUNDS_LATENCY;
    static const struct {
        const char *name;
        const uint32_t *values;
        size_t n;
    } tuples[] = {{"METER_STATUSES", statuses, sizeof statuses / sizeof *statuses},
                  {"METER_BOUNDS_GATEWAY", gateway, sizeof gateway / sizeof *gateway},
                  {"METER_BOUNDS_LATENCY", latency, sizeof latency / sizeof *latency}};
    for (size_t i = 0; i < sizeof tuples / sizeof tuples[0]; i++) {
        PyObject *tuple = PyTuple_New((Py_ssize_t)tuples[i].n);
        if (tuple == NULL)
            return -1;
        for (size_t k = 0; k < tuples[i].n; k++)
            PyTuple_SET_ITEM(tuple, (Py_ssize_t)k, PyLong_FromUnsignedLong(tuples[i].values[k]));
        if (PyModule_AddObjectRef(module, tuples[i].name, tuple) < 0) {
            Py_DECREF(tuple);
            return -1;
        }
        Py_DECREF(tuple);
    }
    PyObject *limits = PyTuple_New(LIMIT_COUNT - 1);
    for (int i = 1; limits != NULL && i < LIMIT_COUNT; i++) {
        PyObject *name = PyUnicode_FromString(limit_name((enum asc_limit)i));
        if (name == NULL)
            Py_CLEAR(limits);
        else
            PyTuple_SET_ITEM(limits, i - 1, name);
    }
    int named = limits ? PyModule_AddObjectRef(module, "LIMIT_NAMES", limits) : -1;
    Py_XDECREF(limits);
    if (named < 0)
        return -1;
    PyObject *offsets = Py_BuildValue("{s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i}", "status", METER_STATUS, "gateway", METER_GATEWAY,
                                      "first_token", METER_FIRST_TOKEN, "between_tokens", METER_BETWEEN_TOKENS, "request",
                                      METER_REQUEST, "tokens_in", METER_TOKENS_IN, "tokens_out", METER_TOKENS_OUT, "sums", METER_SUMS);
    int added = offsets ? PyModule_AddObjectRef(module, "METER_OFFSETS", offsets) : -1;
    Py_XDECREF(offsets);
    return added;
}

static int exec_module(PyObject *module)
{
    PyTypeObject *types[] = {&Core_Type, &Listener_Type, &Plan_Type, &Names_Type, &Stream_Type, &Upstream_Type};
    if (PyType_Ready(&Downstream_Type) < 0 || PyType_Ready(&Acceptor_Type) < 0)
        return -1;
    for (size_t i = 0; i < sizeof types / sizeof types[0]; i++)
        if (PyModule_AddType(module, types[i]) < 0)
            return -1;
    if (asc_add_tls_types(module) < 0 || asc_add_secret_types(module) < 0 || asc_add_page_types(module) < 0)
        return -1;
    return add_constants(module);
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, exec_module}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "ascproxy._native",
    .m_doc = "The native data path of ascproxy.",
    .m_size = 0,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__native(void)
{
    return PyModuleDef_Init(&definition);
}
