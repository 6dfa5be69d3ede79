/* The turns of the data path: one epoll descriptor for its connections and listening sockets, inside uvloop's own loop.
 *
 * The loop of libuv knows none of our descriptors. Just before it would block, its prepare hook calls us, and we block in
 * its place, on our descriptors and on its own (a backend descriptor is itself pollable); we return as soon as it has work:
 * a descriptor, a timer, a callback that Python asked for. So bytes cost neither uvloop nor the interpreter anything, and
 * all that is not the data path goes on as on any event loop. libuv documents each function used here for embedding
 * (uv_backend_fd, uv_backend_timeout); they are looked up in the library that uvloop brings.
 */
#include "py_core.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define EVENTS 256
#define BURST_MAX 64u /* connections accepted in one turn on one socket */
#define UV_IDLE 6     /* enum uv_handle_type, part of libuv's ABI since 1.0 */
#define UV_PREPARE 9
#define HANDLE_OFFSET 16u /* keeps the alignment of malloc */

typedef void (*uv_hook)(void *handle);

typedef struct asc_loop {
    Core *core; /* borrowed: it detaches before it goes */
    void *loop; /* uv_loop_t */
    void *prepare, *idle;
    PyObject *owner; /* the event loop, kept alive */
    int closed;      /* handles whose close has come through */
    int (*backend_timeout)(const void *loop);
    void (*update_time)(void *loop);
    int (*idle_start)(void *handle, uv_hook hook);
    int (*idle_stop)(void *handle);
    void (*close)(void *handle, uv_hook hook);
} asc_loop;

/* ---- listening ---------------------------------------------------------------------------------------------------- */

struct Acceptor {
    PyObject_HEAD
    Core *core;
    Listener *listener;
    Acceptor *next, *prev;
    int fd;
    unsigned burst; /* as many are accepted in a turn as came lately: nobody pays for a call that finds none */
    bool asleep;    /* no descriptor was left: tried again at the next tick */
};

static bool watch_acceptor(Acceptor *a)
{
    return loop_watch(a->core, a->fd, a, EPOLLIN | EPOLLEXCLUSIVE);
}

static void accept_burst(Acceptor *a)
{
    for (unsigned i = 0; i < a->burst && a->fd >= 0; i++) {
        struct sockaddr_storage peer;
        socklen_t len = sizeof peer;
        int fd = accept4(a->fd, (struct sockaddr *)&peer, &len, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd >= 0) {
            down_accept(a->core, a->listener, fd, &peer);
            continue;
        }
        if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
            /* the event would come again and again */
            (void)epoll_ctl(a->core->epoll, EPOLL_CTL_DEL, a->fd, NULL);
            a->asleep = true;
            core_trip(a->core, LIMIT_MAX_CONNECTIONS);
        }
        if (errno != ECONNABORTED && errno != EINTR) {
            a->burst = a->burst > 1 ? a->burst / 2 : 1;
            return;
        }
    }
    a->burst = a->burst < BURST_MAX ? a->burst * 2 : BURST_MAX;
}

static PyObject *acceptor_close(Acceptor *a, PyObject *unused)
{
    (void)unused;
    if (a->fd >= 0) {
        if (a->prev != NULL)
            a->prev->next = a->next;
        else
            a->core->acceptors = a->next;
        if (a->next != NULL)
            a->next->prev = a->prev;
        if (!a->asleep)
            (void)epoll_ctl(a->core->epoll, EPOLL_CTL_DEL, a->fd, NULL);
        (void)close(a->fd);
        a->fd = -1;
        Py_DECREF(a); /* the core's */
    }
    Py_RETURN_NONE;
}

static void acceptor_dealloc(Acceptor *a)
{
    Py_XDECREF(a->listener);
    Py_XDECREF(a->core);
    PyObject_Free(a);
}

static PyMethodDef acceptor_methods[] = {
    {"close", (PyCFunction)acceptor_close, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

PyTypeObject Acceptor_Type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "ascproxy._native.Acceptor",
    .tp_basicsize = sizeof(Acceptor),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_doc = "Accepts connections on one listening socket.",
    .tp_dealloc = (destructor)acceptor_dealloc,
    .tp_methods = acceptor_methods,
};

PyObject *loop_listen(Core *core, PyObject *args)
{
    PyObject *listener;
    int fd;
    if (!PyArg_ParseTuple(args, "O!i", &Listener_Type, &listener, &fd))
        return NULL;
    /* a copy: other workers and the supervisor keep theirs */
    int own = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    if (own < 0 || fcntl(own, F_SETFL, fcntl(own, F_GETFL) | O_NONBLOCK) < 0) {
        if (own >= 0)
            (void)close(own);
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    /* Accepted sockets inherit both. A reader that never reads costs 64 KiB of unsent bytes in the kernel instead of megabytes. */
    int on = 1, low_water = 65536;
    (void)setsockopt(own, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    (void)setsockopt(own, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &low_water, sizeof low_water);
    Acceptor *a = PyObject_New(Acceptor, &Acceptor_Type);
    if (a == NULL) {
        (void)close(own);
        return NULL;
    }
    memset((char *)a + sizeof(PyObject), 0, sizeof *a - sizeof(PyObject));
    a->core = (Core *)Py_NewRef(core);
    a->listener = (Listener *)Py_NewRef(listener);
    a->fd = own;
    a->burst = 1;
    if (!watch_acceptor(a)) {
        (void)close(own);
        Py_DECREF(a);
        return NULL;
    }
    a->next = core->acceptors;
    if (a->next != NULL)
        a->next->prev = a;
    core->acceptors = a;
    return Py_NewRef(a); /* the core's, until close */
}

void loop_wake_acceptors(Core *core)
{
    for (Acceptor *a = core->acceptors; a != NULL; a = a->next)
        if (a->asleep) {
            a->asleep = !watch_acceptor(a);
            PyErr_Clear();
        }
}

/* ---- the turn ----------------------------------------------------------------------------------------------------- */

bool loop_watch(Core *core, int fd, void *owner, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.ptr = owner};
    if (epoll_ctl(core->epoll, EPOLL_CTL_ADD, fd, &event) == 0)
        return true;
    PyErr_SetFromErrno(PyExc_OSError);
    return false;
}

void loop_read_again(Conn *c)
{
    if (c->queued)
        return;
    c->queued = true;
    c->prev_ready = NULL;
    c->next_ready = c->core->ready;
    if (c->next_ready != NULL)
        c->next_ready->prev_ready = c;
    c->core->ready = c;
}

void loop_forget(Conn *c)
{
    if (!c->queued)
        return;
    c->queued = false;
    if (c->prev_ready != NULL)
        c->prev_ready->next_ready = c->next_ready;
    else
        c->core->ready = c->next_ready;
    if (c->next_ready != NULL)
        c->next_ready->prev_ready = c->prev_ready;
}

static void let_go(Core *core)
{
    while (core->lost != NULL) {
        Conn *c = core->lost;
        core->lost = c->next_lost;
        conn_let_go(c);
    }
}

/* What is left of earlier turns: each connection once, those that still have more afterwards wait for the next turn. */
static void read_ready(Core *core)
{
    unsigned n = 0;
    for (Conn *c = core->ready; c != NULL; c = c->next_ready)
        n++;
    Conn *last = core->ready;
    while (last != NULL && last->next_ready != NULL)
        last = last->next_ready;
    while (n-- && last != NULL) { /* from the end: new ones come at the front */
        Conn *c = last;
        last = c->prev_ready;
        loop_forget(c);
        if (c->fd >= 0 && c->readable && !c->read_paused)
            conn_read(c);
    }
}

/* True if the event loop's own descriptor is among the events. */
static bool turn(Core *core, const struct epoll_event *events, int n)
{
    bool theirs = false;
    if (core->ready != NULL)
        read_ready(core);
    for (int i = 0; i < n; i++) {
        PyObject *owner = events[i].data.ptr;
        if (owner == NULL)
            theirs = true;
        else if (Py_IS_TYPE(owner, &Acceptor_Type))
            accept_burst((Acceptor *)owner);
        else
            conn_event((Conn *)owner, events[i].events);
    }
    do { /* what is sent may end a connection, and an end may be somebody's answer */
        core_flush(core);
        let_go(core);
    } while (core->dirty != NULL || core->lost != NULL);
    return theirs;
}

static void on_idle(void *handle)
{
    (void)handle; /* that it is active keeps libuv from blocking */
}

/* Our handles stand behind a pointer to their owner. Their own data, with which a handle begins, stays NULL: a loop that
 * is closed without detaching then reports handles that are not its own, instead of taking that for an object. */
static asc_loop *owner_of(void *handle)
{
    return *(asc_loop **)(void *)((char *)handle - HANDLE_OFFSET);
}

static void *new_handle(asc_loop *l, size_t size)
{
    char *bytes = calloc(1, HANDLE_OFFSET + size);
    if (bytes == NULL)
        return NULL;
    *(asc_loop **)(void *)bytes = l;
    return bytes + HANDLE_OFFSET;
}

static void free_handle(void *handle)
{
    if (handle != NULL)
        free((char *)handle - HANDLE_OFFSET);
}

/* libuv is about to block. It holds no GIL. */
static void on_prepare(void *handle)
{
    asc_loop *l = owner_of(handle);
    Core *core = l->core;
    struct epoll_event events[EVENTS];
    (void)l->idle_stop(l->idle);
    for (;;) {
        l->update_time(l->loop);
        int timeout = l->backend_timeout(l->loop); /* 0 as well when descriptors wait to be registered */
        bool left = core->ready != NULL || core->lost != NULL || core->dirty != NULL;
        int n = epoll_wait(core->epoll, events, EVENTS, left ? 0 : timeout);
        bool theirs = timeout == 0 || (n <= 0 && !left);
        if (n > 0 || left) {
            PyGILState_STATE state = PyGILState_Ensure();
            theirs |= turn(core, events, n > 0 ? n : 0);
            PyGILState_Release(state);
        }
        if (theirs) {
            (void)l->idle_start(l->idle, on_idle);
            return;
        }
    }
}

/* ---- attaching ---------------------------------------------------------------------------------------------------- */

static void *symbol(void *library, const char *name, bool *missing)
{
    void *found = dlsym(library, name);
    *missing |= found == NULL;
    return found;
}

static void on_closed(void *handle)
{
    asc_loop *l = owner_of(handle);
    if (++l->closed < 2)
        return;
    free_handle(l->prepare);
    free_handle(l->idle);
    PyGILState_STATE state = PyGILState_Ensure();
    Py_DECREF(l->owner);
    PyGILState_Release(state);
    free(l);
}

/* The library that uvloop brings, and its uv_loop_t. */
static void *find_loop(PyObject *loop, void **library)
{
    void *found = NULL;
    PyObject *module = PyImport_ImportModule("uvloop.loop"), *file = NULL, *capsule = NULL;
    if (module != NULL && (file = PyObject_GetAttrString(module, "__file__")) != NULL &&
        (capsule = PyObject_CallMethod(module, "libuv_get_loop_t_ptr", "O", loop)) != NULL) {
        const char *path = PyUnicode_AsUTF8(file);
        found = PyCapsule_GetPointer(capsule, NULL);
        *library = path == NULL ? NULL : dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
        if (*library == NULL && !PyErr_Occurred())
            PyErr_SetString(PyExc_RuntimeError, "uvloop's library is not loaded");
    }
    Py_XDECREF(capsule);
    Py_XDECREF(file);
    Py_XDECREF(module);
    return PyErr_Occurred() ? NULL : found;
}

PyObject *loop_attach(Core *core, PyObject *loop)
{
    if (core->loop != NULL) {
        PyErr_SetString(PyExc_RuntimeError, "this core is attached already");
        return NULL;
    }
    void *library = NULL;
    void *uv = find_loop(loop, &library);
    if (uv == NULL)
        return NULL;
    bool missing = false;
    asc_loop *l = calloc(1, sizeof *l);
    if (l == NULL)
        return PyErr_NoMemory();
    int (*backend_fd)(const void *);
    size_t (*handle_size)(int);
    int (*prepare_init)(void *, void *), (*prepare_start)(void *, uv_hook), (*idle_init)(void *, void *);
    void (*unref)(void *);
    /* POSIX lets dlsym give functions, ISO C wants them stored through a pointer to an object */
    *(void **)&l->backend_timeout = symbol(library, "uv_backend_timeout", &missing);
    *(void **)&l->update_time = symbol(library, "uv_update_time", &missing);
    *(void **)&l->idle_start = symbol(library, "uv_idle_start", &missing);
    *(void **)&l->idle_stop = symbol(library, "uv_idle_stop", &missing);
    *(void **)&l->close = symbol(library, "uv_close", &missing);
    *(void **)&backend_fd = symbol(library, "uv_backend_fd", &missing);
    *(void **)&handle_size = symbol(library, "uv_handle_size", &missing);
    *(void **)&prepare_init = symbol(library, "uv_prepare_init", &missing);
    *(void **)&prepare_start = symbol(library, "uv_prepare_start", &missing);
    *(void **)&idle_init = symbol(library, "uv_idle_init", &missing);
    *(void **)&unref = symbol(library, "uv_unref", &missing);
    (void)dlclose(library); /* the module keeps it loaded */
    if (missing) {
        free(l);
        PyErr_SetString(PyExc_RuntimeError, "this build of uvloop does not export libuv's functions: install uvloop's own wheel");
        return NULL;
    }
    l->prepare = new_handle(l, handle_size(UV_PREPARE));
    l->idle = new_handle(l, handle_size(UV_IDLE));
    if (l->prepare == NULL || l->idle == NULL || !loop_watch(core, backend_fd(uv), NULL, EPOLLIN)) {
        free_handle(l->prepare);
        free_handle(l->idle);
        free(l);
        return PyErr_Occurred() ? NULL : PyErr_NoMemory();
    }
    l->core = core;
    l->loop = uv;
    l->owner = Py_NewRef(loop);
    (void)prepare_init(uv, l->prepare);
    (void)idle_init(uv, l->idle);
    (void)prepare_start(l->prepare, on_prepare);
    unref(l->prepare); /* they keep no loop running */
    unref(l->idle);
    core->loop = l;
    Py_RETURN_NONE;
}

/* To be called before the loop is closed, while it can turn once more: libuv closes handles in a turn. */
PyObject *loop_detach(Core *core, PyObject *unused)
{
    (void)unused;
    asc_loop *l = core->loop;
    while (core->acceptors != NULL)
        Py_DECREF(acceptor_close(core->acceptors, NULL));
    for (Downstream *d = core->downs; d != NULL; d = d->next)
        conn_abort(&d->conn);
    let_go(core);
    core_flush(core);
    if (l != NULL) {
        core->loop = NULL;
        l->close(l->prepare, on_closed);
        l->close(l->idle, on_closed);
    }
    Py_RETURN_NONE;
}

bool loop_open(Core *core)
{
    core->epoll = epoll_create1(EPOLL_CLOEXEC);
    if (core->epoll < 0)
        PyErr_SetFromErrno(PyExc_OSError);
    return core->epoll >= 0;
}

void loop_free(Core *core)
{
    if (core->loop != NULL)
        Py_XDECREF(loop_detach(core, NULL));
    if (core->epoll >= 0)
        (void)close(core->epoll);
}
