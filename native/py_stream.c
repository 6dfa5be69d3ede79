/* One exchange: a request, the walk's decision, and the answer on its way back.
 *
 *   BODY -> DECIDING -> WAIT -> HOLD -> RELAY -> FLUSH -> DONE     (a failure before RELAY goes back to DECIDING)
 *             |                +---------^ ^
 *             +---------- respond ---------+
 *
 * The walk is called at the arrows, never per chunk. `respond` and `forward` may be called while the walk is on the
 * stack or later from its task; settling waits until the walk has returned, so that on_settle is always the last call.
 */
#include "py_core.h"

static void settle(Stream *s);
static void cancel_task(Stream *s);

/* ---- the walk ----------------------------------------------------------------------------------------------------- */

static void internal_error(Stream *s)
{
    if (s->phase == PHASE_DONE)
        return;
    if (s->phase > PHASE_DECIDING || s->reject[0] != '\0') { /* too late for an answer, or refusing failed as well */
        stream_gone(s, "internal_error");
        return;
    }
    stream_reject(s, "internal_error");
}

void stream_walk(Stream *s, PyObject *method)
{
    Py_INCREF(s);
    s->core->calls++;
    s->in_walk++;
    PyObject *done = PyObject_CallOneArg(method, (PyObject *)s);
    s->in_walk--;
    bool raised = done == NULL;
    if (raised)
        PyErr_WriteUnraisable(method);
    Py_XDECREF(done);
    bool undecided = s->phase == PHASE_DECIDING && s->task == NULL && method != s->core->on_settle;
    if ((raised && !s->finished && s->phase <= PHASE_DECIDING && method != s->core->on_settle) || undecided)
        internal_error(s);
    else if (s->finished && s->in_walk == 0 && s->phase == PHASE_FLUSH)
        stream_flushed(s);
    Py_DECREF(s);
}

/* No request follows on its connection. One of HTTP/2 goes on: only the stream ends. */
void stream_last(Stream *s)
{
    if (s->down != NULL && !s->h2.id)
        s->down->last = true;
}

/* End what the client sees in broken framing: `reset` for an answer whose end is the connection's. */
void stream_break(Stream *s, bool reset)
{
    if (!s->h2.id) /* else the stream is reset when it settles */
        down_cut(s->down, reset);
}

/* The core cannot serve this request: the walk finds the words. */
void stream_reject(Stream *s, const char *code)
{
    s->reject = code;
    stream_last(s);
    if (s->phase == PHASE_BODY)
        s->phase = PHASE_DECIDING;
    stream_walk(s, s->core->on_reject);
}

/* ---- how it ends -------------------------------------------------------------------------------------------------- */

/* The upstream let us down (its connection is closed or closing). Before the answer began the walk may choose another;
 * after it the client must see that the answer is not whole. */
void stream_failed(Stream *s, const char *failure)
{
    Py_INCREF(s);
    if (s->up != NULL) {
        s->up->reusable = false;
        up_release(s);
    }
    if (s->phase == PHASE_WAIT || s->phase == PHASE_HOLD) {
        s->failure = failure;
        s->phase = PHASE_DECIDING;
        Py_CLEAR(s->task); /* of an earlier attempt */
        stream_walk(s, s->core->on_response);
    } else if (s->phase == PHASE_RELAY) {
        stream_cut(s, strcmp(failure, "timeout") == 0 ? END_TIMEOUT : END_TRUNCATED);
    }
    Py_DECREF(s);
}

const char *ending_outcome(enum ending ending)
{
    static const char *const outcomes[N_ENDINGS] = {"upstream_timeout", "truncated", "upstream_aborted", "draining"};
    return outcomes[ending];
}

/* The exchange ends before its time, visibly: by an error while nothing of an answer was sent, by an event where the
 * client's dialect has one, else by broken framing. */
void stream_cut(Stream *s, enum ending ending)
{
    if (s->phase < PHASE_RELAY && !s->finished) { /* a drain that is over */
        cancel_task(s);
        if (s->phase != PHASE_BODY)
            s->phase = PHASE_DECIDING;
        s->head_out = 0;
        stream_reject(s, ending_outcome(ending));
        return;
    }
    if (s->up != NULL && s->up->stream == s) {
        s->up->reusable = false;
        up_release(s);
    }
    if (s->phase == PHASE_RELAY && s->scanner == SCANNER_SSE && events_break(s, ending))
        return;
    /* chunked without its last chunk is a visible end; one that ends with the connection needs a reset */
    stream_break(s, s->to_close_out);
    stream_gone(s, ending_outcome(ending));
}

/* All of the answer is written: settle now, or when the client has taken it. */
void stream_ended(Stream *s, const char *outcome)
{
    s->outcome = outcome;
    s->phase = PHASE_FLUSH;
    s->finished = true;
    if (s->in_walk == 0)
        stream_flushed(s);
}

void stream_flushed(Stream *s)
{
    if (s->phase == PHASE_FLUSH && !stream_blocked(s))
        settle(s);
}

/* The walk's own work for this exchange is not wanted any more. */
static void cancel_task(Stream *s)
{
    if (s->task == NULL)
        return;
    PyObject *cancelled = PyObject_CallMethod(s->task, "cancel", NULL);
    if (cancelled == NULL)
        PyErr_WriteUnraisable(s->task);
    Py_XDECREF(cancelled);
}

/* The client is not there any more, or is given up: nobody waits for the upstream (SEMANTICS 4). */
void stream_gone(Stream *s, const char *outcome)
{
    if (s->phase == PHASE_DONE)
        return;
    Py_INCREF(s);
    bool flushing = s->phase == PHASE_FLUSH;
    stream_last(s);
    if (!flushing || strcmp(outcome, "client_gone") != 0)
        s->outcome = outcome;
    if (!s->committed)
        s->status = 499;
    s->done = true;
    if (s->up != NULL && !flushing) {
        s->up->reusable = false;
        up_release(s);
    }
    cancel_task(s);
    s->phase = PHASE_FLUSH;
    s->finished = true;
    if (s->in_walk == 0)
        settle(s);
    Py_DECREF(s);
}

static void settle(Stream *s)
{
    if (s->phase == PHASE_DONE)
        return;
    Core *core = s->core;
    Downstream *d = s->down;
    uint64_t now = asc_now();
    s->phase = PHASE_DONE;
    s->done = true;
    stream_read_watch(s);
    stream_drop_body(s);
    if (s->plan != NULL) {
        uint32_t block = s->plan->block;
        meter_status(core->page, block, s->status);
        meter_latency(core->page, block, METER_REQUEST, now - s->t_start);
        if (s->usage_in > 0 && block)
            page_add(core->page, block + METER_TOKENS_IN, (uint64_t)s->usage_in);
        if (s->usage_out > 0 && block)
            page_add(core->page, block + METER_TOKENS_OUT, (uint64_t)s->usage_out);
    }
    if (core->access_log)
        access_line(s, now);
    stream_walk(s, core->on_settle);
    Py_CLEAR(s->task);
    Py_CLEAR(s->context);
    up_release(s);
    Py_CLEAR(s->up);
    core->n_in_flight--;
    if (s->h2.id && d != NULL) {
        frames_settled(d, s);
        s->down = NULL;
        Py_DECREF(s); /* the connection's reference */
        return;
    }
    s->down = NULL;
    if (d != NULL && d->stream == s) {
        d->stream = NULL;
        down_settled(d);
        Py_DECREF(s); /* the connection's reference */
    }
}

