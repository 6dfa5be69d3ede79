/* An event stream on its way to the client (SEMANTICS 3 and 4).
 *
 * Events are passed on whole, so that what has been sent always ends where another event may follow: ours, that says
 * how the stream broke off. Three things are done to them on the way.
 *
 *   held     until the first content: a failure before it is answered by another target or by an error, and the client
 *            never learns of the attempt (PHASE_HOLD, which ends with the first byte of other answers)
 *   stripped of usage that we asked for and the client did not: a member is overwritten with spaces, the event that
 *            holds nothing else is left out
 *   ended    after an error or an abort without the terminator that would make it look complete
 *
 * Nothing is copied while events come whole and after content: they leave from the window that they were read into.
 */
#include "py_core.h"

enum {
    HOLD_EVENTS = 64,
    HOLD_BYTES = 16384, /* of events before the first content, and of the start of one event */
    TAIL_KEPT = 1024,   /* of an event longer than that: usage stands at the end of an event */
    CHOICES_MAX = 128,
};

/* The answer is an event stream that is understood. Its head is in core->heads. */
void events_start(Stream *s)
{
    s->events.strip = s->plan->strip && s->plan->ask != NULL && s->json_done && s->json.include_usage != 1;
}

void events_drop(Stream *s)
{
    buffer_free(&s->events.early);
    buffer_free(&s->events.partial);
    free(s->events.per_choice);
    s->events = (asc_events){0};
}

/* ---- one event ---------------------------------------------------------------------------------------------------- */

/* Completion tokens of one choice so far: continuous usage counts each choice for itself. */
static void count_choice(Stream *s, const json_facts *facts)
{
    asc_events *e = &s->events;
    if (facts->usage_out < 0)
        return;
    if (facts->choices_empty) {
        e->final = true;
        return;
    }
    if (s->json.n < 2 || s->json.n > CHOICES_MAX || facts->index < 0 || facts->index >= s->json.n)
        return;
    if (e->per_choice == NULL) {
        e->per_choice = calloc((size_t)s->json.n, sizeof *e->per_choice);
        if (e->per_choice == NULL)
            return; /* the last choice's count stands for all */
        e->n_choices = (uint32_t)s->json.n;
    }
    e->per_choice[facts->index] = facts->usage_out > UINT32_MAX ? UINT32_MAX : (uint32_t)facts->usage_out;
}

/* The event that ended last is the terminator of an answer that is not complete. `was_error`: an error came before it. */
static bool lies(sse_scanner *sse, bool was_error)
{
    const json_facts *facts = json_answer_facts(&sse->json);
    switch ((enum json_dialect)sse->dialect) {
    case JSON_OPENAI:
        return sse->error || sse->finish == FINISH_ABORT;
    case JSON_MESSAGES:
        if (sse->finish == FINISH_NONE)
            sse->finish = FINISH_ABORT; /* every complete message has a reason why it stopped; vLLM's aborted ones have none */
        return sse->error || sse->finish == FINISH_ABORT;
    case JSON_RESPONSES: /* response.failed says so itself */
        return (was_error && facts->finish != FINISH_ERROR) || sse->finish == FINISH_ABORT;
    default:
        return false;
    }
}

/* What the event that ended last means for the client: true when it is to be passed on. `region` begins at offset `base`
 * of the stream. */
static bool passes(Stream *s, bool was_error, char *region, uint64_t base)
{
    asc_events *e = &s->events;
    sse_scanner *sse = &s->watch.sse;
    const json_facts *facts = json_answer_facts(&sse->json);
    if (sse->terminated) {
        e->ended = lies(sse, was_error);
        e->whole = !e->ended && !sse->error;
        if (e->ended)
            return false;
    }
    if (sse->dialect != JSON_OPENAI)
        return true;
    count_choice(s, facts);
    uint64_t off, len;
    if (e->strip && sse_usage(sse, &off, &len)) {
        if (facts->choices_empty && facts->usage_out >= 0 && !e->mid_event)
            return false;
        if (off >= base)
            memset(region + (off - base), ' ', (size_t)len);
    }
    return true;
}

/* ---- the end ------------------------------------------------------------------------------------------------------ */

const char *events_outcome(const Stream *s)
{
    const sse_scanner *sse = &s->watch.sse;
    if (s->events.whole)
        return "complete";
    if (sse->error)
        return "upstream_failed";
    return sse->finish == FINISH_ABORT ? "upstream_aborted" : "truncated";
}

/* The event that tells the client how its stream broke off, as parts. Where the dialect numbers its events (RESPONSES),
 * a NUL stands for the number. */
static int last_event(const Stream *s, enum ending ending, struct iovec parts[3], char number[24])
{
    PyObject *event = s->plan->endings[ending];
    if (event == NULL)
        return 0;
    char *bytes = PyBytes_AS_STRING(event);
    size_t len = (size_t)PyBytes_GET_SIZE(event);
    char *mark = memchr(bytes, '\0', len);
    if (mark == NULL) {
        parts[0] = (struct iovec){bytes, len};
        return 1;
    }
    asc_writer w = {.at = number, .end = number + 24};
    put_u64(&w, s->watch.sse.events - s->events.ended); /* a terminator that was kept back has not taken its number */
    parts[0] = (struct iovec){bytes, (size_t)(mark - bytes)};
    parts[1] = (struct iovec){number, (size_t)(w.at - number)};
    parts[2] = (struct iovec){mark + 1, len - parts[0].iov_len - 1};
    return 3;
}

/* After content: end the stream so that the client sees why. False when that cannot be said in an event; then only broken
 * framing is left. The upstream is released already. */
bool events_break(Stream *s, enum ending ending)
{
    asc_events *e = &s->events;
    const sse_scanner *sse = &s->watch.sse;
    struct iovec parts[3];
    char number[24];
    int n = 0;
    if (sse->finish == FINISH_ABORT)
        ending = END_ABORTED; /* that it gave up came before it broke off */
    const char *outcome = ending_outcome(ending);
    if (e->whole || sse->error || e->said) {
        outcome = events_outcome(s); /* it has been said; only the framing's end is missing */
    } else {
        n = e->mid_event ? 0 : last_event(s, ending, parts, number);
        if (n == 0)
            return false;
    }
    e->ended = e->said = true;
    Py_INCREF(s);
    (void)stream_send_parts(s, parts, n, true);
    if (s->phase == PHASE_RELAY)
        stream_ended(s, outcome);
    Py_DECREF(s);
    return true;
}

/* ---- on its way --------------------------------------------------------------------------------------------------- */

/* In PHASE_HOLD: keep what may yet be taken back, the head first. */
bool events_hold(Stream *s, const char *bytes, size_t len)
{
    asc_events *e = &s->events;
    if (s->head_out) {
        if (!buffer_append(&e->early, s->core->heads, s->head_out, 0))
            return false;
        e->head_len = s->head_out;
        s->head_out = 0;
    }
    return len == 0 || buffer_append(&e->early, bytes, len, 0);
}

/* Put the head that was held back to where it was when it came. What was held behind it becomes the caller's. */
asc_buffer events_release(Stream *s)
{
    asc_events *e = &s->events;
    asc_buffer early = e->early;
    e->early = (asc_buffer){0};
    if (early.len) {
        memcpy(s->core->heads, early.bytes + early.off, e->head_len);
        s->head_out = e->head_len;
        early.off += e->head_len;
        early.len -= e->head_len;
    }
    return early;
}

/* An error came before content. The walk may ask elsewhere, or pass on what came: true in that case. */
static bool judged(Stream *s)
{
    s->phase = PHASE_DECIDING;
    s->failure = "error_event";
    s->held = true;
    Py_CLEAR(s->task);
    Upstream *u = s->up;
    stream_walk(s, s->core->on_response);
    s->held = false;
    if (s->phase == PHASE_RELAY && s->up == u && u->stream == s)
        return true;
    if (u->stream == s)
        up_release(s); /* the walk went another way, perhaps in a task: this answer is not wanted */
    return false;
}

/* Send events: what was held before them, `bytes`, and our own word if the stream ends with one. */
static int send_events(Stream *s, char *bytes, size_t len, const struct iovec *own, int n_own, bool end)
{
    asc_events *e = &s->events;
    if (e->early.len == 0 && n_own == 0)
        return stream_send(s, bytes, len, end);
    struct iovec parts[5];
    int n = 0;
    asc_buffer early = events_release(s); /* sending may end the exchange */
    if (early.len)
        parts[n++] = (struct iovec){early.bytes + early.off, early.len};
    parts[n++] = (struct iovec){bytes, len};
    memcpy(parts + n, own, (size_t)n_own * sizeof *own);
    int result = stream_send_parts(s, parts, n + n_own, end);
    buffer_free(&early);
    return result;
}

/* The event under way would be the terminator if its last line were complete: servers leave that out at the end. */
static bool ends_well(sse_scanner *sse)
{
    sse_scanner trial = *sse;
    (void)sse_feed(&trial, "\n\n", 2);
    if (trial.terminated)
        *sse = trial;
    return trial.terminated;
}

/* Events from `region`, of which the first `seen` bytes were scanned before. It has room around it as in stream_relay. */
static int relay_region(Stream *s, char *region, size_t size, size_t seen, bool end)
{
    asc_events *e = &s->events;
    sse_scanner *sse = &s->watch.sse;
    const uint64_t base = sse->bytes - seen;
    const bool had_content = sse->content;
    const uint64_t now = asc_now(), events = sse->events;
    size_t kept = 0, at = 0; /* region[0..kept) is to be sent; region[at..) has not been looked at */
    sse->progress = false;
    for (size_t used; seen < size && !sse->terminated; seen += used) {
        bool was_error = sse->error;
        if (!sse_next(sse, region + seen, size - seen, &used))
            continue;
        size_t stop = seen + used;
        if (passes(s, was_error, region, base)) {
            if (kept != at)
                memmove(region + kept, region + at, stop - at);
            kept += stop - at;
        }
        e->mid_event = false;
        at = stop;
    }
    if (sse->terminated) { /* whatever follows it is not looked at */
        if (!e->ended) {
            memmove(region + kept, region + at, size - at);
            kept += size - at;
        }
        at = size;
    }
    if (sse->boundary > base + at) { /* comments, or the second half of a line end */
        size_t stop = (size_t)(sse->boundary - base);
        memmove(region + kept, region + at, stop - at);
        kept += stop - at;
        at = stop;
    }
    bool good = !sse->error && sse->finish != FINISH_ABORT;
    if (end && at < size && !sse->terminated && good && ends_well(sse)) {
        memmove(region + kept, region + at, size - at);
        kept += size - at;
        at = size;
        e->whole = true;
    }
    if (size - at > HOLD_BYTES && !end) { /* an event too long to wait for */
        size_t stop = size - TAIL_KEPT;
        memmove(region + kept, region + at, stop - at);
        kept += stop - at;
        at = stop;
        e->mid_event = true;
    }
    if (at < size && !end && !buffer_append(&e->partial, region + at, size - at, HEADROOM)) {
        stream_failed(s, "reset");
        return -1;
    }
    if (!had_content && sse->content)
        meter_latency(s->core->page, s->plan->block, METER_FIRST_TOKEN, now - s->t_start);
    else if (had_content && sse->events != events)
        meter_latency(s->core->page, s->plan->block, METER_BETWEEN_TOKENS, now - s->t_last);
    if (sse->progress)
        s->t_last = now;

    if (s->phase == PHASE_HOLD) {
        bool nothing = !sse->content && !sse->terminated && !e->mid_event;
        if (!sse->content && sse->error) {
            if (!events_hold(s, region, kept)) {
                stream_failed(s, "reset");
                return -1;
            }
            kept = 0;
            if (!judged(s))
                return 0;
        } else if (nothing && end) {
            stream_failed(s, "truncated");
            return 0;
        } else if (nothing && sse->events < HOLD_EVENTS && e->early.len + kept < HOLD_BYTES) {
            if (!events_hold(s, region, kept)) {
                stream_failed(s, "reset");
                return -1;
            }
            return 0;
        }
        s->phase = PHASE_RELAY;
    }

    struct iovec own[3];
    char number[24];
    int n_own = 0;
    bool aborted = sse->finish == FINISH_ABORT;
    if (!e->said && !e->whole && !sse->error && (e->ended || end)) {
        n_own = e->mid_event ? 0 : last_event(s, aborted ? END_ABORTED : END_TRUNCATED, own, number);
        if (n_own == 0) { /* no word for it in this dialect: the framing must say it */
            (void)send_events(s, region, kept, NULL, 0, false);
            if (s->phase == PHASE_RELAY)
                stream_failed(s, "truncated");
            return 0;
        }
        e->said = true;
    }
    return send_events(s, region, kept, own, n_own, end);
}

/* As stream_relay, of an event stream. */
int events_relay(Stream *s, char *data, size_t len, bool end)
{
    asc_events *e = &s->events;
    if (e->partial.len == 0)
        return relay_region(s, data, len, 0, end);
    if (len && !buffer_append(&e->partial, data, len, HEADROOM)) {
        stream_failed(s, "reset");
        return -1;
    }
    asc_buffer whole = e->partial; /* what is left of it becomes the next one */
    e->partial = (asc_buffer){0};
    int result = relay_region(s, whole.bytes + whole.off, whole.len, whole.len - len, end);
    buffer_free(&whole);
    return result;
}

/* ---- what it cost ------------------------------------------------------------------------------------------------- */

/* Tokens, and how they are known. A stream that is cut short is counted as well (SEMANTICS 4). */
void events_usage(Stream *s)
{
    const asc_events *e = &s->events;
    const sse_scanner *sse = &s->watch.sse;
    s->usage_in = sse->usage_in >= 0 ? sse->usage_in : s->usage_in;
    s->usage_out = sse->usage_out >= 0 ? sse->usage_out : s->usage_out;
    if (e->per_choice != NULL && !e->final) {
        s->usage_out = 0;
        for (uint32_t i = 0; i < e->n_choices; i++)
            s->usage_out += e->per_choice[i];
    }
    if (s->usage_out >= 0) {
        s->usage_source = e->whole || e->final ? USAGE_REPORTED : USAGE_PARTIAL;
    } else if (sse->content_events) {
        s->usage_out = (int64_t)sse->content_events;
        s->usage_source = USAGE_COUNTED;
    }
}
