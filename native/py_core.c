/* Core: what the connections of one worker share, and the tick that drives their deadlines. */
#include "py_core.h"

#include "py_page.h"
#include "py_tls.h"

#include <sys/random.h>
#include <time.h>

/* ---- small things ------------------------------------------------------------------------------------------------- */

/* xorshift128+ (Vigna, 2014), seeded from the kernel in each process: request ids and jitter, nothing secret. */
uint64_t core_random(Core *core)
{
    uint64_t a = core->random[0], b = core->random[1];
    core->random[0] = b;
    a ^= a << 23;
    core->random[1] = a ^ b ^ (a >> 18) ^ (b >> 5);
    return core->random[1] + b;
}

/* The Date field's value, rebuilt once a second; also the time for logs. */
const char *core_date(Core *core, const char **stamp, unsigned *millis)
{
    struct timespec t;
    clock_gettime(CLOCK_REALTIME_COARSE, &t);
    if ((uint64_t)t.tv_sec != core->date_second) {
        static const char days[] = "SunMonTueWedThuFriSat", months[] = "JanFebMarAprMayJunJulAugSepOctNovDec";
        struct tm tm;
        core->date_second = (uint64_t)t.tv_sec;
        gmtime_r(&t.tv_sec, &tm);
        snprintf(core->date, sizeof core->date, "%.3s, %02u %.3s %04u %02u:%02u:%02u GMT", days + 3 * tm.tm_wday,
                 (unsigned)tm.tm_mday % 100, months + 3 * tm.tm_mon, (unsigned)(tm.tm_year + 1900) % 10000,
                 (unsigned)tm.tm_hour % 100, (unsigned)tm.tm_min % 100, (unsigned)tm.tm_sec % 100);
        snprintf(core->stamp, sizeof core->stamp, "%04u-%02u-%02uT%02u:%02u:%02u", (unsigned)(tm.tm_year + 1900) % 10000,
                 (unsigned)(tm.tm_mon + 1) % 100, (unsigned)tm.tm_mday % 100, (unsigned)tm.tm_hour % 100,
                 (unsigned)tm.tm_min % 100, (unsigned)tm.tm_sec % 100);
    }
    if (stamp != NULL)
        *stamp = core->stamp;
    if (millis != NULL)
        *millis = (unsigned)(t.tv_nsec / 1000000);
    return core->date;
}

/* Scanners are kept: most requests use the one that the last request used. */
json_request *core_take_scan(Core *core)
{
    if (core->n_scans)
        return core->scans[--core->n_scans];
    return json_request_new();
}

void core_put_scan(Core *core, json_request *scan)
{
    if (core->n_scans < sizeof core->scans / sizeof core->scans[0])
        core->scans[core->n_scans++] = scan;
    else
        json_request_free(scan);
}

/* A bytes object for paths, methods and models, which are few and come again and again: the same object as last time,
 * so that neither memory nor a hash is spent. A direct-mapped table: what collides replaces, so callers cannot grow it. */
PyObject *core_text(Core *core, const char *bytes, size_t len)
{
    if (len == 0 || len > TEXT_MAX)
        return PyBytes_FromStringAndSize(bytes, (Py_ssize_t)len);
    uint64_t tail = 0; /* where names differ: their ends */
    memcpy(&tail, bytes + (len > sizeof tail ? len - sizeof tail : 0), len < sizeof tail ? len : sizeof tail);
    size_t slot = ((tail ^ len) * 0x9e3779b97f4a7c15ull) >> 32 & (TEXTS - 1);
    PyObject *known = core->texts[slot];
    if (known != NULL && (size_t)PyBytes_GET_SIZE(known) == len && memcmp(PyBytes_AS_STRING(known), bytes, len) == 0)
        return Py_NewRef(known);
    PyObject *text = PyBytes_FromStringAndSize(bytes, (Py_ssize_t)len);
    if (text != NULL)
        Py_XSETREF(core->texts[slot], Py_NewRef(text));
    return text;
}

/* Memory of a Stream: that of an earlier one if there is any. Uninitialised but for its object header. */
Stream *core_take_stream(Core *core)
{
    Stream *s = core->spare_streams;
    if (s == NULL)
        return PyObject_New(Stream, &Stream_Type);
    core->spare_streams = (Stream *)(void *)s->core;
    core->n_spare_streams--;
    return (Stream *)PyObject_Init((PyObject *)s, &Stream_Type);
}

void core_put_stream(Core *core, Stream *s)
{
    if (core->n_spare_streams >= KEPT) {
        PyObject_Free(s);
        return;
    }
    s->core = (Core *)(void *)core->spare_streams;
    core->spare_streams = s;
    core->n_spare_streams++;
}

/* What one read brings, with the room around it that relaying in place needs. */
static char *room_for(size_t len)
{
    char *bytes = calloc(1, HEADROOM + len + TAILROOM);
    return bytes == NULL ? NULL : bytes + HEADROOM;
}

static void free_room(char *bytes)
{
    if (bytes != NULL)
        free(bytes - HEADROOM);
}

/* ---- Core --------------------------------------------------------------------------------------------------------- */

/* A cell for each limit, found by its key like every series (telemetry/metrics.py). */
static void find_trips(Core *core)
{
    char key[64] = "limits";
    for (int i = LIMIT_NONE + 1; i < LIMIT_COUNT; i++) {
        const char *name = limit_name((enum asc_limit)i);
        size_t len = strlen(name);
        memcpy(key + sizeof "limits", name, len);
        core->trips[i] = page_series(core->page, key, sizeof "limits" + len, 1);
    }
}

/* Loopback, and `networks`: tuples of an address of 16 bytes and a number of bits. */
static bool find_exempt(Core *core, PyObject *networks)
{
    static const asc_network loopback[] = {
        {{[10] = 0xff, [11] = 0xff, [12] = 127}, 104}, /* 127.0.0.0/8 */
        {{[15] = 1}, 128},                             /* ::1 */
    };
    Py_ssize_t n = networks == NULL ? 0 : PyTuple_GET_SIZE(networks);
    core->exempt = malloc(sizeof loopback + (size_t)n * sizeof *core->exempt);
    if (core->exempt == NULL) {
        PyErr_NoMemory();
        return false;
    }
    memcpy(core->exempt, loopback, sizeof loopback);
    _Static_assert(sizeof loopback / sizeof loopback[0] == N_LOOPBACK, "what is not loopback is trusted");
    core->n_exempt = N_LOOPBACK;
    for (Py_ssize_t i = 0; i < n; i++) {
        const char *bytes;
        Py_ssize_t len;
        unsigned char bits;
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(networks, i), "y#b", &bytes, &len, &bits))
            return false;
        if (len != 16 || bits > 128) {
            PyErr_SetString(PyExc_ValueError, "trusted_peers: an address of 16 bytes and at most 128 bits");
            return false;
        }
        memcpy(core->exempt[core->n_exempt].address, bytes, 16);
        core->exempt[core->n_exempt++].bits = bits;
    }
    return true;
}

#define REMEMBERED 1024u /* addresses without a connection that have authenticated */

static bool make_peers(Core *core)
{
    uint64_t seed[2]; /* not from core->random, whose numbers callers see */
    if (getrandom(seed, sizeof seed, 0) != (ssize_t)sizeof seed) {
        PyErr_SetFromErrno(PyExc_OSError);
        return false;
    }
    uint64_t most = core->limits.max_connections;
    core->peers = peers_new((uint32_t)(most < (1u << 24) ? most : 1u << 24) + REMEMBERED, seed);
    if (core->peers == NULL)
        PyErr_NoMemory();
    return core->peers != NULL;
}

static PyObject *core_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keys[] = {"walk", "page", "limits", "trusted_peers", NULL};
    PyObject *walk = NULL, *page = NULL, *limits = NULL, *trusted = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$OOO!O!", keys, &walk, &page, &PyDict_Type, &limits, &PyTuple_Type,
                                     &trusted))
        return NULL;
    if (walk == NULL || page == NULL || limits == NULL) {
        PyErr_SetString(PyExc_TypeError, "Core needs walk, page and limits");
        return NULL;
    }
    asc_page *cells = asc_page_of(page);
    if (cells == NULL) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "page is a Page");
        return NULL;
    }
    Core *core = (Core *)type->tp_alloc(type, 0);
    if (core == NULL)
        return NULL;
    core->page_object = Py_NewRef(page);
    core->page = cells;
    core->access_log = true;
    core->epoll = -1;
    core->output.max = 1u << 20;
    wheel_init(&core->wheel, asc_now());
    struct {
        const char *name;
        PyObject **at;
    } methods[] = {{"on_head", &core->on_head}, {"on_request", &core->on_request}, {"on_reject", &core->on_reject},
                   {"on_response", &core->on_response}, {"on_settle", &core->on_settle}};
    for (size_t i = 0; i < sizeof methods / sizeof methods[0]; i++) {
        *methods[i].at = PyObject_GetAttrString(walk, methods[i].name);
        if (*methods[i].at == NULL)
            goto failed;
    }
    if (!limits_from(&core->limits, limits) || !find_exempt(core, trusted) || !make_peers(core))
        goto failed;
    find_trips(core);
    if (!loop_open(core))
        goto failed;
    core->down_bytes = room_for(DOWN_READ);
    core->up_bytes = room_for(UP_READ);
    core->cipher_bytes = room_for(UP_READ);
    core->plain = malloc(DOWN_READ);
    core->heads = malloc(HEADS_MAX);
    core->transmit = malloc(UP_READ);
    core->log = malloc(LOG_MAX);
    core->sha256 = EVP_MD_fetch(NULL, "SHA256", NULL);
    core->digest = EVP_MD_CTX_new();
    if (core->down_bytes == NULL || core->up_bytes == NULL || core->cipher_bytes == NULL || core->plain == NULL ||
        core->heads == NULL || core->transmit == NULL || core->log == NULL || core->sha256 == NULL || core->digest == NULL) {
        if (!PyErr_Occurred())
            PyErr_NoMemory();
        goto failed;
    }
    while (core->random[0] == 0 || core->random[1] == 0)
        if (getrandom(core->random, sizeof core->random, 0) != (ssize_t)sizeof core->random) {
            PyErr_SetFromErrno(PyExc_OSError);
            goto failed;
        }
    return (PyObject *)core;
failed:
    Py_DECREF(core);
    return NULL;
}

static void core_dealloc(Core *core)
{
    Py_XDECREF(core->on_head);
    Py_XDECREF(core->on_request);
    Py_XDECREF(core->on_reject);
    Py_XDECREF(core->on_response);
    Py_XDECREF(core->on_settle);
    Py_XDECREF(core->page_object);
    free_room(core->down_bytes);
    free_room(core->up_bytes);
    free_room(core->cipher_bytes);
    loop_free(core); /* no connection is left: each holds its core */
    peers_free(core->peers);
    free(core->exempt);
    free(core->plain);
    free(core->heads);
    free(core->transmit);
    free(core->log);
    free(core->output.bytes);
    while (core->n_scans)
        json_request_free(core->scans[--core->n_scans]);
    while (core->n_spare_outs)
        free(core->spare_outs[--core->n_spare_outs]);
    while (core->n_spare_bodies)
        free(core->spare_bodies[--core->n_spare_bodies]);
    while (core->spare_streams != NULL) {
        Stream *s = core->spare_streams;
        core->spare_streams = (Stream *)(void *)s->core;
        PyObject_Free(s);
    }
    for (unsigned i = 0; i < TEXTS; i++)
        Py_XDECREF(core->texts[i]);
    EVP_MD_CTX_free(core->digest);
    EVP_MD_free(core->sha256);
    Py_TYPE(core)->tp_free((PyObject *)core);
}

/* ---- connections -------------------------------------------------------------------------------------------------- */

static PyObject *core_connect(Core *core, PyObject *args)
{
    int fd, endpoint;
    PyObject *tls, *server_name, *ready;
    if (!PyArg_ParseTuple(args, "iiOUO", &fd, &endpoint, &tls, &server_name, &ready))
        return NULL;
    if (tls != Py_None && (asc_tls_context(tls) == NULL || asc_tls_is_server(tls))) {
        PyErr_SetString(PyExc_TypeError, "tls is a client's TlsContext or None");
        return NULL;
    }
    return up_open(core, fd, endpoint, tls, server_name, ready);
}

/* ---- time --------------------------------------------------------------------------------------------------------- */

void core_cut_drained(Core *core, Stream *s, uint64_t now)
{
    bool stream = s->json_done && s->json.stream == 1;
    if (now >= (stream ? core->drain_stream_ns : core->drain_unary_ns)) {
        stream_cut(s, END_DRAINING);
    }
}

static PyObject *core_tick(Core *core, PyObject *argument)
{
    unsigned long long now = PyLong_AsUnsignedLongLong(argument);
    if (PyErr_Occurred())
        return NULL;
    wheel_timer *timer;
    while ((timer = wheel_due(&core->wheel, now)) != NULL) {
        PyObject *owner = timer->owner;
        Conn *c = timer->owner;
        if (c->lost)
            continue;
        if (c->fd < 0)
            conn_due(c);
        else if (Py_IS_TYPE(owner, &Downstream_Type))
            down_due((Downstream *)owner, now);
        else
            up_due((Upstream *)owner, now);
    }
    loop_wake_acceptors(core);
    for (Downstream *d = core->draining ? core->downs : NULL, *next; d != NULL; d = next) {
        Py_INCREF(d);
        if (d->stream != NULL)
            core_cut_drained(core, d->stream, now);
        if (d->frames != NULL)
            frames_drained(d, now);
        next = d->next; /* connections are let go at the end of a turn, never inside these calls */
        Py_DECREF(d);
    }
    const asc_page *page = core->page;
    page_store(page, PAGE_CELL_HEARTBEAT_NS, now);
    page_store(page, PAGE_CELL_IN_FLIGHT, core->n_in_flight);
    page_store(page, PAGE_CELL_CONNECTIONS, core->n_downs);
    page_store(page, PAGE_CELL_UPSTREAM_BUSY, core->n_busy);
    page_store(page, PAGE_CELL_UPSTREAM_IDLE, core->n_idle);
    page_store(page, PAGE_CELL_BODY_BYTES, core->body_bytes);
    page_store(page, PAGE_CELL_PAUSED, core->n_paused);
    Py_RETURN_NONE;
}

static PyObject *core_drain(Core *core, PyObject *args)
{
    unsigned long long unary, stream, idle = 0;
    if (!PyArg_ParseTuple(args, "KK|K", &unary, &stream, &idle))
        return NULL;
    uint64_t now = asc_now();
    core->draining = true;
    core->drain_unary_ns = unary;
    core->drain_stream_ns = stream;
    core->drain_idle_ns = idle;
    for (Downstream *d = core->downs, *next; d != NULL; d = next) {
        Py_INCREF(d);
        down_draining(d, now);
        next = d->next;
        Py_DECREF(d);
    }
    Py_RETURN_NONE;
}

static PyObject *core_take_log(Core *core, PyObject *unused)
{
    (void)unused;
    PyObject *lines = PyBytes_FromStringAndSize(core->log, (Py_ssize_t)core->log_len);
    if (lines != NULL)
        core->log_len = 0;
    return lines;
}

static PyObject *core_count(Core *core, void *which)
{
    return PyLong_FromUnsignedLongLong(*(uint64_t *)(void *)((char *)core + (size_t)which));
}

static PyObject *core_get_access(Core *core, void *unused)
{
    (void)unused;
    return PyBool_FromLong(core->access_log);
}

static int core_set_access(Core *core, PyObject *value, void *unused)
{
    (void)unused;
    int on = value ? PyObject_IsTrue(value) : -1;
    if (on < 0) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "access_log is a bool");
        return -1;
    }
    core->access_log = on;
    return 0;
}

static PyObject *core_get_overload(Core *core, void *unused)
{
    (void)unused;
    return PyLong_FromLong(core->overload);
}

static int core_set_overload(Core *core, PyObject *value, void *unused)
{
    (void)unused;
    long step = value ? PyLong_AsLong(value) : -1;
    if (step < OVERLOAD_NONE || step > OVERLOAD_NO_ACCEPT) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_ValueError, "overload is a step from 0 to 3");
        return -1;
    }
    if (step == OVERLOAD_NO_ACCEPT && core->overload != step)
        core_trip(core, LIMIT_MEMORY_ACCEPT);
    core->overload = (uint8_t)step;
    return 0;
}

static PyGetSetDef core_getset[] = {
    {"in_flight", (getter)core_count, NULL, NULL, (void *)offsetof(Core, n_in_flight)},
    {"connections", (getter)core_count, NULL, NULL, (void *)offsetof(Core, n_downs)},
    {"paused", (getter)core_count, NULL, NULL, (void *)offsetof(Core, n_paused)},
    {"busy", (getter)core_count, NULL, NULL, (void *)offsetof(Core, n_busy)},
    {"idle", (getter)core_count, NULL, NULL, (void *)offsetof(Core, n_idle)},
    {"body_bytes", (getter)core_count, NULL, NULL, (void *)offsetof(Core, body_bytes)},
    {"calls", (getter)core_count, NULL, NULL, (void *)offsetof(Core, calls)},
    {"overload", (getter)core_get_overload, (setter)core_set_overload, NULL, NULL},
    {"access_log", (getter)core_get_access, (setter)core_set_access, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMethodDef core_methods[] = {
    {"attach", (PyCFunction)loop_attach, METH_O, NULL},
    {"detach", (PyCFunction)loop_detach, METH_NOARGS, NULL},
    {"listen", (PyCFunction)loop_listen, METH_VARARGS, NULL},
    {"connect", (PyCFunction)core_connect, METH_VARARGS, NULL},
    {"tick", (PyCFunction)core_tick, METH_O, NULL},
    {"drain", (PyCFunction)core_drain, METH_VARARGS, NULL},
    {"take_log", (PyCFunction)core_take_log, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

PyTypeObject Core_Type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "ascproxy._native.Core",
    .tp_basicsize = sizeof(Core),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_doc = "The data path of one worker.",
    .tp_new = core_new,
    .tp_dealloc = (destructor)core_dealloc,
    .tp_methods = core_methods,
    .tp_getset = core_getset,
};
